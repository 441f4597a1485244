// The decode matmul: every weight is read once, dequantized in registers, and multiplied on tensor
// cores, whose 8 columns are the rows of x.
//
// A block owns 16 rows of W; its warps take turns along K, 64 bytes of each row at a time, and add
// up their parts at the end. A lane loads 16 bytes of rows g and g + 8 (lane = 4 g + t), kDepth
// chunks ahead: a block of 256 threads has 32 KiB in flight, and two blocks share a multiprocessor.
// (3 TB/s for 1 us on 132 multiprocessors are 23 KiB each.) x lies in shared memory; its
// permutation, norm and padding are dealt with while the first weights are on their way.
//
// Codes become small integers, exact in float16 and bfloat16; scales multiply the float32 sum of a
// group's products. A zero point or minimum adds minimum * (sum of the group's x): one more mma,
// whose first factor is all ones. So only a normalised x, codebook entries and y are rounded to 16
// bits.
#include "cuda/w4_matmul.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernel.h"
#include "cuda/w4_decode.h"

namespace shallow {
namespace {

using w4::ScaleType;
using w4::Scheme;

constexpr int kTile = 16;             // rows of W of a block
constexpr int kChunkBytes = 64;       // of a row, read at once by the 4 lanes of a quad
constexpr int kStep = 16;             // weights along K of one mma
constexpr int kMaxWarps = 8;          // of a block
constexpr int kDepth = 4;             // chunks of a warp in flight
constexpr int kColumnStride = 20;     // floats from column to column of a tile in shared memory
constexpr int kMaxXBytes = 64 << 10;  // of x in shared memory at once, without its padding
constexpr int kMaxSharedBytes = kMaxXBytes + kW4MaxRows * 15 * sizeof(uint2);

constexpr int chunk_weights(int bits) { return 8 * kChunkBytes / bits; }

// What a code stands for before it is scaled.
enum class Values {
    centred,  // code - 2^(bits - 1)
    plain,    // code; the group adds a minimum
    table,    // an entry of the codebook
};

struct Params {
    W4Matmul call;
    std::int64_t row_bytes;         // of codes
    int chunks, groups, supers;     // along K
    int slice_chunks;               // whose x lies in shared memory at once
    int x_stride4;                  // 4 elements each, from row to row of that x
    int group_shift;                // chunk << shift, or >> -shift, is its first group
    int step_shift;                 // log2 of the steps of a group in a chunk
    int scale_bytes, offset_bytes;  // of an element of scales; of zeros or mins
    bool aligned;                   // x and what is added to it can be read 2 elements at a time
};

// ---- x ----

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

__device__ void keep_sum(Moments& moments, Moment kind, int row, float sum) {
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
    if (threadIdx.x % 32 == 0)
        moments[(kind * kMaxWarps + threadIdx.x / 32) * kW4MaxRows + row] = sum;
}

__device__ float mean(const Params& p, Moments& moments, Moment kind, int row) {
    float sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp)
        sum += moments[(kind * kMaxWarps + warp) * kW4MaxRows + row];
    return sum / static_cast<float>(p.call.weights.k);
}

// What delta's elements are multiplied by, before `post`.
__device__ float delta_scale(const Params& p, Moments& moments, int row) {
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
__device__ void store_stream(const Params& p, int row, int k, const Four& x) {
    const std::int32_t* perm = p.call.weights.perm;
    for (int i = 0; i < 4; ++i) {
        const int column = k + i % 2 + i / 2 * 8;
        if (column < p.call.weights.k)
            p.call.stream[row * p.call.x_stride + (perm ? perm[column] : column)] = x.v[i];
    }
}

// Sums for the norms of x and delta; the first block writes the stream.
template <typename T>
__device__ void sum_moments(const Params& p, Moments& moments) {
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
    for (int row = 0; row < p.call.m; ++row) {
        const float scale = delta_scale(p, moments, row);
        float squares = 0, values = 0;
#pragma unroll 4
        for (int i = threadIdx.x; share(i) < p.call.weights.k; i += blockDim.x) {
            const Four x = load_x<T>(p, row, share(i), scale);
            if (p.call.delta && blockIdx.x == 0) store_stream(p, row, share(i), x);
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

// Puts x of a slice of chunks into shared memory: permuted, normalised, padded with zeros.
template <typename T, int CHUNK_WEIGHTS>
__device__ void stage_x(const Params& p, SharedArray<uint2> staged, Moments& moments,
                        int first_chunk) {
    const int first = first_chunk * CHUNK_WEIGHTS;
    const int count4 = min(p.slice_chunks, p.chunks - first_chunk) * CHUNK_WEIGHTS / 4;
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
#pragma unroll 4
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
            staged[row * p.x_stride4 + i] = bits;
        }
    }
}

// ---- a warp's work ----

// Of rows g and g + 8 (first index), a chunk's groups t and t + 4.
using GroupBits = std::uint32_t[2][2];
using GroupFloats = float[2][2];

// A lane's share of one chunk of the tile, as loaded.
struct Stage {
    uint4 codes[2];    // of rows g and g + 8
    GroupBits scale;   // kquant: [][1] is d, dmin
    GroupBits offset;  // zero point, minimum or kquant sub-minimum
};

__device__ void widen_groups(const GroupBits& bits, ScaleType type, GroupFloats& values) {
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

__device__ std::uint32_t word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <typename T, int BITS, Values VALUES>
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
        GroupFloats scale, minimum;
        group_values(stage, scale, minimum);
        float part[4] = {}, sums[4] = {};
        for (int word = 0; word < 4; ++word) {
            std::uint32_t a[2][kSteps / 2];  // pairs of rows g and g + 8
            for (int r = 0; r < 2; ++r) {
                const std::uint32_t codes = word_of(stage.codes[r], word);
                if constexpr (VALUES == Values::table)
                    look_up(codes, entry_, a[r]);
                else
                    decode(codes, VALUES == Values::centred ? 1 << (BITS - 1) : 0, T{}, a[r]);
            }
            for (int i = 0; i < kSteps / 4; ++i) {
                const int step = word * (kSteps / 4) + i;
                const uint2 four = x[step * kStep / 4];
                const std::uint32_t b[2] = {four.x, four.y};
                mma<T>(part, {a[0][2 * i], a[1][2 * i], a[0][2 * i + 1], a[1][2 * i + 1]}, b);
                if (VALUES == Values::plain) mma<T>(sums, {kOnes, kOnes, kOnes, kOnes}, b);
                // After every word, not every group: no branch on where the group ends.
                if (i + 1 == kSteps / 4 || p_.step_shift == 0)
                    scale_part(step >> p_.step_shift, scale, minimum, part, sums);
            }
        }
    }

    // Lane 4 g + t holds rows g (first two) and g + 8, columns 2 t and 2 t + 1.
    float tile[4] = {};

private:
    static constexpr std::uint32_t kOnes =
        std::is_same<T, __half>::value ? 0x3c003c00u : 0x3f803f80u;

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

// ---- the block ----

using Partial = Shared<float, kMaxWarps * kW4MaxRows * kColumnStride>;

// The sum over warps of one element of the tile.
__device__ float tile_sum(Partial& partial, int row, int column) {
    float sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp)
        sum += partial[(warp * kW4MaxRows + column) * kColumnStride + row];
    return sum;
}

template <typename T>
__device__ float bias_of(const Params& p, int row) {
    return p.call.bias ? widen(static_cast<const T*>(p.call.bias)[row]) : 0;
}

__device__ float activated(Activation kind, float v) {
    switch (kind) {
        case Activation::silu: return v / (1 + __expf(-v));
        case Activation::gelu: return 0.5f * v * (1 + erff(v * 0.70710678f));
        case Activation::gelu_tanh:  // 1 + tanh(u) = 2 / (1 + exp(-2 u))
            return v / (1 + __expf(-1.5957691f * (v + 0.044715f * v * v * v)));
        case Activation::relu: return fmaxf(v, 0);
        default: return v;
    }
}

// Writes the columns of y that belong to the block's rows of W.
template <typename T>
__device__ void store_tile(const Params& p, Partial& partial, int first, int n) {
    const bool gated = p.call.gated;
    const int rows = gated ? kTile / 2 : kTile;
    for (int i = threadIdx.x; i < rows * p.call.m; i += blockDim.x) {
        const int row = i % rows, column = i / rows;
        if (first + row >= n) continue;
        float value = tile_sum(partial, row, column) + bias_of<T>(p, first + row);
        if (gated) {
            const float up = tile_sum(partial, row + rows, column) + bias_of<T>(p, n + first + row);
            value = activated(p.call.activation, value) * up;
        }
        const std::int64_t place = column * p.call.y_stride + first + row;
        if (p.call.gate)
            value *= activated(p.call.activation, p.call.gate[place]);
        else if (!gated)
            value = activated(p.call.activation, value);
        if (p.call.cap != 0) value = p.call.cap * tanhf(value / p.call.cap);
        if (p.call.live && !p.call.live[column]) value = 0;
        if (p.call.add) value += p.call.add[place];
        if (p.call.y_type == ScaleType::float32)
            static_cast<float*>(p.call.y)[place] = value;
        else
            narrow(static_cast<T*>(p.call.y)[place], value);
    }
}

// Adds the warp's chunks of a slice, and keeps kDepth of its chunks in flight.
template <typename Work>
__device__ void add_slice(const Params& p, Work& work, Stage (&stages)[kDepth],
                          SharedArray<uint2> column, int slice) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int end = min(slice + p.slice_chunks, p.chunks);
    for (int round = slice + warp; round < end; round += kDepth * warps) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int chunk = round + d * warps, next = chunk + kDepth * warps;
            if (chunk >= end) break;
            work.add(stages[d], column + (chunk - slice) * (Work::kWeights / 4));
            if (next < p.chunks) work.load(stages[d], next);
        }
    }
}

