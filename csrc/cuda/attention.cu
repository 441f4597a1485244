// Decode attention on tensor cores: a block takes a sequence, the query heads that share a key, and a
// part of the pages of the context (flash-decoding); its warps take 16 positions at a time.
//
// The queries of the group are the 16 rows of an mma. Sums over E may run in any order, so a lane
// loads 16 bytes of a key, 8 neighbours, for two steps of the mma; columns of the output may lie in
// any order, so it loads 16 bytes of 4 positions' values and pairs them in registers. Nothing of the
// cache goes through shared memory; a warp's keys of its next positions fly while it mixes values.
//
// The first part's block also has the token's own key and value, which it appends, and adds it last.
// Parts meet in a scratch buffer: who comes last, by a counter that it sets back, joins them.
#include "cuda/attention.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/attention_heads.h"
#include "cuda/attention_tile.h"
#include "cuda/kernel.h"

namespace shallow {
namespace {

constexpr int kAttentionWarps = 4;
constexpr int kRows = kMaxQueries;
constexpr int kKey = kRows, kValue = kRows + 1;  // the token's own, behind the queries

// A block's, in shared memory.
template <int WIDTH>
struct Memory {
    static constexpr int kStride = WIDTH / 8 + 4;  // so that rows of a quarter warp's load differ
    Shared<uint4, (kRows + 2) * kStride> heads;
    Shared<float, 2 * (kRows + 1)> moments;               // mean and 1 / deviation
    Shared<float, kAttentionWarps * kRows> tops, totals;  // of each warp's softmax
    Shared<float, kRows> own;                             // the token's scores
    Shared<float, kRows> top, total;                      // of the block's
    Shared<float, kRows * WIDTH> mixed;                   // by row and column
    Shared<float, kRows * kMaxSplits> weights;            // of parts
    Shared<int, 1> arrived;
};

// Which part of the launch a block is.
struct Part {
    __device__ explicit Part(const DecodeAttention& call)
        : b(blockIdx.x), group(blockIdx.y), split(blockIdx.z), repeats(call.heads / call.kv_heads),
          position(call.positions[b]), table(call.table + std::int64_t{b} * call.table_width) {
        const int oldest = call.window ? max(position + 1 - call.window, 0) : 0;
        const int first = oldest / call.page;
        const int pages = (position + call.page - 1) / call.page - first;
        begin = first + split * pages / call.splits;
        end = first + (split + 1) * pages / call.splits;
    }

    __device__ bool owns() const { return split == 0; }  // the token's key and value

    int b, group, split, repeats, position;
    const std::int32_t* table;
    int begin, end;  // pages
};

// Position `offset` of a page: keys, or with `plane` 1 values.
template <typename T>
__device__ T* place_of(const DecodeAttention& call, int page, int group, int plane, int offset) {
    const std::int64_t slot = std::int64_t{page} * call.slots + call.slot;
    const std::int64_t row = ((slot * 2 + plane) * call.kv_heads + group) * call.page + offset;
    return static_cast<T*>(call.store) + row * call.width;
}

// Puts queries, and where the block has them the token's key and value, into shared memory, and
// these two into their page.
template <typename T, int WIDTH>
__device__ void stage_heads(const DecodeAttention& call, const Part& part, Memory<WIDTH>& memory) {
    const int width = call.width, all = call.heads + 2 * call.kv_heads;
    const T* token = static_cast<const T*>(call.qkv) + std::int64_t{part.b} * all * width;
    const T* first_key = token + call.heads * width;
    const T* value = first_key + (call.kv_heads + part.group) * width;
    const float* angles = call.angles + std::int64_t{part.position} * call.rope;
    const Heads<T> queries{call,        token, part.group * part.repeats, call.heads, call.q_norm,
                           call.q_bias, angles};
    const Heads<T> keys{call,        first_key,   part.group, call.kv_heads,
                        call.k_norm, call.k_bias, angles};
    if (call.scope != Scope::none) {
        const int warp = threadIdx.x / 32;
        for (int row = warp; row < part.repeats; row += kAttentionWarps)
            queries.measure(row, memory.moments, 2 * row);
        if (part.owns() && warp == kAttentionWarps - 1) keys.measure(0, memory.moments, 2 * kKey);
        __syncthreads();
    }
    for (int i = threadIdx.x; i < (kRows + 2) * (WIDTH / 8); i += blockDim.x) {
        const int row = i / (WIDTH / 8), e = i % (WIDTH / 8) * 8;
        const bool own = part.owns() && row >= kKey;
        uint4 bits{};
        if (row < part.repeats || (own && row == kKey)) {
            float mean = 0, scale = 1;
            if (call.scope != Scope::none) {
                mean = memory.moments[2 * row];
                scale = memory.moments[2 * row + 1];
            }
            bits = narrow_eight<T>(row == kKey ? keys.rotated(0, e, mean, scale)
                                               : queries.rotated(row, e, mean, scale));
        } else if (own) {
            bits = load_eight(value, e, width, false);
        }
        memory.heads[row * memory.kStride + e / 8] = bits;
        if (own)
            store_eight(place_of<T>(call, part.table[part.position / call.page], part.group,
                                    row - kKey, part.position % call.page),
                        e, width, bits);
    }
    __syncthreads();
}

// Scores of the token's own key.
template <typename T, int WIDTH>
__device__ void score_own(const DecodeAttention& call, const Part& part, Memory<WIDTH>& memory) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < part.repeats; row += kAttentionWarps) {
        float sum = 0;
        if (lane < WIDTH / 8)
            sum = product_of<T>(memory.heads[row * memory.kStride + lane],
                                memory.heads[kKey * memory.kStride + lane]);
        sum = warp_sum(sum);
        if (lane == 0) memory.own[row] = capped(sum * call.scale, call.cap);
    }
}

