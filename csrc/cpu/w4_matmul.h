// y = x @ W.T on packed weights, and the layout that the CPU kernels read.
// defines: Mode mode_from_name TiledMatrix read_row Rows Output matmul
//          for kernels: Codes TileView IntInput FloatInput BfloatInput Kernels kernels tiles_together
#pragma once

#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "w4.h"

namespace shallow {

using w4::element_bytes;
using w4::ScaleType;  // also the element types of x, y and 16-bit weights

constexpr int kTileRows = 16;   // rows of W that a tile interleaves
constexpr int kBlock = 32;      // columns of W under one activation scale
constexpr int kPanelRows = 16;  // rows of x that a panel interleaves

enum class Codes : std::int32_t {
    nibble,
    nibble_table,
    six,
    byte,
    float32,
    float16,
    bfloat16,
    unpacked,
    high
};

// A matrix as the kernels read it. Rows lie in tiles of 16, columns in blocks of 32, both padded
// with zeros. A chunk is 64 bytes: 16 rows x 4 consecutive columns, one byte each.
//   nibble  block of 4 chunks: columns 0..15 in the low nibbles, 16..31 in the high ones
//   six     block of 6 chunks, 3 for each 16 columns: of these 0..11 in the low six bits, 12..15 in the
//           high two, of whose six the first chunk has the highest
//   byte    block of 8 chunks
//   unpacked  the same with float32 scales and minimums: what a tile becomes for many rows
//   high    a byte's high seven bits, where bounds are told by them
//   float32, float16   block of 32 columns x 16 rows
//   bfloat16  block of 16 column pairs x 16 rows x 2: what the tile registers multiply
// The parameters of one group of one tile are a record: 16 scales, then 16 mins or zeros. kquant and
// stepped have bytes there, which d and dmin multiply; those of stepped are signed.
// A tile is a line of runs, so that memory is read as one stream (groups of 32 from memory: 3-6 %
// faster than with the records apart, benchmarks/results/decoder.md): the records of as many groups
// as fill whole cache lines, then the blocks of these groups. The last run may have fewer.
// With group 16 the groups are padded to two a block.
struct TileView {
    const std::uint8_t* data;     // tiles, tile_bytes apart
    const std::uint16_t* supers;  // kquant: (tiles, ceil(blocks / 8), 2, 16) float16 d, dmin;
                                  // stepped: (tiles, ceil(blocks / 8), 16) d
    float values[16];             // value of each nibble
    std::uint8_t values8[16];     // nibble_table: value = values8_step * (byte - 128), nearly
    float values8_step;           // 0 where no step comes near enough
    std::int64_t n, k, tiles, blocks, groups;
    std::int64_t group_blocks;                // blocks a group; 0 for group 16
    std::int64_t super_groups, super_halves;  // groups under one super of a tile, and its size
    std::int64_t block_bytes, record_bytes, tile_bytes;
    std::int64_t run_groups, run_blocks;  // of a whole run
    std::int64_t head_bytes, run_bytes;   // of a run's records, and in all
    Codes kind;
    w4::Scheme scheme;
    ScaleType scale_type;
    float center;  // symmetric, stepped: the code that means zero