template <typename T, int BITS, Values VALUES>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    w4_matmul_kernel(const __grid_constant__ Params p) {
    __shared__ Moments moments;
    __shared__ Partial partial;
    const SharedArray<uint2> x = dynamic_shared<uint2>();
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int n = static_cast<int>(p.call.gated ? p.call.weights.n / 2 : p.call.weights.n);
    const int first = static_cast<int>(blockIdx.x) * (p.call.gated ? kTile / 2 : kTile);
    // Rows of W beyond the last repeat it, columns beyond the rows of x too; neither is written.
    const int row = min(first + g, n - 1);
    const int other = p.call.gated ? n + row : min(first + g + 8, n - 1);
    const SharedArray<uint2> column = x + (min(g, p.call.m - 1) * p.x_stride4 + t);

    Warp<T, BITS, VALUES> work(p, row, other);
    Stage stages[kDepth] = {};
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
        if (warp + d * warps < p.chunks) work.load(stages[d], warp + d * warps);
    allow_next_kernel();
    wait_for_previous_kernel();

    if (p.call.norm_kind != Norm::none || p.call.delta) sum_moments<T>(p, moments);
    for (int slice = 0; slice < p.chunks; slice += p.slice_chunks) {
        if (slice) __syncthreads();
        stage_x<T, work.kWeights>(p, x, moments, slice);
        __syncthreads();
        add_slice(p, work, stages, column, slice);
    }
    for (int i = 0; i < 4; ++i)
        partial[(warp * kW4MaxRows + 2 * t + i % 2) * kColumnStride + g + i / 2 * 8] = work.tile[i];
    __syncthreads();
    store_tile<T>(p, partial, first, n);
}

