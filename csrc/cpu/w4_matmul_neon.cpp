#include "cpu/w4_vector_neon.h"

namespace shallow {

const Kernels kKernelsNeon = make_kernels<Neon<Bytes::plain>>();

}  // namespace shallow
