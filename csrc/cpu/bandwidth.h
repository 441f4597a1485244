// The loop that reads memory as fast as this processor can; one instance an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace shallow {

// Streams that a thread may read in, of which the faster is found by trying.
constexpr int kFewStreams = 2, kManyStreams = 8;

// streams: one of those.
uint64_t sum_words_generic(const void* data, size_t bytes, int streams);
uint64_t sum_words_avx2(const void* data, size_t bytes, int streams);

// The sum of the 64-bit words, so that no load is left out. data: 64-byte aligned; bytes: a
// multiple of 2048; Vector: of uint64_t, 16 to 64 bytes. A quarter KiB of each stream in turn and
// lines asked for ahead: on a Sapphire Rapids core two streams are a quarter faster from DRAM than
// one plain one, and eight, 512 bytes ahead, up to a quarter faster than two. 64-byte vectors gain
// nothing over 32.
template <class Vector, int Streams>
inline uint64_t sum_words_in(const void* data, size_t bytes) {
    constexpr size_t kLine = 64 / sizeof(Vector), kStep = 4 * kLine;
    constexpr size_t kAhead = (Streams > 2 ? 8 : 16) * kLine;
    const size_t part = bytes / Streams / sizeof(Vector);
    const auto* words = static_cast<const Vector*>(data);
    Vector sum[kLine] = {};
    for (size_t i = 0; i < part; i += kStep)
        for (int s = 0; s < Streams; ++s) {
            const Vector* const stream = words + static_cast<size_t>(s) * part + i;
            for (size_t j = 0; j < kStep; j += kLine) {
                __builtin_prefetch(stream + j + kAhead);
                for (size_t k = 0; k < kLine; ++k) sum[k] += stream[j + k];
            }
        }
    uint64_t lanes[8], total = 0;
    static_assert(sizeof(lanes) == sizeof(sum));
    std::memcpy(lanes, sum, sizeof(sum));
    for (const uint64_t lane : lanes) total += lane;
    return total;
}

template <class Vector>
inline uint64_t sum_words(const void* data, size_t bytes, int streams) {
    return streams == kFewStreams ? sum_words_in<Vector, kFewStreams>(data, bytes)
                                  : sum_words_in<Vector, kManyStreams>(data, bytes);
}

}  // namespace shallow
