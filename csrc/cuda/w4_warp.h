// A warp of the decode matmul: goes down tiles of 16 rows of W, whose codes it multiplies by x.
// defines: shallow::Groups, Rows, Ring, XSums, Warp, sum_x
#pragma once

#include <type_traits>

#include "cuda/kernel.h"
#include "cuda/w4_decode.h"
#include "cuda/w4_params.h"

namespace shallow {

// Of rows g and g + 8 (first index), a chunk's groups t and t + 4.
using GroupBits = std::uint32_t[2][2];
using GroupFloats = float[2][2];

// What a lane loads of one chunk beside codes.
struct Groups {
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

// Rows g and g + 8 of a tile: where their codes begin, in 16 bytes, and their groups. Beyond W's last
// they repeat it, and are not written.
struct Rows {
    std::uint32_t codes[2];
    int groups[2], supers[2];

    __device__ Rows(const Params& p, int tile) {
        const int n = static_cast<int>(p.call.weights.n), g = threadIdx.x % 32 / 4;
        for (int r = 0; r < 2; ++r) {
            int row = min(tile * kTile + g + 8 * r, n - 1);
            if (p.call.gated) row = min(tile * (kTile / 2) + g, n / 2 - 1) + r * (n / 2);
            codes[r] = row * p.chunks * (kChunkBytes / 16);
            groups[r] = row * p.groups;
            supers[r] = row * p.supers;
        }
    }

    // `a`, or `b` where `second`.
    __device__ Rows(const Rows& a, const Rows& b, bool second) {
        for (int r = 0; r < 2; ++r) {
            codes[r] = second ? b.codes[r] : a.codes[r];
            groups[r] = second ? b.groups[r] : a.groups[r];
            supers[r] = second ? b.supers[r] : a.supers[r];
        }
    }
};

// The warp's codes in flight: each lane reads what it copied, so that none waits for another.
using Ring = SharedArray<uint4>;
// Of a chunk and a column, where every group is a chunk or more.
using XSums = Shared<float, kMaxChunks * kW4MaxRows>;

template <typename T>
constexpr std::uint32_t kOnes = std::is_same<T, __half>::value ? 0x3c003c00u : 0x3f803f80u;

// WHOLE: a chunk of a row lies in one group, whose scale, a float16, multiplies its product.
template <typename T, int BITS, Values VALUES, bool WHOLE>
class Warp {
public:
    static constexpr int kWeights = chunk_weights(BITS);
    static constexpr int kSteps = kWeights / kStep;
    static constexpr bool kSums = WHOLE && (VALUES == Values::shifted || VALUES == Values::plain);
    static constexpr int kSpan = WHOLE ? 2 : 1;  // chunks of a step: they share its bookkeeping

    // Of `chunks` chunks from `first` on; begins with `tile`.
    __device__ Warp(const Params& p, Ring ring, int first, int chunks, int tile)
        : p_(p), lane_(threadIdx.x % 32), first_(first), whole_(chunks / kSpan),
          spans_((chunks + kSpan - 1) / kSpan), depth_(min(kDepth / kSpan, spans_)),
          ring_(ring + lane_), entry_{} {
        if (VALUES == Values::table) narrow(entry_, p.call.weights.codebook[lane_ % 16]);
        const Rows rows(p, tile);
        start(rows);
        for (int span = 0; span < depth_; ++span) fetch(span, span);
        load_groups(rows, 0);
    }

    // Adds the products of `tile` to `sums`: lane 4 g + t holds rows g (first two) and g + 8, columns
    // 2 t and 2 t + 1. `x` is the lane's from `column` on. What flies meanwhile is of this tile and
    // then of `next`, which need not be one.
    template <typename X>
    __device__ void multiply(X&& x, int column, XSums& x_sums, int tile, int next,
                             float (&sums)[4]) {
        const Rows own(p_, tile), others(p_, next);
#pragma unroll 1
        for (int span = 0; span < spans_; ++span) {
            Groups groups[kSpan];
            for (int s = 0; s < kSpan; ++s) groups[s] = groups_[s];
            const bool last = span + 1 == spans_;
            load_groups(Rows(own, others, last), last ? 0 : span + 1);
            if (depth_ == kDepth / kSpan)
                wait_copies<kDepth / kSpan - 1>();
            else
                wait_copies<0>();
#pragma unroll
            for (int s = 0; s < kSpan; ++s) {
                const int at = 64 * (kSpan * slot_ + s), chunk = kSpan * span + s;
                const uint4 codes[2] = {ring_[at], ring_[at + 32]};
                float x_sum[2] = {};
                if (kSums)
                    for (int i = 0; i < 2; ++i)
                        x_sum[i] = x_sums[chunk * kW4MaxRows + lane_ % 4 * 2 + i];
                add(codes, groups[s], x, column + chunk * (kWeights / 4), x_sum, sums);
            }
            int ahead = span + depth_;
            if (ahead >= spans_) ahead -= spans_;
            if (ahead == 0) start(others);
            fetch(ahead, (slot_ + depth_) % (kDepth / kSpan));
            slot_ = (slot_ + 1) % (kDepth / kSpan);
        }
    }

private:
    __device__ void start(const Rows& rows) {
        for (int r = 0; r < 2; ++r)
            codes_[r] = rows.codes[r] + first_ * (kChunkBytes / 16) + lane_ % 4;
    }

