#include "cpu/lanes_neon.h"
#include "cpu/attention_kernel.h"

namespace shallow {

const AttentionKernels kAttentionNeon = make_attention_kernels();

}  // namespace shallow