    const std::uint8_t* record(std::int64_t tile, std::int64_t group) const {
        return data + tile * tile_bytes + group / run_groups * run_bytes +
               group % run_groups * record_bytes;
    }
    const std::uint8_t* block(std::int64_t tile, std::int64_t index) const {
        return data + tile * tile_bytes + index / run_blocks * run_bytes + head_bytes +
               index % run_blocks * block_bytes;
    }
    void set_runs();  // from the sizes of groups, records and blocks
};

// A matrix in that layout, in huge pages where the system gives them. Its bytes say all there is to
// know of it, so that a copy of them is the matrix too.
class TiledMatrix {
public:
    // Copies from the canonical arrays; `threads` share the work. Throws std::bad_alloc.
    TiledMatrix(const w4::Matrix& matrix, int threads);
    // Of that shape, spec and codebook, whose tiles are zeros yet.
    explicit TiledMatrix(const w4::Matrix& matrix);
    // (n, k) float32, float16 or bfloat16 weights, contiguous.
    TiledMatrix(const void* weights, ScaleType type, std::int64_t n, std::int64_t k, int threads);
    // Borrows a copy of another's bytes. Throws std::invalid_argument where they are none.
    TiledMatrix(std::uint8_t* bytes, std::size_t size);
    // Borrows tiles alone, which a file may hold: view().tiles of view().tile_bytes. Of `matrix`
    // perm and supers, these in the order of TileView, are borrowed too, and codes and scales not
    // looked at. Such a matrix has no bytes(). Throws std::invalid_argument.
    TiledMatrix(const w4::Matrix& matrix, std::uint8_t* tiles);

    // Writes the tiles of the canonical arrays, of the same shape and spec.
    void fill(const w4::Matrix& from, int threads);

    // Writes the canonical arrays that it was made from; `to` has their sizes and spec. Sixes become
    // the bytes that kernels/w4/from_gguf.py makes of their blocks.
    void restore(const w4::Matrix& to, int threads) const;

    bool of_kind(const w4::Matrix& matrix) const;  // in all but the rows
    bool holds(const w4::Matrix& matrix) const;    // what restore() takes

    const TileView& view() const { return view_; }
    const std::int32_t* perm() const { return perm_; }
    std::size_t nbytes() const;  // of codes, parameters and perm
    std::uint8_t* bytes() const { return bytes_; }
    std::size_t size() const { return size_; }

private:
    struct Header;

    void describe(const w4::Matrix& matrix);  // sets the view but for its pointers
    void describe_dense(std::int64_t n, std::int64_t k, ScaleType type);
    bool describe_as(const TileView& found, std::size_t size);
    bool fits(std::size_t size);
    void allocate(bool permuted);
    std::size_t place(bool permuted);  // sets the pointers behind the header; the bytes of it all

