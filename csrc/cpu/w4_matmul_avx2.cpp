#include "cpu/w4_vector_avx2.h"

namespace shallow {

const Kernels kKernelsAvx2 = make_kernels<Avx2>();

}  // namespace shallow
