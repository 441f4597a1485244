// GGUF blocks (llama.cpp) straight into tiles, as kernels/w4/from_gguf.py defines them.
// defines: tile_gguf fill_gguf
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cpu/w4_matmul.h"

namespace shallow {

// (n, k) weights of GGUF type `type` from their blocks, `size` bytes. `codebook`: the 16 values of
// IQ4_NL. None where a scale is NaN or Inf. Throws std::invalid_argument for a type without a group
// format, a k that its blocks do not divide, or another number of bytes.
std::optional<TiledMatrix> tile_gguf(const std::string& type, std::int64_t n, std::int64_t k,
                                     const std::uint8_t* blocks, std::int64_t size,
                                     const float* codebook, int threads);

// The same into a matrix that has been made for them. False where a scale is NaN or Inf. Throws
// std::invalid_argument as above, and where the matrix is of another kind.
bool fill_gguf(const TiledMatrix& to, const std::string& type, const std::uint8_t* blocks,
               std::int64_t size, int threads);

}  // namespace shallow
