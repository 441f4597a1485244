// The matmul planner: by which path a matrix multiplies rows of x, in what form it reads them, and
// how memory and work are divided. The matmul of its own and the decoder's products follow it.
// defines: Path choose_path tells_largest Form rows_within rows_at_once useful_threads
//          first_share gather line_up Cutter
#pragma once

#include <cstdint>

#include "cpu/sanitize.h"
#include "cpu/w4_matmul.h"

namespace shallow {

enum class Path { int8, int16, exact, bfloat, bounds };  // the kernels of these names, see Kernels

Path choose_path(const TileView& w, std::int64_t m, Mode mode, const Kernels& kernels);
// Do bounds of a matrix's products tell where the largest is, in less time than the products take?
bool tells_largest(const TileView& w, Mode mode, const Kernels& kernels);

// m rows of activations as the kernels of a path read them for `like`, and for any matrix with its
// columns and groups.
struct Form {
    Path path;
    bool fine;              // int8: the coarsest blocks in two planes, see Int8Input
    std::int64_t m, panel;  // rows of x; rows of a panel
    std::int64_t rows;      // m up to whole panels
    std::int64_t blocks, groups, group_blocks;

    Form(const TileView& like, Path path, std::int64_t m, bool fine);

    std::int64_t nbytes() const;  // whole cache lines
    // Writes x, which lies in one panel, as the rows from `row` and the columns from `column` on, the
    // latter where a block and a group begin. bfloat: a whole panel. Threads may write different
    // rows and columns at once.
    void write(const Kernels& kernels, const Rows& x, std::uint8_t* base, std::int64_t row,
               std::int64_t column) const;

    // Tiles for a thread to claim at a time; 0: a share of what is left, so that threads end
    // together on cores that others slow down.
    std::int64_t claim(std::int64_t tiles, int threads) const;
    std::int64_t scratch_bytes(const TileView& w, std::int64_t claim) const;  // a thread
    // Tiles begin..end-1 of y, a claim at most.
    void multiply(const Kernels& kernels, const TileView& w, std::uint8_t* base, const Output& y,
                  std::int64_t begin, std::int64_t end, std::uint8_t* scratch) const;
    // The same of row `row` of x alone, by int16.
    void multiply_row(const Kernels& kernels, const TileView& w, std::uint8_t* base,
                      std::int64_t row, const Output& y, std::int64_t begin,
                      std::int64_t end) const;

private:
    template <class T>
    IntInput<T> ints(std::uint8_t* base) const;
    // As seen from a row and, where a block and a group begin, a column on.
    template <class T>
    IntInput<T> ints_from(std::uint8_t* base, std::int64_t row, std::int64_t column) const;
    FloatInput wide(std::uint8_t* base) const;
    BfloatInput bfloat(std::uint8_t* base) const;
};

// Whole panels of rows that fit into `bytes`, but 64 to 512. All meet a tile that is unpacked once:
// a prefill by 256 or 384 tokens is 2-4 % slower than by 512 (benchmarks/results/decoder.md).
std::int64_t rows_within(std::int64_t bytes, std::int64_t row_bytes);
std::int64_t rows_at_once(const TileView& w, Path path);  // of a matmul of its own
int useful_threads(const TileView& w, std::int64_t m, int threads);
// How many of a product's units, whose weights take `bytes` in all, each thread takes at once; then half
// of a fair share of what is left, again and again.
std::int64_t first_share(std::int64_t units, std::int64_t m, std::int64_t bytes, int threads);

// The columns of x in the order `perm`, written to `to`, rows x.k apart.
Rows gather(const Rows& x, const std::int32_t* perm, void* to);

constexpr std::int64_t line_up(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Parts of a buffer in whole cache lines, handed out in order; only counts where base is null.
// `gap` bytes behind each, and what fills its last line, are forbidden to whoever uses it.
struct Cutter {
    std::uint8_t* base;
    std::int64_t used = 0;
    std::int64_t gap = 0;

    template <class T>
    T* cut(std::int64_t count) {
        const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(T));
        std::uint8_t* const part = base ? base + used : nullptr;
        used += line_up(bytes) + gap;
        if (part && gap) sanitizer_forbids(part + bytes, line_up(bytes) + gap - bytes);
        return reinterpret_cast<T*>(part);
    }
};

}  // namespace shallow
