#include "cpu/w4_vector_neon.h"

namespace shallow {

const Kernels kKernelsI8mm = make_kernels<Neon<Bytes::i8mm>>();

}  // namespace shallow
