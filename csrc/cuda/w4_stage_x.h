// x of the decode matmul on its way into shared memory: permuted, with what delta adds, normalised,
// padded with zeros.
// defines: shallow::Moments, sum_moments, StagedX, stage_x
#pragma once

#include <cstring>

#include "cuda/kernel.h"
#include "cuda/w4_decode.h"
#include "cuda/w4_params.h"

namespace shallow {

struct Four {
    float v[4];
};

// Elements k, k + 1, k + 8 and k + 9 of a row, in the stored order of W's columns; zeros beyond K.
// A lane's share of 16, as the tensor core wants it.
template <typename T>
__device__ Four load4(const Params& p, const T* row, int k) {
    const int columns = static_cast<int>(p.call.weights.k);
    const std::int32_t* perm = p.call.weights.perm;
    Four four;
    for (int half = 0; half < 4; half += 2, k += 8) {
        if (p.aligned && k < columns) {
            T two[2];
            memcpy(static_cast<void*>(two), __builtin_assume_aligned(row + k, 2 * sizeof(T)),
                   sizeof two);
            four.v[half] = widen(two[0]);
            four.v[half + 1] = widen(two[1]);
            continue;
        }
        for (int i = 0; i < 2; ++i)
            four.v[half + i] = k + i < columns ? widen(row[perm ? perm[k + i] : k + i]) : 0;
    }
    return four;
}

// Where the elements of share i begin: 4 shares to every 16.
__device__ inline int share(int i) { return 4 * i - i % 4 * 2; }

// Sums over K of every row, a part of each warp's: of squares, of values, of delta's squares.
using Moments = Shared<float, 3 * kMaxWarps * kW4MaxRows>;
enum Moment { kSquares, kValues, kDelta };

__device__ inline void keep_sum(Moments& moments, Moment kind, int row, float sum) {
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
    if (threadIdx.x % 32 == 0)
        moments[(kind * kMaxWarps + threadIdx.x / 32) * kW4MaxRows + row] = sum;
}

__device__ inline float mean(const Params& p, Moments& moments, Moment kind, int row) {
    float sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp)
        sum += moments[(kind * kMaxWarps + warp) * kW4MaxRows + row];
    return sum / static_cast<float>(p.call.weights.k);
}

// What delta's elements are multiplied by, before `post`.
__device__ inline float delta_scale(const Params& p, Moments& moments, int row) {
    return p.call.delta ? rsqrtf(mean(p, moments, kDelta, row) + p.call.norm_eps) : 0;
}

// A share of x with what delta adds, not yet normalised.
template <typename T>
__device__ Four load_x(const Params& p, int row, int k, float delta_scale) {
    const std::int64_t at = row * p.call.x_stride;
    Four x = p.call.x_type == ScaleType::float32
                 ? load4(p, static_cast<const float*>(p.call.x) + at, k)
                 : load4(p, static_cast<const T*>(p.call.x) + at, k);
    if (!p.call.delta) return x;
    const Four delta = load4(p, p.call.delta + at, k), post = load4(p, p.call.post, k);
    for (int i = 0; i < 4; ++i) x.v[i] += delta.v[i] * delta_scale * post.v[i];
    return x;
}

// Writes a share of the stream.
__device__ inline void store_stream(const Params& p, int row, int k, const Four& x) {
    const std::int32_t* perm = p.call.weights.perm;
    for (int i = 0; i < 4; ++i) {
        const int column = k + i % 2 + i / 2 * 8;
        if (column < p.call.weights.k)
            p.call.stream[row * p.call.x_stride + (perm ? perm[column] : column)] = x.v[i];
    }
}

// Sums for the norms of x and delta, as far as they are not known; the first block writes the stream.
template <typename T>
__device__ void sum_moments(const Params& p, Moments& moments) {
    if (p.call.sums) {
        for (int i = 0; i < 2 * p.call.m; ++i) {
            float sum = 0;
            for (int part = threadIdx.x; part < p.call.sum_parts; part += blockDim.x)
                sum += p.call.sums[part * 2 * p.call.m + i];
            keep_sum(moments, i < p.call.m ? kSquares : kValues, i % p.call.m, sum);
        }
        __syncthreads();
        return;
    }
    if (p.call.delta) {
        for (int row = 0; row < p.call.m; ++row) {
            float sum = 0;
#pragma unroll 4
            for (int i = threadIdx.x; share(i) < p.call.weights.k; i += blockDim.x)
                for (const float v : load4(p, p.call.delta + row * p.call.x_stride, share(i)).v)
                    sum += v * v;
            keep_sum(moments, kDelta, row, sum);
        }
        __syncthreads();
    }
    const bool writes = p.call.delta && blockIdx.x == 0 && blockIdx.y == 0;
    for (int row = 0; row < p.call.m; ++row) {
        const float scale = delta_scale(p, moments, row);
        float squares = 0, values = 0;
#pragma unroll 4
        for (int i = threadIdx.x; share(i) < p.call.weights.k; i += blockDim.x) {
            const Four x = load_x<T>(p, row, share(i), scale);
            if (writes) store_stream(p, row, share(i), x);
            for (const float v : x.v) {
                squares += v * v;
                values += v;
            }
        }
        keep_sum(moments, kSquares, row, squares);
        keep_sum(moments, kValues, row, values);
    }
    __syncthreads();
}

using StagedX = Shared<uint2, kW4MaxRows * kXStride>;  // rows, kXStride apart, by 4 elements

// Puts x of some chunks into shared memory: permuted, normalised, padded with zeros.
template <typename T, int CHUNK_WEIGHTS>
__device__ void stage_x(const Params& p, StagedX& staged, Moments& moments, int first_chunk,
                        int chunks) {
    const int first = first_chunk * CHUNK_WEIGHTS, count4 = chunks * CHUNK_WEIGHTS / 4;
    for (int row = 0; row < p.call.m; ++row) {
        const float added = delta_scale(p, moments, row);
        float middle = 0, scale = 1;
        if (p.call.norm_kind != Norm::none) {
            float square = mean(p, moments, kSquares, row);
            if (p.call.norm_kind == Norm::layer) {
                middle = mean(p, moments, kValues, row);
                square = fmaxf(square - middle * middle, 0);
            }
            scale = rsqrtf(square + p.call.norm_eps);
        }
        for (int i = threadIdx.x; i < count4; i += blockDim.x) {
            const int k = first + share(i);
            Four x = load_x<T>(p, row, k, added);
            if (p.call.norm_kind != Norm::none) {
                const Four weight = load4(p, p.call.norm, k);
                for (int j = 0; j < 4; ++j) x.v[j] = (x.v[j] - middle) * scale * weight.v[j];
            }
            if (p.call.norm_bias) {
                const Four bias = load4(p, p.call.norm_bias, k);
                for (int j = 0; j < 4; ++j) x.v[j] += bias.v[j];
            }
            T narrowed[4];
            for (int j = 0; j < 4; ++j) narrow(narrowed[j], x.v[j]);
            uint2 bits;
            memcpy(&bits, narrowed, 8);
            staged[row * kXStride + i] = bits;
        }
    }
}

}  // namespace shallow
