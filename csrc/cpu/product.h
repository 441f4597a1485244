// The decoder's matmuls: matrices that read one input side by side, and that input as they read it.
// defines: Input Product Queue read_row
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/w4_matmul.h"

namespace shallow {

using MatrixRef = std::shared_ptr<const TiledMatrix>;

constexpr std::int64_t kManyRows = 32;  // from here on unpacking a tile pays, and rows go by panels

// How a matmul computes: see Kernels.
enum class Path { int8, exact, bfloat };

// Rows of activations in every form that some matrices want: by column order, and for int8 by
// group. Matrices that agree share a form.
class Input {
public:
    // fine: int8 with the coarsest blocks in two planes, see Int8Input.
    Input(const Kernels& kernels, Mode mode, bool fine)
        : kernels_(&kernels), mode_(mode), fine_(fine) {}

    int add(const MatrixRef& w);  // returns the form for `w`
    std::int64_t nbytes(std::int64_t m) const;  // for m rows
    // Rows i..i+count-1 of m, `stride` floats apart: one, or a whole panel. Threads may write
    // different rows at once. spare: as many floats as the rows have.
    void write(std::uint8_t* to, std::int64_t m, std::int64_t i, const float* rows,
               std::int64_t stride, std::int64_t count, float* spare) const;
    // Columns that fewer than kManyRows rows are to be divided by; 0 where rows stay whole.
    std::int64_t grain() const;
    // Only columns begin..end-1, multiples of grain() or the last. Threads may write different
    // columns at once.
    void write_columns(std::uint8_t* to, std::int64_t m, std::int64_t i, const float* rows,
                       std::int64_t stride, std::int64_t count, std::int64_t begin,
                       std::int64_t end) const;

private:
    friend class Product;
    struct Form {
        MatrixRef like;
        bool exact;  // without int8 kernel
    };
    void convert(const Form& form, const TileView& w, std::uint8_t* to, std::int64_t m,
                 std::int64_t i, std::int64_t block, const Rows& some) const;
    Path path(const Form& form, std::int64_t m) const;
    std::int64_t nbytes(const Form& form, std::int64_t m) const;
    Int8Input int8(const Form& form, std::uint8_t* base, std::int64_t m) const;

    const Kernels* kernels_;
    Mode mode_;
    bool fine_;
    std::vector<Form> forms_;
};

// Hands out work to the threads of a step, piece by piece.
class Queue {
public:
    void reset() { next_.store(0, std::memory_order_relaxed); }
    // call(begin, end) until all of `count` are taken, `step` at a time
    template <class Call>
    void take(std::int64_t count, std::int64_t step, const Call& call) {
        for (std::int64_t i; (i = next_.fetch_add(step, std::memory_order_relaxed)) < count;)
            call(i, std::min(i + step, count));
    }

private:
    alignas(64) std::atomic<std::int64_t> next_{0};
};

class Product {
public:
    // `column` is where the matrix's outputs stand in a row; bias may be null. A matrix `aside`
    // has as many tiles as the first and runs along with it.
    void add(Input& input, const MatrixRef& w, const float* bias, std::int64_t column,
             bool aside = false);

    std::int64_t tiles() const { return tiles_; }
    std::int64_t nbytes() const;  // of the weights
    // Tiles for a thread to take at a time, and what run() then needs.
    std::int64_t step(const Input& input, std::int64_t m, int threads) const;
    std::int64_t scratch_bytes(const Input& input, std::int64_t m, int threads) const;
    // Tiles begin..end-1 of m rows; y: rows `stride` floats apart.
    void run(const Input& input, std::uint8_t* rows, std::int64_t m, float* y, std::int64_t stride,
             std::int64_t begin, std::int64_t end, std::uint8_t* scratch) const;

private:
    struct Part {
        MatrixRef w;
        const float* bias;
        std::int64_t column, first;  // first: its first tile among the product's
        std::size_t form;
    };
    std::vector<Part> parts_;
    std::int64_t tiles_ = 0;
};

// Row `row` of a matrix, in its original column order; k floats.
void read_row(const TiledMatrix& matrix, std::int64_t row, float* out);

}  // namespace shallow
