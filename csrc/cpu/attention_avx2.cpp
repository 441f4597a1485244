#include "cpu/lanes_avx2.h"
#include "cpu/attention_kernel.h"

namespace shallow {

const AttentionKernels kAttentionAvx2 = make_attention_kernels();

}  // namespace shallow