// ---- the launch ----

using Kernel = void (*)(Params);

template <typename T>
Kernel kernel_for(const w4::Matrix& w) {
    const bool centred = w.scheme == Scheme::symmetric;
    if (w.bits == 8)
        return centred ? w4_matmul_kernel<T, 8, Values::centred>
                       : w4_matmul_kernel<T, 8, Values::plain>;
    if (w.scheme == Scheme::codebook) return w4_matmul_kernel<T, 4, Values::table>;
    return centred ? w4_matmul_kernel<T, 4, Values::centred>
                   : w4_matmul_kernel<T, 4, Values::plain>;
}

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument("w4_matmul: " + message);
}

bool divides(std::uint64_t divisor, const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % divisor == 0;
}

void check_arguments(const W4Matmul& call) {
    const w4::Matrix& w = call.weights;
    require(call.m >= 0 && call.m <= kW4MaxRows,
            "x must have 0 to 8 rows, found " + std::to_string(call.m));
    require(w.n >= 1 && w.k >= 1, "the weight matrix is empty");
    require(
        w.bits == 4 || (w.bits == 8 && w.scheme < Scheme::codebook),
        "bits must be 4, or 8 without a codebook or super-scales, found " + std::to_string(w.bits));
    require(w.group == 0 || w.group == 16 || w.group == 32 || w.group == 64 || w.group == 128,
            "group must be 0, 16, 32, 64 or 128, found " + std::to_string(w.group));
    require(w.k <= INT32_MAX / 2 && w.n <= INT32_MAX / w.groups(),
            "the weight matrix is too large");
    require(call.type != ScaleType::float32, "products must be of float16 or bfloat16");
    for (const ScaleType type : {call.x_type, call.y_type})
        require(type == call.type || type == ScaleType::float32,
                "x and y must have the type of products or float32");
    require(!call.delta || (call.post && call.stream), "delta needs post and stream");
    require(call.norm_kind == Norm::none || call.norm, "a norm needs its weights");
    require(!call.gated || w.n % 2 == 0, "gated weights must have an even number of rows");
    require(divides(16, w.codes), "codes must lie on a multiple of 16 bytes");
}

