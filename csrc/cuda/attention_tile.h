// A warp of decode attention: 16 positions at a time, under the 16 queries of a group.
// defines: shallow::kTilePositions, element_of, product_of, capped, shrunk, Tile
#pragma once

#include <cmath>

#include "cuda/attention_heads.h"

namespace shallow {

constexpr int kTilePositions = 16;

// One of the 8 values of a load.
template <typename T>
__device__ float element_of(const uint4& eight, int i) {
    const auto bits = static_cast<std::uint16_t>(word_of(eight, i / 2) >> i % 2 * 16);
    T value;
    memcpy(static_cast<void*>(&value), &bits, 2);
    return widen(value);
}

template <typename T>
__device__ float product_of(const uint4& a, const uint4& b) {
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += element_of<T>(a, i) * element_of<T>(b, i);
    return sum;
}

__device__ inline float capped(float score, float cap) {
    return cap != 0 ? cap * tanhf(score / cap) : score;
}

// What a share at `top` counts when `higher` is the top; 0 where there was none.
__device__ inline float shrunk(float top, float higher) {
    return top == -INFINITY ? 0 : __expf(top - higher);
}

// Two floats as T, the first in the lower half.
__device__ inline std::uint32_t pair_of(float low, float high, __half) {
    return as_bits(__floats2half2_rn(low, high));
}
__device__ inline std::uint32_t pair_of(float low, float high, __nv_bfloat16) {
    return as_bits(__floats2bfloat162_rn(low, high));
}

// Lane 4 g + t holds rows g and g + 8 of the queries, and of what they mix.
template <typename T, int WIDTH>
class Tile {
public:
    __device__ Tile(int width, bool aligned)
        : width_(width), aligned_(aligned), g_(threadIdx.x % 32 / 4), t_(threadIdx.x % 4) {}

    // Starts the loads of 16 keys, E apart.
    __device__ void load_keys(const T* keys) {
#pragma unroll
        for (int c = 0; c < WIDTH / 32; ++c)
            for (int half = 0; half < 2; ++half)
                keys_[c][half] =
                    load_eight(keys + (8 * half + g_) * width_, 32 * c + 8 * t_, width_, aligned_);
    }

    // Queries, rows `stride` apart, times the keys: scores[h] has positions 8 h + 2 t and the next,
    // of row g, then of row g + 8.
    template <typename Queries>
    __device__ void multiply(Queries&& queries, int stride, float (&scores)[2][4]) const {
#pragma unroll
        for (int c = 0; c < WIDTH / 32; ++c) {
            const uint4 low = queries[g_ * stride + 4 * c + t_];
            const uint4 high = queries[(g_ + 8) * stride + 4 * c + t_];
            for (int half = 0; half < 2; ++half) {
                const uint4& key = keys_[c][half];
                mma<T>(scores[half], {low.x, high.x, low.y, high.y}, {key.x, key.y});
                mma<T>(scores[half], {low.z, high.z, low.w, high.w}, {key.z, key.w});
            }
        }
    }

    // Adds the 16 positions' values, E apart, by their scores.
    __device__ void mix(const float (&scores)[2][4], const T* values) {
        float shares[2][4];
        for (int r = 0; r < 2; ++r) {
            float higher = top[r];
            for (int i = 0; i < 4; ++i) higher = fmaxf(higher, scores[i / 2][2 * r + i % 2]);
            for (int bits = 1; bits < 4; bits *= 2)
                higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, bits));
            const float weight = shrunk(top[r], higher);
            top[r] = higher;
            total[r] *= weight;
            for (int i = 0; i < 4; ++i) {
                const float share = shrunk(scores[i / 2][2 * r + i % 2], higher);
                shares[i / 2][2 * r + i % 2] = share;
                total[r] += share;
            }
            for (float (&part)[4] : mixed)
                for (int i = 0; i < 2; ++i) part[2 * r + i] *= weight;
        }
        const std::uint32_t a[4] = {
            pair_of(shares[0][0], shares[0][1], T{}), pair_of(shares[0][2], shares[0][3], T{}),
            pair_of(shares[1][0], shares[1][1], T{}), pair_of(shares[1][2], shares[1][3], T{})};
#pragma unroll
        for (int d = 0; d < WIDTH / 64; ++d) {
            uint4 eights[4];  // of positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
            for (int i = 0; i < 4; ++i)
                eights[i] = load_eight(values + (2 * t_ + i % 2 + i / 2 * 8) * width_,
                                       64 * d + 8 * g_, width_, aligned_);
            for (int j = 0; j < 8; ++j) {
                const unsigned halves = j % 2 ? 0x7632 : 0x5410;
                const std::uint32_t b[2] = {
                    __byte_perm(word_of(eights[0], j / 2), word_of(eights[1], j / 2), halves),
                    __byte_perm(word_of(eights[2], j / 2), word_of(eights[3], j / 2), halves)};
                mma<T>(mixed[8 * d + j], a, b);
            }
        }
    }

    // Totals of rows, of which each lane has a part.
    __device__ void finish() {
        for (float& sum : total)
            for (int bits = 1; bits < 4; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
    }

    // Where mixed[n][i] belongs in E: row g + i / 2 * 8.
    __device__ int column(int n, int i) const { return n / 8 * 64 + 16 * t_ + i % 2 * 8 + n % 8; }

    float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    float mixed[WIDTH / 8][4] = {};

private:
    int width_;
    bool aligned_;
    int g_, t_;
    uint4 keys_[WIDTH / 32][2];
};

}  // namespace shallow
