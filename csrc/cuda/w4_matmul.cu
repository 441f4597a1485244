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
#include "cuda/w4_params.h"
#include "cuda/w4_stage_x.h"
#include "cuda/w4_warp.h"

namespace shallow {
namespace {

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

template <typename T, int BITS, Values VALUES, bool WHOLE>
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

    Warp<T, BITS, VALUES, WHOLE> work(p, row, other);
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

template <typename T, bool WHOLE>
Kernel kernel_of_4_bits(Scheme scheme) {
    if (scheme == Scheme::codebook) return w4_matmul_kernel<T, 4, Values::table, WHOLE>;
    if (scheme == Scheme::symmetric) return w4_matmul_kernel<T, 4, Values::centred, WHOLE>;
    if constexpr (WHOLE)
        if (scheme == Scheme::zero) return w4_matmul_kernel<T, 4, Values::shifted, WHOLE>;
    return w4_matmul_kernel<T, 4, Values::plain, WHOLE>;
}

template <typename T>
Kernel kernel_for(const w4::Matrix& w) {
    if (w.bits == 8)
        return w.scheme == Scheme::symmetric ? w4_matmul_kernel<T, 8, Values::centred, false>
                                             : w4_matmul_kernel<T, 8, Values::plain, false>;
    const bool whole = (w.group == 0 || w.group >= chunk_weights(4)) &&
                       w.scheme != Scheme::kquant && w.scale_type == ScaleType::float16;
    return whole ? kernel_of_4_bits<T, true>(w.scheme) : kernel_of_4_bits<T, false>(w.scheme);
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
    for (w.bits = 4; w.bits <= 8; w.bits += 4)
        for (w.group = 64; w.group <= 128; w.group += 64)
            for (const Scheme scheme :
                 {Scheme::symmetric, Scheme::zero, Scheme::minimum, Scheme::codebook}) {
                if (w.bits == 8 && scheme == Scheme::codebook) continue;
                w.scheme = scheme;
                for (const Kernel kernel : {kernel_for<__half>(w), kernel_for<__nv_bfloat16>(w)})
                    prepare(reinterpret_cast<const void*>(kernel), kMaxSharedBytes);
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
