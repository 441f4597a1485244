#include "cpu/lanes_neon.h"
#include "cpu/rows_kernel.h"

namespace shallow {

const RowKernels kRowsNeon = make_row_kernels();

}  // namespace shallow
