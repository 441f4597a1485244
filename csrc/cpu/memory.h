// Memory for weights: 2 MiB pages where the system gives them, shared by small buffers.
// defines: Memory
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace shallow {

struct Slab;

// A zeroed buffer aligned to 64 bytes. Buffers under 8 MiB are cut from common slabs, so that a
// model of many small matrices wastes no half-empty huge page each. A few slabs that their last
// buffer left are kept: mapped anew, the keys and values of a prompt would wait for the system to
// find and zero their pages. Throws std::bad_alloc.
class Memory {
public:
    Memory() = default;
    explicit Memory(std::size_t bytes);

    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    std::shared_ptr<Slab> slab_;
    std::uint8_t* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace shallow
