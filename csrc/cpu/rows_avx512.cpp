#include "cpu/lanes_avx512.h"
#include "cpu/rows_kernel.h"

namespace shallow {

const RowKernels kRowsAvx512 = make_row_kernels();

}  // namespace shallow
