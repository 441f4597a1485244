#include "cpu/lanes_generic.h"
#include "cpu/attention_kernel.h"

namespace shallow {

const AttentionKernels kAttentionGeneric = kAttention;

std::int64_t attention_scratch(const KvShape& shape, std::int64_t rows) {
    return rows * (kPage + shape.width + 3);
}

const AttentionKernels& attention_kernels(Isa isa) {
#if defined(SHALLOW_X86)
    if (isa >= Isa::avx512) return kAttentionAvx512;
    if (isa >= Isa::avx2) return kAttentionAvx2;
#endif
    (void)isa;
    return kAttentionGeneric;
}

}  // namespace shallow
