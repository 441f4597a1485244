#include "cpu/w4_vector_neon.h"

namespace shallow {

const Kernels kKernelsDotprod = make_kernels<Neon<Bytes::dotprod>>();

}  // namespace shallow
