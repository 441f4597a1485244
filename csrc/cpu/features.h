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

// How far ahead one row's weights are prefetched in each stream, as measured on Zen 4, Zen 5 and Intel's
// Xeons (benchmarks/results/decoder.md). `twice`: into L2 from there, into L1 when they are near
// (fetch_codes() of w4_stream.h).
int bytes_ahead(bool twice);

// Whether the weights of so many rows are prefetched into L2 from that far ahead, and into L1 from 1 KiB
// ahead, or straight into L1. Once on Zen 5, whose L1 has 48 KiB: one thread reads up to a fifth faster.
// Where kernels hold a block's codes (AVX-512) twice on Intel's cores alone, for several rows, which then
// take a twentieth less (benchmarks/results/decoder.md).
bool fetches_twice(bool holds_codes, std::int64_t rows);

// Whether nibbles are unpacked to bytes in memory, once for several rows. With three vector units (Intel)
// masks and shifts compete with the products; with four (AMD) two are free for them, and storing and
// loading the bytes would only cost (benchmarks/results/decoder.md).
bool unpacks_nibbles();

// Whether one row is multiplied by 4- and 6-bit codes faster with vectors of 256 bits than of 512. True of
// Zen 4, which runs the latter as two halves: decoding is 3-8 % faster (benchmarks/results/decoder.md).
bool passes_512_in_halves();

// Bytes from what is read to what is prefetched into L1, in a page of keys and values that holds
// `positions` of `most`; the next page goes into L2 meanwhile (Ahead of attention_ahead.h). 0: no
// prefetch, most of which would lie behind the end of a short page.
int page_bytes_ahead(std::int64_t positions, std::int64_t most);

// In how many streams a core best reads the weights that so many rows meet
// (benchmarks/results/decoder.md).
int long_streams(std::int64_t rows);

// A build in which AVX-512 runs AVX-VNNI and AMX (cpu/emulate.h): any core is taken for one of Intel's.
#if defined(SHALLOW_EMULATE)
constexpr bool kEmulates = true;
#else
constexpr bool kEmulates = false;
#endif

// Asked once, on first use. AMX on Linux also needs a permission per process (arch_prctl).
const Features& features();

}  // namespace shallow
