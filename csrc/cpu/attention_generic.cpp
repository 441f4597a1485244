#include "cpu/lanes_generic.h"
#include "cpu/attention_kernel.h"

namespace shallow {

const AttentionKernels kAttentionGeneric = make_attention_kernels();

// What tiles need; words need less.
std::int64_t attention_scratch(const KvShape& shape, std::int64_t rows) {
    const std::int64_t padded = (rows + 31) / 32 * 32, page = kPage + shape.width;
    return padded * (page + 4) + (padded * page + 2 * kPage * shape.width) / 2;  // half: 16 bits
}

const AttentionKernels& attention_kernels(Isa isa, bool rounds) {
#if defined(SHALLOW_X86)
    if (isa >= Isa::amx && rounds) return kAttentionAmx;
    if (isa >= Isa::avx512) return rounds ? kAttentionWordsAvx512 : kAttentionAvx512;
    if (isa >= Isa::avxvnni && rounds) return kAttentionWordsAvxvnni;
    if (isa >= Isa::avx2) return rounds ? kAttentionWordsAvx2 : kAttentionAvx2;
#elif defined(SHALLOW_ARM)
    if (isa >= Isa::neon) return kAttentionNeon;
#endif
    (void)isa, (void)rounds;
    return kAttentionGeneric;
}

}  // namespace shallow
