// What the parts of the decode matmul share: its sizes, and a launch's arguments with what follows
// from them.
// defines: shallow::chunk_weights, Values, Params, kTile and others
#pragma once

#include "cuda/w4_matmul.h"

namespace shallow {

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
    shifted,  // code - its group's zero point, which is 128 at most
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

}  // namespace shallow
