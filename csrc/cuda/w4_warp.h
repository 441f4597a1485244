// A warp of the decode matmul: loads codes and scales of 16 rows of W, multiplies them by x.
// defines: shallow::Stage, Warp
#pragma once

#include <type_traits>

#include "cuda/kernel.h"
#include "cuda/w4_decode.h"
#include "cuda/w4_params.h"

namespace shallow {

// Of rows g and g + 8 (first index), a chunk's groups t and t + 4.
using GroupBits = std::uint32_t[2][2];
using GroupFloats = float[2][2];

// A lane's share of one chunk of the tile, as loaded.
struct Stage {
    uint4 codes[2];    // of rows g and g + 8
    GroupBits scale;   // kquant: [][1] is d, dmin
    GroupBits offset;  // zero point, minimum or kquant sub-minimum
};

__device__ inline void widen_groups(const GroupBits& bits, ScaleType type, GroupFloats& values) {
    if (type == ScaleType::float32) {
        for (int i = 0; i < 4; ++i) values[i / 2][i % 2] = __uint_as_float(bits[i / 2][i % 2]);
    } else if (type == ScaleType::bfloat16) {
        for (int i = 0; i < 4; ++i)
            values[i / 2][i % 2] = __uint_as_float(bits[i / 2][i % 2] << 16);
    } else {
        for (int i = 0; i < 4; ++i)
            values[i / 2][i % 2] = __low2float(as_pair<__half2>(bits[i / 2][i % 2]));
    }
}

// Element i of an array whose elements have 2, 4 or, where BYTE, 1 byte.
template <bool BYTE>
__device__ std::uint32_t load_bits(const void* array, int i, int bytes) {
    if (BYTE && bytes == 1) return static_cast<const std::uint8_t*>(array)[i];
    if (bytes == 2) return static_cast<const std::uint16_t*>(array)[i];
    return static_cast<const std::uint32_t*>(array)[i];
}

__device__ inline std::uint32_t word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// WHOLE: a chunk of a row lies in one group, whose scale, a float16, multiplies its product.
template <typename T, int BITS, Values VALUES, bool WHOLE>
class Warp {
public:
    static constexpr int kWeights = chunk_weights(BITS);
    static constexpr int kSteps = kWeights / kStep;

    __device__ Warp(const Params& p, int row, int other_row)
        : p_(p), lane_(threadIdx.x % 32), rows_{row, other_row}, entry_{} {
        for (int r = 0; r < 2; ++r)
            codes_[r] = p.call.weights.codes + rows_[r] * p.row_bytes + lane_ % 4 * 16;
        if (VALUES == Values::table) narrow(entry_, p.call.weights.codebook[lane_ % 16]);
    }

    // Starts the loads of one chunk.
    __device__ void load(Stage& stage, int chunk) const {
        const w4::Matrix& w = p_.call.weights;
        for (int r = 0; r < 2; ++r)
            stage.codes[r] = load_stream(codes_[r] + std::int64_t{chunk} * kChunkBytes);
        const int shift = p_.group_shift;
        if (WHOLE) {
            for (int r = 0; r < 2; ++r) {
                const int i = rows_[r] * p_.groups + (chunk >> -shift);
                stage.scale[r][0] = static_cast<const std::uint16_t*>(w.scales)[i];
                if (VALUES == Values::shifted)
                    stage.offset[r][0] = static_cast<const std::uint8_t*>(w.zeros)[i];
                if (VALUES == Values::plain)
                    stage.offset[r][0] = static_cast<const std::uint16_t*>(w.mins)[i];
            }
            return;
        }
        const int group = (shift < 0 ? chunk >> -shift : chunk << shift) + lane_ % 4;
        for (int r = 0; r < 2; ++r) {
            load_group(stage.scale[r][0], stage.offset[r][0], r, group);
            if (kSteps == 8 && shift == 3)
                load_group(stage.scale[r][1], stage.offset[r][1], r, group + 4);
            if (VALUES == Values::plain && w.scheme == Scheme::kquant) {
                const int super = chunk / (w4::kSuper / kWeights);
                stage.scale[r][1] = load_bits<false>(w.supers, rows_[r] * p_.supers + super, 4);
            }
        }
    }

