#include "cpu/w4_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/threads.h"

namespace shallow {
namespace {

constexpr int64_t kManyRows = 32;                // from here on unpacking a tile pays
constexpr int64_t kThreadBytes = 32 << 10;       // of weights: less is not worth another thread
constexpr int64_t kCacheBytes = 1 << 20;         // of L2 for the activations that all tiles meet
constexpr int64_t kSumsBytes = 512 << 10;        // of L2 for sums that wait for the next columns
constexpr int64_t kManyRowsLimit = 512;          // prepared at a time

enum class Path { int8, exact, bfloat };

int64_t element_bytes(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

int64_t line_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Grows, never shrinks; one a calling thread.
uint8_t* workspace(int64_t bytes) {
    thread_local Memory memory;
    if (static_cast<int64_t>(memory.size()) < bytes) {
        memory = Memory();
        memory = Memory(static_cast<std::size_t>(bytes));
    }
    return memory.data();
}

// Parts of the workspace, handed out in order; first measured with a null base.
struct Cutter {
    uint8_t* base;
    int64_t used = 0;

    template <class T>
    T* cut(int64_t count) {
        T* const part = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += line_up(count * static_cast<int64_t>(sizeof(T)));
        return part;
    }
};

struct Plan {
    int64_t step;           // tiles that a thread claims at a time; 0: fewer and fewer
    int64_t scratch_bytes;  // a thread
    uint8_t *gathered, *scratch;
    Int8Input int8{};
    FloatInput wide{};
    BfloatInput narrow{};

    Plan(Cutter cutter, const Rows& x, const TileView& w, Path path, bool gather, int threads) {
        const int64_t panel = std::min<int64_t>(x.m, kPanelRows);
        const int64_t columns = w.blocks * kBlock, rows = w4::ceil_div(x.m, panel) * panel;
        step = 0;
        scratch_bytes = 0;
        gathered = gather ? cutter.cut<uint8_t>(x.m * x.k * element_bytes(x.type)) : nullptr;
        if (path == Path::exact) {
            wide = {cutter.cut<float>(rows * columns), x.m, panel};
        } else if (path == Path::int8) {
            const int64_t plane = rows * w.blocks;
            int8 = {cutter.cut<int8_t>(2 * plane * kBlock), cutter.cut<float>(2 * plane),
                    cutter.cut<float>(rows * w.groups), x.m, panel, plane, true};
            if (x.m >= kManyRows)
                scratch_bytes = line_up(columns * kTileRows + w.groups * 2 * kTileRows * 4);
        } else {
            const int64_t stride = bfloat_stride(w.blocks);
            narrow = {cutter.cut<std::uint16_t>(w4::ceil_div(x.m, kPanelRows) * stride), x.m, stride};
            const int64_t fair = w4::ceil_div(w.tiles, threads * 4);
            step = std::clamp<int64_t>(kSumsBytes / (x.m * kTileRows * 4), 2, fair + fair % 2);
            step -= step % 2;
            scratch_bytes = bfloat_scratch_bytes(x.m, step);
        }
        scratch = scratch_bytes ? cutter.cut<uint8_t>(scratch_bytes * threads) : nullptr;
        bytes = cutter.used;
    }
    int64_t bytes;
};

void gather_row(const Rows& x, const int32_t* perm, int64_t row, uint8_t* to) {
    const int64_t size = element_bytes(x.type);
    const uint8_t* const from = static_cast<const uint8_t*>(x.data) + row * x.stride * size;
    for (int64_t j = 0; j < x.k; ++j)
        std::memcpy(to + (row * x.k + j) * size, from + perm[j] * size,
                    static_cast<std::size_t>(size));
}

int useful_threads(const TileView& w, int64_t m, int threads) {
    const int64_t work = w.tiles * w.tile_bytes * w4::ceil_div(m, 4);
    return static_cast<int>(std::clamp<int64_t>(work / kThreadBytes, 1, threads));
}

struct Call {
    Rows x;
    const TiledMatrix& matrix;
    Output y;
    const Kernels& kernels;
    Path path;

    void prepare(const Plan& plan, int64_t panel) const {
        Rows input = x;
        if (const int32_t* const perm = matrix.perm()) {
            const int64_t end = std::min((panel + 1) * kPanelRows, x.m);
            for (int64_t row = panel * kPanelRows; row < end; ++row)
                gather_row(x, perm, row, plan.gathered);
            input.data = plan.gathered;
            input.stride = x.k;
        }
        const TileView& w = matrix.view();
        if (path == Path::int8) kernels.quantise(input, w, plan.int8, panel);
        if (path == Path::exact) kernels.widen(input, w, plan.wide, panel);
        if (path == Path::bfloat) kernels.narrow(input, w, plan.narrow, panel);
    }
    void multiply(const Plan& plan, int64_t begin, int64_t end, int thread) const {
        const TileView& w = matrix.view();
        uint8_t* const scratch =
            plan.scratch ? plan.scratch + thread * plan.scratch_bytes : nullptr;
        if (path == Path::int8) kernels.int8_tiles(w, plan.int8, y, begin, end, scratch);
        if (path == Path::exact) kernels.float_tiles(w, plan.wide, y, begin, end);
        if (path == Path::bfloat)
            kernels.bfloat_tiles(w, plan.narrow, y, begin, end, scratch);
    }
    void run(int threads) const {
        const TileView& w = matrix.view();
        threads = useful_threads(w, x.m, threads);
        const bool gather = matrix.perm();
        const Plan sizes(Cutter{nullptr}, x, w, path, gather, threads);
        const Plan plan(Cutter{workspace(sizes.bytes)}, x, w, path, gather, threads);
        const int64_t panels = w4::ceil_div(x.m, kPanelRows);
        std::atomic<int64_t> next{0};
        Barrier ready;
        Pool::instance().run(threads, [&](int thread, int count) {
            for (int64_t panel = thread; panel < panels; panel += count) prepare(plan, panel);
            ready.wait(count);
            for (int64_t tile = next; tile < w.tiles; tile = next) {
                // Half of a fair share of what is left: long streams, and threads end together.
                const int64_t fair = std::max<int64_t>(2, (w.tiles - tile) / (2 * count));
                const int64_t end = std::min(w.tiles, tile + (plan.step ? plan.step : fair));
                if (next.compare_exchange_strong(tile, end)) multiply(plan, tile, end, thread);
            }
        });
    }
};

Path choose(const TileView& w, int64_t m, Mode mode, const Kernels& kernels) {
    if (mode == Mode::exact || w.kind == Codes::float32) return Path::exact;
    if (kernels.bfloat_tiles && m >= kManyRows) return Path::bfloat;
    const bool plain = w.kind == Codes::float16 || w.kind == Codes::bfloat16;
    const bool coarse = w.kind == Codes::nibble_table && w.values8_step == 0;
    return plain || coarse ? Path::exact : Path::int8;
}

// Rows of x prepared at a time. Every tile meets all of int8 rows: they should stay in the cache.
int64_t rows_at_a_time(const TileView& w, Path path) {
    if (path != Path::int8) return kManyRowsLimit;
    const int64_t fitting = kCacheBytes / (w.blocks * kBlock) / kPanelRows * kPanelRows;
    return std::max<int64_t>(fitting, 4 * kPanelRows);
}

}  // namespace

const Kernels& kernels(Isa isa) {
    if (!isa_supported(isa))
        throw std::invalid_argument(std::string("this processor does not run ") + isa_name(isa));
#if defined(SHALLOW_X86)
    switch (isa) {
        case Isa::generic: break;
        case Isa::avx2: return kKernelsAvx2;
        case Isa::avxvnni: return kKernelsAvxvnni;
        case Isa::avx512: return kKernelsAvx512;
        case Isa::amx: return kKernelsAmx;
    }
#endif
    return kKernelsGeneric;
}

void matmul(const Rows& x, const TiledMatrix& matrix, const Output& y, Mode mode, Isa isa,
            int threads) {
    const Kernels& chosen = kernels(isa);
    const Path path = choose(matrix.view(), x.m, mode, chosen);
    const int64_t rows = rows_at_a_time(matrix.view(), path);
    threads = std::clamp(threads, 1, Pool::instance().size());
    for (int64_t row = 0; row < x.m; row += rows) {
        Call call{x, matrix, y, chosen, path};
        call.x.m = std::min(rows, x.m - row);
        call.x.data =
            static_cast<const uint8_t*>(x.data) + row * x.stride * element_bytes(x.type);
        call.y.data = static_cast<uint8_t*>(y.data) + row * y.stride * element_bytes(y.type);
        call.run(threads);
    }
}

}  // namespace shallow
