// What the matmul planner promises, as assertions; test_matmul_plan.py compiles and runs it.
#undef NDEBUG
#include "cpu/plan.h"
#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <thread>
#include <vector>

using namespace shallow;

namespace {

constexpr std::int64_t kRowCounts[] = {1, 8, 15, 16, 17, 31, 32, 33, 512};

TileView view(Codes kind, std::int64_t k, std::int64_t group) {
    TileView w{};
    w.kind = kind;
    w.values8_step = 1;
    w.k = k;
    w.blocks = w4::ceil_div(k, kBlock);
    w.group_blocks = group / kBlock;
    w.groups = w.group_blocks ? w4::ceil_div(w.blocks, w.group_blocks) : 2 * w.blocks;
    w.tile_bytes = w.blocks * kBlock * kTileRows / 2;  // codes alone
    return w;
}

void paths() {
    Kernels vectors{}, tiles{}, words{};
    words.int16_tiles = [](const TileView&, const Int16Input&, const Output&, std::int64_t,
                           std::int64_t, std::uint8_t*) {};
    tiles.bfloat_tiles = [](const TileView&, const BfloatInput&, const Output&, std::int64_t,
                            std::int64_t, std::uint8_t*) {};
    TileView coarse = view(Codes::nibble_table, 64, 32);
    coarse.values8_step = 0;
    for (const Codes kind : {Codes::nibble, Codes::nibble_table, Codes::byte}) {
        const TileView w = view(kind, 64, 32);
        assert(choose_path(w, 1, Mode::int8, tiles) == Path::int8);
        assert(choose_path(w, kManyRows - 1, Mode::int8, tiles) == Path::int8);
        assert(choose_path(w, kManyRows, Mode::int8, tiles) == Path::bfloat);
        assert(choose_path(w, kManyRows, Mode::int8, vectors) == Path::int8);
        assert(choose_path(w, kManyRows, Mode::exact, tiles) == Path::exact);
        const Path by_words = kind == Codes::nibble ? Path::int8 : Path::int16;
        for (const std::int64_t m : {std::int64_t{1}, kManyRows})
            assert(choose_path(w, m, Mode::int8, words) == by_words);
        assert(choose_path(w, 1, Mode::exact, words) == Path::exact);
    }
    for (const TileView& w :
         {coarse, view(Codes::float16, 64, 64), view(Codes::bfloat16, 64, 64)}) {
        assert(choose_path(w, 1, Mode::int8, tiles) == Path::exact);
        assert(choose_path(w, 1, Mode::int8, words) == Path::exact);
        assert(choose_path(w, kManyRows, Mode::int8, tiles) == Path::bfloat);
    }
    assert(choose_path(view(Codes::float32, 64, 64), 512, Mode::int8, tiles) == Path::exact);
}

alignas(64) std::uint8_t memory[1 << 20];
std::vector<int> hits;  // of the bytes of a form

void hit(const void* at, std::int64_t bytes) {
    const auto first = static_cast<std::size_t>(static_cast<const std::uint8_t*>(at) - memory);
    for (std::size_t i = 0; i < static_cast<std::size_t>(bytes); ++i) ++hits.at(first + i);
}

// Every row and block that is written lies in the form, where nothing else is written.
void forms() {
    Kernels kernels{};
    kernels.write_float = [](const Rows&, const FloatInput& to) {
        for (int j = 0; j < kBlock; ++j) hit(to.values + j * to.panel, 4);
    };
    kernels.write_int8 = [](const Rows&, const Int8Input& to) {
        for (const std::int64_t plane : {std::int64_t{0}, to.plane}) {
            hit(to.q + plane * kBlock, kBlock);
            hit(to.scales + plane, 4);
        }
        for (int half = 0; half < (to.group_blocks ? 1 : 2); ++half)
            hit(to.sums + half * to.panel, 4);
    };
    kernels.write_int16 = [](const Rows&, const Int16Input& to) {
        hit(to.q, 2 * kBlock);
        hit(to.scales, 4);
        for (int half = 0; half < (to.group_blocks ? 1 : 2); ++half)
            hit(to.sums + half * to.panel, 4);
    };
    Rows x{};
    x.m = 1;
    x.k = kBlock;
    for (const Path path : {Path::exact, Path::int8, Path::int16})
        for (const std::int64_t group : {16, 32})
            for (const std::int64_t m : kRowCounts) {
                const TileView w = view(Codes::nibble, 90, group);
                const Form form(w, path, m, true);
                assert(form.nbytes() <= static_cast<std::int64_t>(sizeof memory));
                hits.assign(static_cast<std::size_t>(form.nbytes()), 0);
                for (std::int64_t row = 0; row < m; ++row)
                    for (std::int64_t b = 0; b < w.blocks; ++b)
                        form.write(kernels, x, memory, row, b * kBlock);
                for (const int count : hits) assert(count <= 1);
            }
}

void claims() {
    const TileView w = view(Codes::nibble, 576, 32);
    for (std::int64_t m : kRowCounts)
        for (const std::int64_t tiles : {1, 2, 5, 36, 3072})
            for (const int threads : {1, 2, 7}) {
                const Form tile(w, Path::bfloat, m, true), row(w, Path::int8, m, true);
                const std::int64_t pairs = tile.claim(tiles, threads);
                assert(pairs >= 2 && pairs % 2 == 0);
                assert(tile.scratch_bytes(w, pairs) > 0);
                assert(row.claim(tiles, threads) == 0);
                assert((row.scratch_bytes(w, 0) > 0) == (m >= kManyRows));
            }
    for (const std::int64_t k : {32, 576, 8192, 65536, 1 << 20}) {
        const TileView wide = view(Codes::nibble, k, 32);
        const std::int64_t some = tiles_together(wide);
        assert(some == 4 || (some >= 1 && k > 8192));
        const std::int64_t unpacked = (k + wide.groups * 2 * 4) * kTileRows;  // with its parameters
        for (const Path path : {Path::int8, Path::int16})
            assert(Form(wide, path, kManyRows, true).scratch_bytes(wide, 1) >= unpacked);
    }
    assert(rows_within(1, 1 << 20) == 64 && rows_within(1 << 30, 1) == 512);
    assert(rows_within(100 * 4096, 4096) == 96);
}

// A thread that comes alone claims every unit once: of its own share `first` at once, the rest of it from
// the front, then the others' from behind, by halves of what is left.
void shares_of_one() {
    for (const std::int64_t count : {1, 2, 5, 36, 3072})
        for (const int threads : {1, 2, 7})
            for (const std::int64_t sixteenths : {0, 14, 15, 16})
                for (int thread = 0; thread < threads; ++thread) {
                    const std::int64_t first = w4::ceil_div(count * sixteenths / 16, threads);
                    const std::int64_t begin = count * thread / threads;
                    const std::int64_t end = count * (thread + 1) / threads;
                    Queue queue(threads);
                    std::vector<int> claimed(static_cast<std::size_t>(count));
                    std::int64_t front = begin, left = end - begin;
                    const auto claim = [&](std::int64_t from, std::int64_t to) {
                        assert(from < to && to <= count);
                        for (std::int64_t i = from; i < to; ++i) ++claimed[i];
                        if (front == end) return;  // it takes from others
                        const bool begins = front == begin && first > 0;
                        assert(from == front);
                        assert(to - from == (begins ? std::min(first, left)
                                                    : std::max<std::int64_t>(1, left / 2)));
                        front = to;
                        left -= to - from;
                    };
                    queue.take_shares(count, thread, threads, first, claim);
                    assert(front == end);
                    const bool whole = first * threads >= count;
                    for (std::int64_t i = 0; i < count; ++i)
                        assert(claimed[i] == (!whole || (i >= begin && i < end)));
                }
    Queue queue(2);  // of 12 each
    std::vector<std::int64_t> ends;
    queue.take_shares(24, 0, 2, 12 * 14 / 16, [&](std::int64_t from, std::int64_t to) {
        if (from >= 12) ends.push_back(to);
    });
    assert((ends == std::vector<std::int64_t>{24, 18, 15, 14, 13}));
}

// Threads that come together claim every unit once, whoever is held up, and again after a reset.
void shares_of_all() {
    for (const int threads : {2, 3, 8})
        for (const std::int64_t count : {1, 7, 257})
            for (const std::int64_t sixteenths : {0, 14, 16}) {
                Queue queue(threads);
                for (int held = 0; held < threads; ++held) {
                    std::vector<std::atomic<int>> claimed(static_cast<std::size_t>(count));
                    std::vector<std::thread> all;
                    for (int thread = 0; thread < threads; ++thread)
                        all.emplace_back([&, thread] {
                            queue.take_shares(count, thread, threads,
                                              w4::ceil_div(count * sixteenths / 16, threads),
                                              [&](std::int64_t from, std::int64_t to) {
                                                  if (thread == held) std::this_thread::yield();
                                                  for (; from < to; ++from) ++claimed[from];
                                              });
                        });
                    for (auto& thread : all) thread.join();
                    for (const auto& times : claimed) assert(times == 1);
                    for (int thread = 0; thread < threads; ++thread) queue.reset(thread);
                }
            }
}

}  // namespace

int main() {
    paths();
    forms();
    claims();
    shares_of_one();
    shares_of_all();
}