    // Starts the copies of a step, the tile's `span`; of an odd last chunk twice.
    __device__ void fetch(int span, unsigned slot) {
        for (int r = 0; r < 2; ++r) {
            std::uint32_t from = codes_[r];
            for (int s = 0; s < kSpan; ++s) {
                copy_async(ring_, 64 * (kSpan * slot + s) + 32 * r,
                           p_.call.weights.codes + std::uint64_t{from} * 16);
                if (span < whole_) from += kChunkBytes / 16;
            }
            codes_[r] += kSpan * (kChunkBytes / 16);
        }
        commit_copies();
    }

    // Starts the loads of a step's groups.
    __device__ void load_groups(const Rows& rows, int span) {
        const w4::Matrix& w = p_.call.weights;
        for (int s = 0; s < kSpan; ++s) {
            const int chunk = min(first_ + kSpan * span + s, p_.chunks - 1);
            for (int r = 0; r < 2; ++r) {
                Groups& to = groups_[s];
                if (WHOLE) {
                    const int i = rows.groups[r] + (chunk >> p_.group_chunks);
                    to.scale[r][0] = static_cast<const std::uint16_t*>(w.scales)[i];
                    if (VALUES == Values::shifted)
                        to.offset[r][0] = static_cast<const std::uint8_t*>(w.zeros)[i];
                    if (VALUES == Values::plain)
                        to.offset[r][0] = static_cast<const std::uint16_t*>(w.mins)[i];
                } else {
                    load_parts(to, rows, r, chunk);
                }
            }
        }
    }

    // Of a chunk of several groups, or of part of one.
    __device__ void load_parts(Groups& to, const Rows& rows, int r, int chunk) const {
        const w4::Matrix& w = p_.call.weights;
        const int shift = p_.group_shift;
        const int group = (shift < 0 ? chunk >> -shift : chunk << shift) + lane_ % 4;
        load_group(to.scale[r][0], to.offset[r][0], rows.groups[r], group);
        if (kSteps == 8 && shift == 3)
            load_group(to.scale[r][1], to.offset[r][1], rows.groups[r], group + 4);
        if (VALUES == Values::plain && w.scheme == Scheme::kquant) {
            const int super = chunk / (w4::kSuper / kWeights);
            to.scale[r][1] = load_bits<false>(w.supers, rows.supers[r] + super, 4);
        }
    }

    __device__ void load_group(std::uint32_t& scale, std::uint32_t& offset, int first,
                               int group) const {
        const w4::Matrix& w = p_.call.weights;
        const int i = first + min(group, p_.groups - 1);
        scale = load_bits<VALUES == Values::plain>(w.scales, i, p_.scale_bytes);
        if (VALUES != Values::plain) return;
        offset = load_bits<true>(w.scheme == Scheme::zero ? w.zeros : w.mins, i, p_.offset_bytes);
    }

    template <typename X>
    __device__ void add(const uint4 (&codes)[2], const Groups& groups, X&& x, int column,
                        const float (&x_sum)[2], float (&total)[4]) {
        GroupFloats scale{}, minimum{};
        if (!WHOLE) group_values(groups, scale, minimum);
        constexpr float kTaken = VALUES == Values::centred ? 1 << (BITS - 1) : 0;
        float part[4] = {}, sums[4] = {};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            std::uint32_t a[2][kSteps / 2];  // pairs of rows g and g + 8
            for (int r = 0; r < 2; ++r) {
                const std::uint32_t eight = word_of(codes[r], word);
                if constexpr (VALUES == Values::table)
                    look_up(eight, entry_, a[r]);
                else
                    decode(eight, kTaken, T{}, a[r]);
            }
            for (int i = 0; i < kSteps / 4; ++i) {
                const int step = word * (kSteps / 4) + i;
                const uint2 four = x[column + step * kStep / 4];
                const std::uint32_t b[2] = {four.x, four.y};
                mma<T>(part, {a[0][2 * i], a[1][2 * i], a[0][2 * i + 1], a[1][2 * i + 1]}, b);
                if (VALUES == Values::plain && !WHOLE)
                    mma<T>(sums, {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>}, b);
                // After every word, not every group: no branch on where the group ends.
                if (!WHOLE && (i + 1 == kSteps / 4 || p_.step_shift == 0))
                    scale_part(step >> p_.step_shift, scale, minimum, part, sums, total);
            }
        }
        if constexpr (WHOLE) scale_whole(groups, part, x_sum, total);
    }

