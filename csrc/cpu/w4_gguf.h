// GGUF blocks (llama.cpp) straight into tiles, as kernels/w4/from_gguf.py defines them.
// defines: tiles_of_gguf fill_gguf
#pragma once

#include <cstdint>
#include <string>

#include "cpu/w4_matmul.h"

namespace shallow {

// The matrix that (n, k) weights of GGUF type `type` become, its tiles zeros yet. `codebook`: the 16
// values of IQ4_NL. Throws std::invalid_argument for a type without a group format, or a k that its
// blocks do not divide.
TiledMatrix tiles_of_gguf(const std::string& type, std::int64_t n, std::int64_t k,
                          const float* codebook);

// Writes its rows from `first` on, whole tiles or to the last row, from their blocks, `size` bytes. False
// where a scale is NaN or Inf. Throws std::invalid_argument where the matrix is of another kind, or has
// no such rows.
bool fill_gguf(const TiledMatrix& to, const std::string& type, const std::uint8_t* blocks,
               std::int64_t size, std::int64_t first, int threads);

}  // namespace shallow