    Memory memory_;  // empty where the bytes are borrowed
    std::uint8_t* bytes_ = nullptr;
    std::size_t size_ = 0;
    TileView view_{};
    std::int32_t* perm_ = nullptr;
};

// x: (m, k), rows `stride` elements apart.
struct Rows {
    const void* data;
    std::int64_t m, k, stride;
    ScaleType type;
};

// y: (m, n), rows `stride` elements apart; every element is written.
struct Output {
    void* data;
    std::int64_t stride;
    ScaleType type;
    const float* bias;  // null or (n,)
};

// Activations as integers, a scale for each block of 32, in panels of `panel` rows.
// Element (row, column) of panel p: q[((p * blocks + column / 32) * panel + row) * 32 + column % 32].
// int8: where `fine`, the coarsest blocks of a row, which must come whole, have what rounding left of
// them in a second plane; the scale there is 0 for all others.
// int16: one plane, and of each four columns the second and third have changed places.
template <class T>
struct IntInput {
    T* q;
    float* scales;  // (planes, panels, blocks, panel)
    float* sums;    // (panels, groups, panel): sum over the group of scale * q, of both planes
    std::int64_t m, panel;
    std::int64_t plane;         // scales in one
    std::int64_t group_blocks;  // as in TileView
    bool fine;
};
using Int8Input = IntInput<std::int8_t>;
using Int16Input = IntInput<std::int16_t>;

// The same in float32: values[(p * blocks * 32 + column) * panel + row].
struct FloatInput {
    float* values;
    std::int64_t m, panel;
};

// The same in bfloat16, panels of 16: values[p * stride + (column / 32 * 16 + row) * 32 + ...].
struct BfloatInput {
    std::uint16_t* values;
    std::int64_t m, stride;
};

// One instruction set's kernels. Tiles and panels are independent: any split gives the same bits.
struct Kernels {
    // Write x, a panel's first rows, whose columns are padded with zeros to whole blocks.
    void (*write_int8)(const Rows& x, const Int8Input& to);
    void (*write_float)(const Rows& x, const FloatInput& to);
    // Forms and scratch are as plan.h measures them.
    void (*int8_tiles)(const TileView& w, const Int8Input& x, const Output& y, std::int64_t begin,
                       std::int64_t end, std::uint8_t* scratch);
    void (*float_tiles)(const TileView& w, const FloatInput& x, const Output& y, std::int64_t begin,
                        std::int64_t end);
    // For bytes and codebooks where two products of four bits cost as much as one of 16 (AVX2), else
    // null.
    void (*write_int16)(const Rows& x, const Int16Input& to);
    void (*int16_tiles)(const TileView& w, const Int16Input& x, const Output& y, std::int64_t begin,
                        std::int64_t end, std::uint8_t* scratch);
    // Of bytes around 128, in groups of whole blocks and without a bias: tops (m, w.tiles) float32, what no
    // product of int16_tiles() with a row of the tile exceeds, NaN where that is not known. x is written
    // as int8, and what is to be added beside its sums. Null where it does not pay.
    void (*write_bounds)(const Rows& x, const Int8Input& to);
    void (*bound_tiles)(const TileView& w, const Int8Input& x, const Output& tops,
                        std::int64_t begin, std::int64_t end);
    // For many rows where the processor multiplies tiles of bfloat16, else null.
    void (*write_bfloat)(const Rows& x, const BfloatInput& to);
    void (*bfloat_tiles)(const TileView& w, const BfloatInput& x, const Output& y,
                         std::int64_t begin, std::int64_t end, std::uint8_t* scratch);
};

// From here on every tile is unpacked before the rows meet it, and rows go by panels. Measured with
// tiles of bfloat16 from 16 rows on instead: 18-36 % slower at 16 to 24 rows, 10 % faster at 31
// (benchmarks/results/decoder.md).
constexpr std::int64_t kManyRows = 32;

// Up to here tiles may take turns, so that memory reads several streams: more rows do not wait for it
// (benchmarks/results/decoder.md).
constexpr std::int64_t kStreamedRows = 4;

// How many tiles, where they are not unpacked, some of many rows meet one after the other before the
// next rows do, which come from farther away: the rows stay in L1 meanwhile, the tiles in L2.
std::int64_t tiles_together(const TileView& w);

constexpr int kSliceBlocks = 18;  // blocks of two tiles in bfloat16 that stay in 48 KiB of L1

#if defined(SHALLOW_X86)
extern const Kernels kKernelsAvx2, kKernelsAvxvnni, kKernelsAvx512, kKernelsAmx;
#elif defined(SHALLOW_ARM)
extern const Kernels kKernelsNeon, kKernelsDotprod, kKernelsI8mm;
#endif
extern const Kernels kKernelsGeneric;
const Kernels& kernels(Isa isa);  // throws std::invalid_argument where this machine lacks it

enum class Mode { int8, exact };
Mode mode_from_name(const std::string& name);  // throws std::invalid_argument

// Row `row` of a matrix, in its original column order; k floats.
void read_row(const TiledMatrix& matrix, std::int64_t row, float* out);

// exact: activations and weights in float32.
// int8:  activations rounded to int8 in blocks of 32; the coarsest blocks of a norm's outputs get a
//        second int8 plane with what rounding left of them. Other forms where they are faster:
//          - AMX, many rows: activations and weights in bfloat16;
//          - AVX2, 8-bit codes and codebooks: activations in int16 (smaller errors too);
//          - 16-bit weights, and codebooks that 8 bits hold badly: as exact, but for AMX's rows;
//          - float32 weights: always as exact.
// Throws std::bad_alloc.
void matmul(const Rows& x, const TiledMatrix& w, const Output& y, Mode mode, Isa isa, int threads);

}  // namespace shallow
