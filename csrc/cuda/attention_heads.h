// Queries and keys on their way into decode attention: normalised, rotated, rounded to T.
// defines: shallow::Eight, Heads
#pragma once

#include "cuda/attention.h"
#include "cuda/kernel.h"
#include "cuda/w4_decode.h"

namespace shallow {

// Neighbours along E: what a lane loads at once.
struct Eight {
    float v[8];
};

template <typename T>
__device__ uint4 narrow_eight(const Eight& eight) {
    T narrowed[8];
    for (int i = 0; i < 8; ++i) narrow(narrowed[i], eight.v[i]);
    uint4 bits;
    memcpy(&bits, narrowed, 16);
    return bits;
}

// Values e to e + 7 of a row of E, zeros beyond it. Where every row begins on a multiple of 16 bytes
// they are one load, of what is read once.
template <typename T>
__device__ uint4 load_eight(const T* row, int e, int width, bool aligned) {
    if (e >= width) return {};
    if (aligned) return load_stream(row + e);
    T eight[8];
    for (int i = 0; i < 8; ++i) {
        if (e + i < width)
            eight[i] = row[e + i];
        else
            narrow(eight[i], 0);
    }
    uint4 bits;
    memcpy(&bits, eight, 16);
    return bits;
}

// Writes values e to e + 7 of a row of E.
template <typename T>
__device__ void store_eight(T* row, int e, int width, const uint4& bits) {
    T eight[8];
    memcpy(static_cast<void*>(eight), &bits, 16);
    for (int i = 0; i < 8 && e + i < width; ++i) row[e + i] = eight[i];
}

// Sum over the lanes of a warp.
__device__ inline float warp_sum(float v) {
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(kAllLanes, v, i);
    return v;
}

// Heads of one kind, of one token: what norm and rotation need of them.
template <typename T>
struct Heads {
    const DecodeAttention& call;
    const T* token;    // the first head of the kind, as is the first value of norms of all heads
    int first, count;  // the block's first, and all of the kind
    const float *norm, *bias, *angles;

    // By a warp: mean and 1 / deviation of a head, or of all, to two of `moments`.
    template <typename Moments>
    __device__ void measure(int head, Moments&& moments, int at) const {
        const bool all = call.scope == Scope::all;
        const T* x = token + (all ? 0 : (first + head) * call.width);
        const int values = all ? count * call.width : call.width;
        float square = 0, mean = 0;
        for (int i = threadIdx.x % 32; i < values; i += 32) {
            const float v = widen(x[i]);
            square += v * v;
            mean += v;
        }
        square = warp_sum(square) / static_cast<float>(values);
        mean = warp_sum(mean) / static_cast<float>(values);
        if (call.norm_kind != Norm::layer) mean = 0;
        if (threadIdx.x % 32) return;
        moments[at] = mean;
        moments[at + 1] = rsqrtf(fmaxf(square - mean * mean, 0) + call.epsilon);
    }

    __device__ float normal(int head, int e, float mean, float scale) const {
        const int at = (first + head) * call.width + e;
        const float x = widen(token[at]);
        if (call.scope == Scope::none) return x;
        const int own = call.scope == Scope::all ? at : e;
        return (x - mean) * scale * norm[own] + (bias ? bias[own] : 0);
    }

    __device__ float turned_one(int head, int e, float mean, float scale) const {
        const float x = normal(head, e, mean, scale);
        if (e >= call.rope) return x;
        const int half = call.rope / 2;
        const bool low = e < half;
        const float other = normal(head, low ? e + half : e - half, mean, scale);
        const float cosine = angles[low ? e : e - half], sine = angles[low ? e + half : e];
        return x * cosine + (low ? -other : other) * sine;
    }

    // Values e to e + 7 of a head, zeros beyond E.
    __device__ Eight rotated(int head, int e, float mean, float scale) const {
        Eight eight{};
        for (int i = 0; i < 8 && e + i < call.width; ++i)
            eight.v[i] = turned_one(head, e + i, mean, scale);
        return eight;
    }
};

}  // namespace shallow
