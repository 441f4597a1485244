// The rate at which registers alone multiply int8 and add int32: the ceiling of int8 matmuls.
#pragma once

#include <cstdint>

namespace shallow {

// Each runs `rounds` rounds of independent products and returns their sum; kPeakOps operations
// (a multiplication or an addition) a round.
constexpr int kPeakChains = 12;
constexpr std::int64_t kPeakOpsAvx2 = kPeakChains * 32 * 2;
constexpr std::int64_t kPeakOpsAvxvnni = kPeakChains * 32 * 2;
constexpr std::int64_t kPeakOpsAvx512 = kPeakChains * 64 * 2;
constexpr std::int64_t kPeakOpsAmx = 4 * 16 * 16 * 64 * 2;
std::int64_t peak_avx2(std::int64_t rounds);
std::int64_t peak_avxvnni(std::int64_t rounds);
std::int64_t peak_avx512(std::int64_t rounds);
std::int64_t peak_amx(std::int64_t rounds);

}  // namespace shallow