// A warp's share of the positions before the token.
template <typename T, int WIDTH>
__device__ void attend(const DecodeAttention& call, const Part& part, Memory<WIDTH>& memory,
                       Tile<T, WIDTH>& tile) {
    const int tiles = call.page / kTilePositions, end = part.end * tiles;
    const auto at = [&](int number, int plane) {
        return place_of<const T>(call, part.table[number / tiles], part.group, plane,
                                 number % tiles * kTilePositions);
    };
    int number = part.begin * tiles + threadIdx.x / 32;
    if (number < end) tile.load_keys(at(number, 0));
    for (; number < end; number += kAttentionWarps) {
        float scores[2][4] = {};
        tile.multiply(memory.heads, memory.kStride, scores);
        if (number + kAttentionWarps < end) tile.load_keys(at(number + kAttentionWarps, 0));
        for (int i = 0; i < 8; ++i) {
            const int place = number * kTilePositions + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
            const bool seen =
                place < part.position && (!call.window || place > part.position - call.window);
            float& score = scores[i / 4][i % 4];
            score = seen ? capped(score * call.scale, call.cap) : -INFINITY;
        }
        tile.mix(scores, at(number, 1));
    }
    tile.finish();
}

// Adds up the warps' and the token's own: `mixed`, not yet divided by `total`.
template <typename T, int WIDTH>
__device__ void join_warps(const Part& part, Memory<WIDTH>& memory, const Tile<T, WIDTH>& tile) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    if (threadIdx.x % 4 == 0)
        for (int r = 0; r < 2; ++r) {
            memory.tops[warp * kRows + g + 8 * r] = tile.top[r];
            memory.totals[warp * kRows + g + 8 * r] = tile.total[r];
        }
    __syncthreads();
    if (const int row = threadIdx.x; row < part.repeats) {
        const float own = part.owns() ? static_cast<float>(memory.own[row]) : -INFINITY;
        float top = own;
        for (int w = 0; w < kAttentionWarps; ++w) top = fmaxf(top, memory.tops[w * kRows + row]);
        float total = shrunk(own, top);
        for (int w = 0; w < kAttentionWarps; ++w)
            total += memory.totals[w * kRows + row] * shrunk(memory.tops[w * kRows + row], top);
        memory.top[row] = top;
        memory.total[row] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < part.repeats * WIDTH; i += blockDim.x) {
        const int row = i / WIDTH, e = i % WIDTH;
        float sum = 0;
        if (part.owns())
            sum = shrunk(memory.own[row], memory.top[row]) *
                  element_of<T>(memory.heads[kValue * memory.kStride + e / 8], e % 8);
        memory.mixed[i] = sum;
    }
    for (int w = 0; w < kAttentionWarps; ++w) {  // one after another: the same sums every time
        __syncthreads();
        if (w != warp) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = g + 8 * r;
            if (row >= part.repeats) continue;
            const float weight = shrunk(tile.top[r], memory.top[row]);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n)
                for (int i = 2 * r; i < 2 * r + 2; ++i)
                    memory.mixed[row * WIDTH + tile.column(n, i)] += weight * tile.mixed[n][i];
        }
    }
    __syncthreads();
}

