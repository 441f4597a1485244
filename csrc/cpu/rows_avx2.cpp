#include "cpu/lanes_avx2.h"
#include "cpu/rows_kernel.h"

namespace shallow {

const RowKernels kRowsAvx2 = make_row_kernels();

}  // namespace shallow
