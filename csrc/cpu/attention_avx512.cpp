#include "cpu/lanes_avx512.h"
#include "cpu/words_avx512.h"
#include "cpu/attention_words.h"

namespace shallow {

const AttentionKernels kAttentionAvx512 = make_attention_kernels();
const AttentionKernels kAttentionWordsAvx512 = with_words();

}  // namespace shallow
