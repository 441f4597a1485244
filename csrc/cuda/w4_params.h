// What the parts of the decode matmul share: its sizes, and a launch's arguments with what follows
// from them.
// defines: shallow::chunk_weights, Values, Params, kTile and others
#pragma once

#include "cuda/w4_matmul.h"

namespace shallow {

using w4::ScaleType;
using w4::Scheme;

constexpr int kTile = 16;        // rows of W of a warp
constexpr int kChunkBytes = 64;  // of a row, read at once by the 4 lanes of a quad
constexpr int kStep = 16;        // weights along K of one mma
constexpr int kMaxWarps = 16;    // of a block
constexpr int kDepth = 4;        // chunks of a warp in flight
constexpr int kMaxChunks = 8;    // of a slice, 8 bits each
constexpr int kXStride =
    kW4SliceColumns / 4 + 4;                 // of x by 4: its 4 rows of 32 bytes hit all banks
constexpr int kWarpCodes = kDepth * 2 * 32;  // of a warp in flight, 16 bytes each
constexpr int kMaxSharedBytes = kMaxWarps * kWarpCodes * 16;  // dynamic

constexpr int chunk_weights(int bits) { return 8 * kChunkBytes / bits; }

// What a code stands for before it is scaled.
enum class Values {
    centred,  // code - 2^(bits - 1)
    shifted,  // code; the group takes its zero point times the sum of x
    plain,    // code; the group adds a minimum
    table,    // an entry of the codebook
};

struct Params {
    W4Matmul call;
    int tiles;                      // of W
    int chunks, groups, supers;     // along K
    int group_shift;                // chunk << shift, or >> -shift, is its first group
    int group_chunks;               // log2 of the chunks of a group, where that is one and more
    int step_shift;                 // log2 of the steps of a group in a chunk
    int scale_bytes, offset_bytes;  // of an element of scales; of zeros or mins
    bool aligned;                   // x and what is added to it can be read 2 elements at a time
};

}  // namespace shallow
