#include "cpu/w4_vector_avx512.h"

namespace shallow {
namespace {

// To the same bits by AVX2's kernel where that is faster.
void int8_tiles_or_avx2(const TileView& w, const Int8Input& x, const Output& y, int64_t begin,
                        int64_t end, uint8_t* scratch) {
    if (x.m == 1 && (w.kind == Codes::nibble || w.kind == Codes::six) && passes_512_in_halves())
        return kKernelsAvx2.int8_tiles(w, x, y, begin, end, scratch);
    int8_tiles<Avx512>(w, x, y, begin, end, scratch);
}

constexpr Kernels make() {
    Kernels kernels = make_kernels<Avx512>();
    kernels.int8_tiles = int8_tiles_or_avx2;
    return kernels;
}

}  // namespace

const Kernels kKernelsAvx512 = make();

}  // namespace shallow
