#include "cpu/w4_vector_avxvnni.h"

namespace shallow {

const Kernels kKernelsAvxvnni = make_kernels<AvxVnni>();

}  // namespace shallow
