#include "cpu/lanes_generic.h"
#include "cpu/rows_kernel.h"

namespace shallow {

const RowKernels kRowsGeneric = make_row_kernels();

const RowKernels& row_kernels(Isa isa) {
#if defined(SHALLOW_X86)
    if (isa >= Isa::avx512) return kRowsAvx512;
    if (isa >= Isa::avx2) return kRowsAvx2;
#elif defined(SHALLOW_ARM)
    if (isa >= Isa::neon) return kRowsNeon;
#endif
    (void)isa;
    return kRowsGeneric;
}

}  // namespace shallow
