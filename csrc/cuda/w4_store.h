// The sums of a tile of the decode matmul on their way to y.
// defines: shallow::finish_tile
#pragma once

#include "cuda/kernel.h"
#include "cuda/w4_decode.h"
#include "cuda/w4_params.h"

namespace shallow {

template <typename T>
__device__ float bias_of(const Params& p, int row) {
    return p.call.bias ? widen(static_cast<const T*>(p.call.bias)[row]) : 0;
}

__device__ inline float activated(Activation kind, float v) {
    switch (kind) {
        case Activation::silu: return v / (1 + __expf(-v));
        case Activation::gelu: return 0.5f * v * (1 + erff(v * 0.70710678f));
        case Activation::gelu_tanh:  // 1 + tanh(u) = 2 / (1 + exp(-2 u))
            return v / (1 + __expf(-1.5957691f * (v + 0.044715f * v * v * v)));
        case Activation::relu: return v < 0 ? 0 : v;  // NaN stays
        default: return v;
    }
}

// Writes a product to y, with what stands behind it: see W4Matmul. Gives what it wrote.
template <typename T>
__device__ float store_one(const Params& p, int row, int column, float product, float up, int n) {
    float value = product + bias_of<T>(p, row);
    const std::int64_t place = column * p.call.y_stride + row;
    if (p.call.gated)
        value = activated(p.call.activation, value) * (up + bias_of<T>(p, n + row));
    else if (p.call.gate)
        value *= activated(p.call.activation, p.call.gate[place]);
    else
        value = activated(p.call.activation, value);
    if (p.call.cap != 0) value = p.call.cap * tanhf(value / p.call.cap);
    if (p.call.live && !p.call.live[column]) value = 0;
    if (p.call.add) value += p.call.add[place];
    if (p.call.y_type == ScaleType::float32)
        static_cast<float*>(p.call.y)[place] = value;
    else
        narrow(static_cast<T*>(p.call.y)[place], value);
    return value;
}

// By a warp, whose lane 4 g + t has rows g (first two) and g + 8, columns 2 t and 2 t + 1.
template <typename T>
__device__ void store_tile(const Params& p, int tile, const float (&values)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int n = static_cast<int>(p.call.gated ? p.call.weights.n / 2 : p.call.weights.n);
    const int rows = p.call.gated ? kTile / 2 : kTile;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int column = 2 * t + i;
        float squares = 0, sum = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = tile * rows + 8 * r + g;
            if (8 * r >= rows || row >= n || column >= p.call.m) continue;
            const float value = store_one<T>(p, row, column, values[2 * r + i], values[2 + i], n);
            squares += value * value;
            sum += value;
        }
        if (!p.call.out_sums) continue;
        for (int bits = 4; bits < 32; bits *= 2) {
            squares += __shfl_xor_sync(kAllLanes, squares, bits);
            sum += __shfl_xor_sync(kAllLanes, sum, bits);
        }
        if (g == 0 && column < p.call.m) {
            p.call.out_sums[2 * tile * p.call.m + column] = squares;
            p.call.out_sums[(2 * tile + 1) * p.call.m + column] = sum;
        }
    }
}

// By a warp: the sums of a slice to y; of several slices by the last to arrive, in their order, so
// that they are the same every time.
template <typename T>
__device__ void finish_tile(const Params& p, int tile, float (&values)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, slices = gridDim.y;
    if (slices > 1) {
        const std::int64_t stride = std::int64_t{p.tiles} * p.call.m * kTile;
        float* parts = p.call.parts + tile * p.call.m * kTile + 2 * t * kTile + g;
        float* own = parts + blockIdx.y * stride;
        for (int i = 0; i < 4; ++i)
            if (2 * t + i % 2 < p.call.m) own[i % 2 * kTile + i / 2 * 8] = values[i];
        __threadfence();
        __syncwarp();
        int before = 0;
        if (threadIdx.x % 32 == 0) before = atomicAdd(p.call.counters + tile, 1);
        if (__shfl_sync(kAllLanes, before, 0) != slices - 1) return;
        __threadfence();
        if (threadIdx.x % 32 == 0) p.call.counters[tile] = 0;
        for (float& value : values) value = 0;
#pragma unroll 4
        for (int slice = 0; slice < slices; ++slice)
            for (int i = 0; i < 4; ++i)
                if (2 * t + i % 2 < p.call.m)
                    values[i] += __ldcg(parts + slice * stride + i % 2 * kTile + i / 2 * 8);
    }
    store_tile<T>(p, tile, values);
}

}  // namespace shallow
