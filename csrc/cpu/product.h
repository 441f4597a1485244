// The decoder's matmuls: matrices that read one input side by side, and that input as they read it.
// defines: FloatRows kBoundedRows Input Product
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/plan.h"

namespace shallow {

// Rows of floats, `stride` apart.
struct FloatRows {
    float* data;
    std::int64_t stride;

    float* row(std::int64_t i) const { return data + i * stride; }
    // Rows i.., `count` of them, of the columns begin..end-1.
    Rows part(std::int64_t i, std::int64_t count, std::int64_t begin, std::int64_t end) const;
};

// Fewer wait for memory, and gain nothing by bounds (benchmarks/results/decoder.md).
constexpr std::int64_t kBoundedRows = 4;

// Activations in every form that some matrices want: by column order, and for int8 by group.
// Matrices that agree share a form; the forms lie one behind another.
class Input {
public:
    Input(const Kernels& kernels, Mode mode, bool fine)  // fine: see Form
        : kernels_(kernels), mode_(mode), fine_(fine) {}

    std::size_t add(
        const std::shared_ptr<const TiledMatrix>& w);  // returns the index of the form for `w`
    Form form(std::size_t index, std::int64_t m) const;
    std::int64_t nbytes(std::int64_t m) const;
    // Writes x as the rows from `row` on of m. Of many rows they are one panel. spare: as many
    // floats as x has. Threads may write different rows at once.
    void write(const Rows& x, std::uint8_t* forms, std::int64_t m, std::int64_t row,
               float* spare) const;
    // Columns that fewer than kManyRows rows are to be divided by; 0 where rows stay whole.
    std::int64_t grain() const { return grain_; }
    // Writes x as the columns from `column` on, a multiple of grain(), and as many, but for the last
    // ones. Threads may write different columns at once.
    void write_columns(const Rows& x, std::uint8_t* forms, std::int64_t m, std::int64_t row,
                       std::int64_t column) const;
    const Kernels& kernels() const { return kernels_; }

    // From now on some rows are written for bounds of the first matrix too, behind all forms.
    void add_bounds() { bounded_ = tells_largest(like_[0]->view(), mode_, kernels_); }
    bool bounded(std::int64_t m) const { return bounded_ && m >= kBoundedRows; }
    Form bounds(std::int64_t m) const { return Form(like_[0]->view(), Path::bounds, m, false); }

private:
    Path path_of_few(const TiledMatrix& w) const;  // rows

    const Kernels& kernels_;
    Mode mode_;
    bool fine_, bounded_ = false;
    std::int64_t grain_ = kBlock;  // kept: a step finds the matrices cold; once 0 it stays so
    std::vector<std::shared_ptr<const TiledMatrix>> like_;  // the first matrix of each form
};

class Product {
public:
    Product() = default;
    explicit Product(std::shared_ptr<Input> input) : input_(std::move(input)) {}

    // `column` is where the matrix's outputs stand in a row; bias may be null. A matrix `aside`
    // has as many tiles as the first and runs along with it.
    void add(const std::shared_ptr<const TiledMatrix>& w, const float* bias, std::int64_t column,
             bool aside);

    const Input& input() const { return *input_; }
    const std::shared_ptr<Input>& shared_input() const { return input_; }
    std::int64_t tiles() const { return tiles_; }
    std::int64_t nbytes() const { return nbytes_; }  // of the weights
    // Tiles for a thread to take at a time, and the scratch that run() then needs.
    std::int64_t claim(std::int64_t m, int threads) const;
    std::int64_t scratch_bytes(std::int64_t m, int threads) const;
    // Tiles begin..end-1 of m rows.
    void run(std::uint8_t* forms, std::int64_t m, const FloatRows& y, std::int64_t begin,
             std::int64_t end, std::uint8_t* scratch) const;

    // Of one matrix without bias: what choose_likeliest() asks, where bounded(m).
    void add_bounds();
    bool bounded(std::int64_t m) const { return input_->bounded(m); }
    // tops: (m, tiles), as Kernels::bound_tiles.
    void bound(std::uint8_t* forms, std::int64_t m, const FloatRows& tops, std::int64_t begin,
               std::int64_t end) const;
    void run_row(std::uint8_t* forms, std::int64_t m, std::int64_t row, const FloatRows& y,
                 std::int64_t tile) const;
    void fetch(std::int64_t tile) const;  // into L2

private:
    struct Entry {
        std::shared_ptr<const TiledMatrix> w;
        const float* bias;
        std::int64_t column, first;  // first: its first tile among the product's
        std::size_t form;
    };
    std::shared_ptr<Input> input_;
    std::vector<Entry> entries_;
    std::int64_t tiles_ = 0, nbytes_ = 0;
};

}  // namespace shallow
