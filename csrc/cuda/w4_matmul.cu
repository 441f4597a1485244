// The decode matmul: every weight is read once, dequantized in registers, and multiplied on tensor
// cores, whose 8 columns are the rows of x.
//
// A block of 16 warps has a multiprocessor to itself and stays: it stages x of a slice of K in shared
// memory once, and its warps go down tiles of 16 rows of W, each for itself. A lane copies 16 bytes
// of rows g and g + 8 (lane = 4 g + t) to shared memory, kDepth chunks ahead: 64 KiB are in flight.
// (3 TB/s for 1 us on 132 multiprocessors are 23 KiB each.) These copies begin before the kernel
// before has ended, and while x is staged. Several slices meet in a scratch buffer, where for each
// tile the last warp to arrive adds them up.
//
// Codes become small integers, exact in float16 and bfloat16; scales multiply the float32 sum of a
// group's products. A zero point or minimum meets the sum of the group's x: where groups have a chunk
// and more it is taken once, while x is staged; else by one more mma, whose first factor is all ones.
// So only a normalised x, codebook entries and y are rounded to 16 bits.
#include "cuda/w4_matmul.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernel.h"
#include "cuda/w4_params.h"
#include "cuda/w4_stage_x.h"
#include "cuda/w4_store.h"
#include "cuda/w4_warp.h"

namespace shallow {
namespace {

template <typename T, int BITS, Values VALUES, bool WHOLE>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    w4_matmul_kernel(const __grid_constant__ Params p) {
    using Work = Warp<T, BITS, VALUES, WHOLE>;
    __shared__ Moments moments;
    __shared__ StagedX x;
    __shared__ XSums x_sums;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int column = min(g, p.call.m - 1) * kXStride + t;  // beyond x's rows the last again
    constexpr int kSlice = kW4SliceColumns / Work::kWeights;
    const int first = blockIdx.y * kSlice, chunks = min(kSlice, p.chunks - first);
    const int stride = gridDim.x * warps;
    int tile = blockIdx.x * warps + warp;

    Work work(p, dynamic_shared<uint4>() + warp * kWarpCodes, first, chunks, tile);
    allow_next_kernel();
    wait_for_previous_kernel();
    if (p.call.norm_kind != Norm::none || p.call.delta) sum_moments<T>(p, moments);
    const int staged = (chunks + Work::kSpan - 1) / Work::kSpan * Work::kSpan;  // zeros beyond K
    stage_x<T, Work::kWeights>(p, x, moments, first, staged);
    __syncthreads();
    if (Work::kSums) sum_x<T, Work::kSteps>(x, column, staged, x_sums);

    for (; tile < p.tiles; tile += stride) {
        float sums[4] = {};
        work.multiply(x, column, x_sums, tile, tile + stride, sums);
        finish_tile<T>(p, tile, sums);
    }
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

int chunks_of(const w4::Matrix& w) {
    return static_cast<int>(w4::ceil_div(w.k, chunk_weights(w.bits)));
}

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument("w4_matmul: " + message);
}

int slices_of(const w4::Matrix& w) { return static_cast<int>(w4::ceil_div(w.k, kW4SliceColumns)); }

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
    require(w.k <= INT32_MAX / 2 && w.n <= INT32_MAX / w.groups() &&
                w.n <= INT32_MAX / (chunks_of(w) * (kChunkBytes / 16)),
            "the weight matrix is too large");
    require(call.type != ScaleType::float32, "products must be of float16 or bfloat16");
    for (const ScaleType type : {call.x_type, call.y_type})
        require(type == call.type || type == ScaleType::float32,
                "x and y must have the type of products or float32");
    require(!call.delta || (call.post && call.stream), "delta needs post and stream");
    require(call.norm_kind == Norm::none || call.norm, "a norm needs its weights");
    require(!call.gated || w.n % 2 == 0, "gated weights must have an even number of rows");
    require(call.ranges >= 1, "ranges must be 1 or more, found " + std::to_string(call.ranges));
    require(slices_of(w) == 1 || (call.parts && call.counters), "slices need parts and counters");
    require(!call.sums || (call.norm_kind != Norm::none && !call.delta && call.sum_parts >= 1),
            "sums need a norm, and no delta");
    require(divides(16, w.codes), "codes must lie on a multiple of 16 bytes");
}

int bytes_of(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

Params derive(const W4Matmul& call) {
    const w4::Matrix& w = call.weights;
    const int width = chunk_weights(w.bits), steps = width / kStep;
    Params p{};
    p.call = call;
    p.tiles =
        static_cast<int>(call.gated ? w4::ceil_div(w.n / 2, kTile / 2) : w4::ceil_div(w.n, kTile));
    p.chunks = chunks_of(w);
    p.groups = static_cast<int>(w.groups());
    p.supers = static_cast<int>(w4::ceil_div(w.k, w4::kSuper));

    p.group_shift = -31;  // the row is one group
    if (w.group)
        for (int shift = -1; shift <= 3; ++shift)
            if ((shift < 0 ? w.group >> -shift : w.group << shift) == width) p.group_shift = shift;
    p.group_chunks = std::max(-p.group_shift, 0);
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
    const Params p = derive(call);
    const int warps = std::min(kMaxWarps, p.tiles);
    Launch where{};
    where.grid = dim3(call.ranges, slices_of(w));
    where.block = static_cast<unsigned>(32 * warps);
    where.shared_bytes = warps * kWarpCodes * sizeof(uint4);
    where.max_shared_bytes = kMaxSharedBytes;
    where.stream = static_cast<cudaStream_t>(stream);
    where.overlap = call.overlap != 0;
    launch(where,
           call.type == ScaleType::float16 ? kernel_for<__half>(w) : kernel_for<__nv_bfloat16>(w),
           p);
}

}  // namespace shallow
