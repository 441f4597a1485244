#include "cpu/w4_vector_avx512.h"
#include "cpu/w4_vector_avxvnni.h"

namespace shallow {
namespace {

// For a lone row where 512 bits pass as two halves, to the same bits: AVX2's way through memory with
// VNNI and 32 registers.
struct Halves : AvxVnni {
    template <Codes C>
    static constexpr int most_rows = 1;
    static constexpr bool keeps_supers = true;
    template <Codes C>
    static constexpr bool joins_planes = true;
};

void int8_tiles_or_halves(const TileView& w, const Int8Input& x, const Output& y, int64_t begin,
                          int64_t end, uint8_t* scratch) {
    if (x.m == 1 && passes_512_in_halves()) {
        if (w.kind == Codes::nibble)
            return int_tiles_of<Halves, Codes::nibble>(w, x, y, begin, end, scratch);
        if (w.kind == Codes::six)
            return int_tiles_of<Halves, Codes::six>(w, x, y, begin, end, scratch);
    }
    int8_tiles<Avx512>(w, x, y, begin, end, scratch);
}

constexpr Kernels make() {
    Kernels kernels = make_kernels<Avx512>();
    kernels.int8_tiles = int8_tiles_or_halves;
    return kernels;
}

}  // namespace

const Kernels kKernelsAvx512 = make();

}  // namespace shallow
