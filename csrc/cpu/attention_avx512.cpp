#include "cpu/lanes_avx512.h"
#include "cpu/attention_kernel.h"

namespace shallow {

const AttentionKernels kAttentionAvx512 = make_attention_kernels();

}  // namespace shallow