// A part's sums (R, E), tops (R,) and totals (R,), and whether it was the last to arrive.
template <int WIDTH>
__device__ bool hand_over(const DecodeAttention& call, const Part& part, Memory<WIDTH>& memory,
                          float* own, std::int32_t* counter) {
    const int tail = part.repeats * call.width;
    for (int i = threadIdx.x; i < tail; i += blockDim.x)
        own[i] = memory.mixed[i / call.width * WIDTH + i % call.width];
    if (const int row = threadIdx.x; row < part.repeats) {
        own[tail + row] = memory.top[row];
        own[tail + part.repeats + row] = memory.total[row];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        memory.arrived[0] = atomicAdd(counter, 1);
        if (memory.arrived[0] == call.splits - 1) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return memory.arrived[0] == call.splits - 1;
}

// The sums of all parts, divided by their totals, to y (R, E).
template <typename T, int WIDTH>
__device__ void join_parts(const DecodeAttention& call, const Part& part, Memory<WIDTH>& memory,
                           const float* parts, int stride, T* y) {
    const int tail = part.repeats * call.width;
    if (const int row = threadIdx.x; row < part.repeats) {
        const float *tops = parts + tail + row, *totals = tops + part.repeats;
        float top = -INFINITY, total = 0;
        for (int s = 0; s < call.splits; ++s) top = fmaxf(top, __ldcg(tops + s * stride));
        for (int s = 0; s < call.splits; ++s) {
            const float weight = shrunk(__ldcg(tops + s * stride), top);
            memory.weights[row * kMaxSplits + s] = weight;
            total += weight * __ldcg(totals + s * stride);
        }
        memory.total[row] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tail; i += blockDim.x) {
        const int row = i / call.width;
        float sum = 0;
#pragma unroll 4
        for (int s = 0; s < call.splits; ++s)
            sum += memory.weights[row * kMaxSplits + s] * __ldcg(parts + s * stride + i);
        narrow(y[i], sum / memory.total[row]);
    }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(32 * kAttentionWarps, WIDTH > 128 ? 2 : 3)
    attention_kernel(const __grid_constant__ DecodeAttention call) {
    __shared__ Memory<WIDTH> memory;
    allow_next_kernel();
    wait_for_previous_kernel();
    if (!call.live[blockIdx.x]) return;
    const Part part(call);
    stage_heads<T>(call, part, memory);
    if (part.owns()) score_own<T>(call, part, memory);
    Tile<T, WIDTH> tile(call.width, call.width % 8 == 0);
    attend(call, part, memory, tile);
    join_warps(part, memory, tile);

    const std::int64_t pair = std::int64_t{part.b} * call.kv_heads + part.group;
    T* y = static_cast<T*>(call.y) + pair * part.repeats * call.width;
    if (call.splits > 1) {
        const int stride = part.repeats * (call.width + 2);
        float* parts = call.parts + pair * call.splits * stride;
        if (hand_over(call, part, memory, parts + part.split * stride, call.counters + pair))
            join_parts(call, part, memory, parts, stride, y);
        return;
    }
    for (int i = threadIdx.x; i < part.repeats * call.width; i += blockDim.x) {
        const int row = i / call.width;
        narrow(y[i], memory.mixed[row * WIDTH + i % call.width] / memory.total[row]);
    }
}

// ---- the launch ----

using AttentionKernel = void (*)(DecodeAttention);

template <typename T>
AttentionKernel kernel_of(int width) {
    return width <= 64    ? attention_kernel<T, 64>
           : width <= 128 ? attention_kernel<T, 128>
                          : attention_kernel<T, kMaxHeadWidth>;
}

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument("decode_attention: " + message);
}

void check_arguments(const DecodeAttention& call) {
    require(call.batch >= 1, "a launch needs a sequence");
    require(call.kv_heads >= 1 && call.heads % call.kv_heads == 0,
            "query heads must be a multiple of those of keys");
    require(
        call.heads / call.kv_heads <= kMaxQueries,
        "at most 16 query heads share a key, found " + std::to_string(call.heads / call.kv_heads));
    require(call.width >= 1 && call.width <= kMaxHeadWidth,
            "heads must be 1 to 256 wide, found " + std::to_string(call.width));
    require(call.page >= kTilePositions && call.page % kTilePositions == 0,
            "pages must hold a multiple of 16 positions, found " + std::to_string(call.page));
    require(call.slot >= 0 && call.slot < call.slots, "there is no such slot");
    require(call.rope >= 0 && call.rope % 2 == 0 && call.rope <= call.width,
            "rope must be an even part of a head, found " + std::to_string(call.rope));
    require(!call.rope || call.angles, "a rotation needs its angles");
    require(call.window >= 0, "window must be 0 or more");
    require(call.splits >= 1 && call.splits <= kMaxSplits,
            "splits must be 1 to 32, found " + std::to_string(call.splits));
    require(call.splits == 1 || (call.parts && call.counters), "splits need parts and counters");
    require(
        call.scope == Scope::none || (call.q_norm && call.k_norm && call.norm_kind != Norm::none),
        "a norm needs its weights");
    require(call.type != w4::ScaleType::float32, "type must be float16 or bfloat16");
    require(call.width % 8 || reinterpret_cast<std::uintptr_t>(call.store) % 16 == 0,
            "store must lie on a multiple of 16 bytes");
}

}  // namespace

void prepare_decode_attention() {
    for (const int width : {64, 128, kMaxHeadWidth})
        for (const AttentionKernel kernel :
             {kernel_of<__half>(width), kernel_of<__nv_bfloat16>(width)})
            prepare(reinterpret_cast<const void*>(kernel), 0);
}

void decode_attention(const DecodeAttention& call, void* stream) {
    check_arguments(call);
    Launch where{};
    where.grid = dim3(call.batch, call.kv_heads, call.splits);
    where.block = 32 * kAttentionWarps;
    where.stream = static_cast<cudaStream_t>(stream);
    where.overlap = call.overlap != 0;
    const bool half = call.type == w4::ScaleType::float16;
    launch(where, half ? kernel_of<__half>(call.width) : kernel_of<__nv_bfloat16>(call.width),
           call);
}

}  // namespace shallow