int bytes_of(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

Params derive(const W4Matmul& call, int warps) {
    const w4::Matrix& w = call.weights;
    const int width = chunk_weights(w.bits), steps = width / kStep;
    Params p{};
    p.call = call;
    p.chunks = static_cast<int>(w4::ceil_div(w.k, width));
    p.row_bytes = std::int64_t{p.chunks} * kChunkBytes;
    p.groups = static_cast<int>(w.groups());
    p.supers = static_cast<int>(w4::ceil_div(w.k, w4::kSuper));

    const int round = kDepth * warps, round_bytes = call.m * round * width * 2;
    p.slice_chunks = std::min(std::max(kMaxXBytes / round_bytes, 1) * round, p.chunks);
    p.x_stride4 = p.slice_chunks * width / 4;
    p.x_stride4 += (4 - p.x_stride4 % 16 + 16) % 16;  // 4 rows of x, 32 bytes each: all 32 banks

    p.group_shift = -31;  // the row is one group
    if (w.group)
        for (int shift = -1; shift <= 3; ++shift)
            if ((shift < 0 ? w.group >> -shift : w.group << shift) == width) p.group_shift = shift;
    const int group_steps = steps >> std::max(p.group_shift, 0);
    while (1 << p.step_shift < group_steps) ++p.step_shift;

    p.scale_bytes = w.scheme == Scheme::kquant ? 1 : bytes_of(w.scale_type);
    p.offset_bytes = w.scheme == Scheme::minimum ? bytes_of(w.scale_type) : 1;
    p.aligned = !w.perm && w.k % 2 == 0 && call.x_stride % 2 == 0 &&
                divides(2 * bytes_of(call.x_type), call.x);
    for (const float* read : {call.delta, call.post, call.norm, call.norm_bias})
        p.aligned = p.aligned && divides(8, read);
    return p;
}

}  // namespace

void prepare_w4_matmul() {
    w4::Matrix w{};
    for (const int bits : {4, 8})
        for (const Scheme scheme : {Scheme::symmetric, Scheme::minimum, Scheme::codebook}) {
            if (bits == 8 && scheme == Scheme::codebook) continue;
            w.bits = bits;
            w.scheme = scheme;
            prepare(reinterpret_cast<const void*>(kernel_for<__half>(w)), kMaxSharedBytes);
            prepare(reinterpret_cast<const void*>(kernel_for<__nv_bfloat16>(w)), kMaxSharedBytes);
        }
}

void w4_matmul(const W4Matmul& call, void* stream) {
    check_arguments(call);
    if (call.m == 0) return;
    const w4::Matrix& w = call.weights;
    const auto chunks = static_cast<int>(w4::ceil_div(w.k, chunk_weights(w.bits)));
    const int warps = std::min(kMaxWarps, chunks);
    const Params p = derive(call, warps);
    const std::int64_t blocks =
        call.gated ? w4::ceil_div(w.n / 2, kTile / 2) : w4::ceil_div(w.n, kTile);
    Launch where{};
    where.grid = static_cast<unsigned>(blocks);
    where.block = static_cast<unsigned>(32 * warps);
    where.shared_bytes = call.m * p.x_stride4 * sizeof(uint2);
    where.max_shared_bytes = kMaxSharedBytes;
    where.stream = static_cast<cudaStream_t>(stream);
    where.overlap = call.overlap != 0;
    launch(where,
           call.type == ScaleType::float16 ? kernel_for<__half>(w) : kernel_for<__nv_bfloat16>(w),
           p);
}

}  // namespace shallow
