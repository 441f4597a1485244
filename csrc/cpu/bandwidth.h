// Reads `bytes` (a multiple of 256) from 64-byte aligned memory and returns the sum of its words,
// so that no load is left out. One definition an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shallow {

uint64_t sum_words_generic(const void* data, size_t bytes);
uint64_t sum_words_avx2(const void* data, size_t bytes);
uint64_t sum_words_avx512(const void* data, size_t bytes);

}  // namespace shallow