    // Adds the chunk's products to the tile; x is the lane's column at the chunk's first weight.
    __device__ void add(const Stage& stage, SharedArray<uint2> x) {
        GroupFloats scale{}, minimum{};
        if (!WHOLE) group_values(stage, scale, minimum);
        const float middle = VALUES == Values::centred ? 1 << (BITS - 1) : 0;
        float taken[2] = {middle, middle};  // from the codes of rows g and g + 8
        if (VALUES == Values::shifted)
            for (int r = 0; r < 2; ++r) taken[r] = static_cast<float>(stage.offset[r][0]);
        float part[4] = {}, sums[4] = {};
        for (int word = 0; word < 4; ++word) {
            std::uint32_t a[2][kSteps / 2];  // pairs of rows g and g + 8
            for (int r = 0; r < 2; ++r) {
                const std::uint32_t codes = word_of(stage.codes[r], word);
                if constexpr (VALUES == Values::table)
                    look_up(codes, entry_, a[r]);
                else
                    decode(codes, taken[r], T{}, a[r]);
            }
            for (int i = 0; i < kSteps / 4; ++i) {
                const int step = word * (kSteps / 4) + i;
                const uint2 four = x[step * kStep / 4];
                const std::uint32_t b[2] = {four.x, four.y};
                mma<T>(part, {a[0][2 * i], a[1][2 * i], a[0][2 * i + 1], a[1][2 * i + 1]}, b);
                if (VALUES == Values::plain) mma<T>(sums, {kOnes, kOnes, kOnes, kOnes}, b);
                // After every word, not every group: no branch on where the group ends.
                if (!WHOLE && (i + 1 == kSteps / 4 || p_.step_shift == 0))
                    scale_part(step >> p_.step_shift, scale, minimum, part, sums);
            }
        }
        if constexpr (WHOLE)
            for (int r = 0; r < 2; ++r)
                for (int i = 0; i < 2; ++i) {
                    tile[2 * r + i] += half_at(stage.scale[r][0]) * part[2 * r + i];
                    if (VALUES == Values::plain)
                        tile[2 * r + i] += half_at(stage.offset[r][0]) * sums[2 * r + i];
                }
    }

    // Lane 4 g + t holds rows g (first two) and g + 8, columns 2 t and 2 t + 1.
    float tile[4] = {};

private:
    static constexpr std::uint32_t kOnes =
        std::is_same<T, __half>::value ? 0x3c003c00u : 0x3f803f80u;

    __device__ static float half_at(std::uint32_t bits) {
        return __low2float(as_pair<__half2>(bits));
    }

    __device__ void load_group(std::uint32_t& scale, std::uint32_t& offset, int r,
                               int group) const {
        const w4::Matrix& w = p_.call.weights;
        const int i = rows_[r] * p_.groups + min(group, p_.groups - 1);
        scale = load_bits<VALUES == Values::plain>(w.scales, i, p_.scale_bytes);
        if (VALUES != Values::plain) return;
        offset = load_bits<true>(w.scheme == Scheme::zero ? w.zeros : w.mins, i, p_.offset_bytes);
    }

    // Scale and minimum of the groups that this lane loaded, in float32.
    __device__ void group_values(const Stage& stage, GroupFloats& scale,
                                 GroupFloats& minimum) const {
        const w4::Matrix& w = p_.call.weights;
        if (VALUES == Values::plain && w.scheme == Scheme::kquant) {
            for (int r = 0; r < 2; ++r) {
                const auto super = as_pair<__half2>(stage.scale[r][1]);
                scale[r][0] = __low2float(super) * static_cast<float>(stage.scale[r][0]);
                minimum[r][0] = -__high2float(super) * static_cast<float>(stage.offset[r][0]);
                scale[r][1] = minimum[r][1] = 0;
            }
            return;
        }
        widen_groups(stage.scale, w.scale_type, scale);
        if (VALUES != Values::plain) return;
        if (w.scheme != Scheme::zero) return widen_groups(stage.offset, w.scale_type, minimum);
        for (int r = 0; r < 2; ++r)
            for (int i = 0; i < 2; ++i)
                minimum[r][i] = -scale[r][i] * static_cast<float>(stage.offset[r][i]);
    }

    // Adds the sums of a group's products, or of part of them, to the tile and clears them.
    __device__ void scale_part(int group, const GroupFloats& scale, const GroupFloats& minimum,
                               float (&part)[4], float (&sums)[4]) {
        const int holder = (lane_ & ~3) | (group & 3);
        for (int r = 0; r < 2; ++r) {
            const float s = __shfl_sync(kAllLanes, group < 4 ? scale[r][0] : scale[r][1], holder);
            for (int i = 0; i < 2; ++i) tile[2 * r + i] += s * part[2 * r + i];
            if (VALUES == Values::plain) {
                const float m =
                    __shfl_sync(kAllLanes, group < 4 ? minimum[r][0] : minimum[r][1], holder);
                for (int i = 0; i < 2; ++i) tile[2 * r + i] += m * sums[i];
            }
        }
        for (int i = 0; i < 4; ++i) part[i] = sums[i] = 0;
    }

    const Params& p_;
    int lane_;
    int rows_[2];
    const std::uint8_t* codes_[2];
    T entry_;
};

}  // namespace shallow
