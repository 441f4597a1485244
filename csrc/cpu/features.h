// What this processor can run and this system lets it run (registers saved on a task switch).
#pragma once

#include <cstdint>

// Named as in Linux's /proc/cpuinfo, but for NEON, which that calls asimd, asimddp and i8mm.
// clang-format off
#define SHALLOW_FEATURES(X)                                                                   \
    X(avx2) X(fma) X(f16c) X(avx_vnni)                                                        \
    X(avx512f) X(avx512bw) X(avx512vl) X(avx512dq) X(avx512_vnni) X(avx512_bf16)              \
    X(amx_tile) X(amx_int8) X(amx_bf16)                                                       \
    X(neon) X(neon_dotprod) X(neon_i8mm)
// clang-format on

namespace shallow {

struct Features {
#define SHALLOW_FIELD(name) bool name = false;
    SHALLOW_FEATURES(SHALLOW_FIELD)
#undef SHALLOW_FIELD
};

// Of one row's weights from memory, to be prefetched in each stream: what a core reads while memory
// answers, as measured on Zen 4, Zen 5 and Intel's Xeons (benchmarks/results/decoder.md). `twice`: into L2,
// and into L1 when they are near (fetch_codes() of w4_stream.h).
int bytes_ahead(bool twice);

// Whether what is read from memory goes into L1 at once from kilobytes ahead, where others take it into
// L2 first and into L1 from 1 KiB ahead. So on Zen 5 with 48 KiB of L1: one thread reads up to a fifth
// more (benchmarks/results/decoder.md).
bool far_into_l1();

// Whether nibbles are made bytes in memory, once for several rows. Three vector units (Intel) mask and shift
// in the time of products; of four (AMD) two do that beside the products, and the bytes would have to be
// stored and loaded (benchmarks/results/decoder.md).
bool unpacks_nibbles();

// Whether a lone row of nibbles or sixes meets them sooner by 256 bits than by 512 (Zen 4, which passes the
// latter in two halves): decoding is 3-8 % faster (benchmarks/results/decoder.md).
bool passes_512_in_halves();

// From what is read to what is fetched into L1, of a page of keys and values that holds `positions` of
// `most`; what comes next is fetched into L2 beside it (Ahead of attention_ahead.h). 0: nothing is, since
// of a short page much of it would lie behind its end.
int page_bytes_ahead(std::int64_t positions, std::int64_t most);

// Streams in which a core reads the weights of so many rows (benchmarks/results/decoder.md).
int long_streams(std::int64_t rows);

// Asked once, on first use. AMX on Linux also needs a permission per process (arch_prctl).
const Features& features();

}  // namespace shallow
