// Keys and values in pages, so that growth copies nothing.
// defines: KvType KvShape KvCache
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/memory.h"

namespace shallow {

constexpr std::int64_t kPage = 128;   // positions of one sequence in one slot
constexpr std::int64_t kStripe = 32;  // positions whose keys interleave: a cache line of float16

enum class KvType : int { float32, float16, int8 };

// A page holds, one kv head after another:
//   keys    (kPage / kStripe, head_dim, kStripe), so that a vector is one feature of many positions;
//           with a page in one stripe attention at 1,024 tokens touched twice the lines
//   values  (kPage, width)
//   int8: scales of the keys, then of the values, (2, kPage) float32
struct KvShape {
    KvType type;
    std::int64_t heads, head_dim;  // of keys and values
    std::int64_t width;            // head_dim up to whole vectors
    std::int64_t key_bytes, value_bytes, head_bytes, page_bytes;

    KvShape(KvType type, std::int64_t heads, std::int64_t head_dim);
};

// What (sequence, slot) has seen, in pages; how much of it counts is the caller's to know.
class KvCache {
public:
    KvCache(const KvShape& shape, std::int64_t batch, std::int64_t slots, std::int64_t decoder)
        : shape_(shape), slots_(slots), decoder_(decoder),
          pages_(static_cast<std::size_t>(batch * slots)) {}

    // Makes room for `length` positions; throws std::bad_alloc.
    void reserve(std::int64_t sequence, std::int64_t slot, std::int64_t length);

    std::uint8_t* const* pages(std::int64_t sequence, std::int64_t slot) const {
        return pages_[static_cast<std::size_t>(sequence * slots_ + slot)].data();
    }
    const KvShape& shape() const { return shape_; }
    std::int64_t batch() const { return static_cast<std::int64_t>(pages_.size()) / slots_; }
    std::int64_t slots() const { return slots_; }
    std::int64_t decoder() const { return decoder_; }  // whose it is
    std::int64_t nbytes() const { return nbytes_; }

private:
    KvShape shape_;
    std::int64_t slots_, decoder_, nbytes_ = 0;
    std::vector<std::vector<std::uint8_t*>> pages_;
    std::vector<Memory> memory_;
};

}  // namespace shallow
