#include "cpu/lanes_avx2.h"
#include "cpu/words_avx2.h"
#include "cpu/attention_words.h"

namespace shallow {

const AttentionKernels kAttentionWordsAvxvnni = with_words();

}  // namespace shallow
