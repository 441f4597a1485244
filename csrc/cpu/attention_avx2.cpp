#include "cpu/lanes_avx2.h"
#include "cpu/words_avx2.h"
#include "cpu/attention_words.h"

namespace shallow {

const AttentionKernels kAttentionAvx2 = make_attention_kernels();
const AttentionKernels kAttentionWordsAvx2 = with_words();

}  // namespace shallow