    __device__ static float half_at(std::uint32_t bits) {
        return __low2float(as_pair<__half2>(bits));
    }

    // Adds a chunk of one group.
    __device__ static void scale_whole(const Groups& groups, const float (&part)[4],
                                       const float (&x_sum)[2], float (&total)[4]) {
        for (int r = 0; r < 2; ++r)
            for (int i = 0; i < 2; ++i) {
                float product = part[2 * r + i];
                if (VALUES == Values::shifted)
                    product -= static_cast<float>(groups.offset[r][0]) * x_sum[i];
                total[2 * r + i] += half_at(groups.scale[r][0]) * product;
                if (VALUES == Values::plain)
                    total[2 * r + i] += half_at(groups.offset[r][0]) * x_sum[i];
            }
    }

    // Scale and minimum of the groups that this lane loaded, in float32.
    __device__ void group_values(const Groups& groups, GroupFloats& scale,
                                 GroupFloats& minimum) const {
        const w4::Matrix& w = p_.call.weights;
        if (VALUES == Values::plain && w.scheme == Scheme::kquant) {
            for (int r = 0; r < 2; ++r) {
                const auto super = as_pair<__half2>(groups.scale[r][1]);
                scale[r][0] = __low2float(super) * static_cast<float>(groups.scale[r][0]);
                minimum[r][0] = -__high2float(super) * static_cast<float>(groups.offset[r][0]);
                scale[r][1] = minimum[r][1] = 0;
            }
            return;
        }
        widen_groups(groups.scale, w.scale_type, scale);
        if (VALUES != Values::plain) return;
        if (w.scheme != Scheme::zero) return widen_groups(groups.offset, w.scale_type, minimum);
        for (int r = 0; r < 2; ++r)
            for (int i = 0; i < 2; ++i)
                minimum[r][i] = -scale[r][i] * static_cast<float>(groups.offset[r][i]);
    }

    // Adds the sums of a group's products, or of part of them, to `total` and clears them.
    __device__ void scale_part(int group, const GroupFloats& scale, const GroupFloats& minimum,
                               float (&part)[4], float (&sums)[4], float (&total)[4]) {
        const int holder = (lane_ & ~3) | (group & 3);
        for (int r = 0; r < 2; ++r) {
            const float s = __shfl_sync(kAllLanes, group < 4 ? scale[r][0] : scale[r][1], holder);
            for (int i = 0; i < 2; ++i) total[2 * r + i] += s * part[2 * r + i];
            if (VALUES == Values::plain) {
                const float m =
                    __shfl_sync(kAllLanes, group < 4 ? minimum[r][0] : minimum[r][1], holder);
                for (int i = 0; i < 2; ++i) total[2 * r + i] += m * sums[i];
            }
        }
        for (int i = 0; i < 4; ++i) part[i] = sums[i] = 0;
    }

    const Params& p_;
    int lane_, first_;
    int whole_, spans_;  // steps of kSpan chunks, and all
    int depth_;          // of these in flight: of two tiles at most
    unsigned slot_ = 0;  // of the ring, that comes next
    Ring ring_;
    std::uint32_t codes_[2];  // to fetch
    Groups groups_[kSpan]{};
    T entry_;
};

// Sums of x, columns beyond its rows of any values: an mma whose first factor is all ones.
template <typename T, int STEPS, typename X>
__device__ void sum_x(X&& x, int column, int chunks, XSums& sums) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int chunk = threadIdx.x / 32; chunk < chunks; chunk += warps) {
        float sum[4] = {};
        for (int step = 0; step < STEPS; ++step) {
            const uint2 four = x[column + (chunk * STEPS + step) * kStep / 4];
            const std::uint32_t b[2] = {four.x, four.y};
            mma<T>(sum, {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>}, b);
        }
        if (lane < 4)
            for (int i = 0; i < 2; ++i) sums[chunk * kW4MaxRows + 2 * lane + i] = sum[i];
    }
    __syncthreads();
}

}  // namespace shallow
