#include "cpu/w4_vector_avx512.h"

namespace shallow {

const Kernels kKernelsAvx512 = make_kernels<Avx512>();

}  // namespace shallow
