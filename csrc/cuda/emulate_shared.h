// Shared memory of kernels that run on a CPU; a part of emulate.h. Every access is checked: the
// element exists, a thread of this block wrote it, and a barrier lies between two threads' accesses
// of which one writes. What is copied to it asynchronously is there when its thread has waited.
#pragma once

#include "cuda/emulate.h"

namespace emulate {

struct Shadow {
    static constexpr int kNone = -1, kSeveral = -2;
    int writer = kNone, reader = kNone;
    bool copied = false;                            // to: not yet waited for
    unsigned long write_round = 0, read_round = 0;  // of the block's barrier
};

// An array in shared memory, of this block: a new block finds nothing written.
template <typename T>
class SharedMemory {
public:
    T read(int i) {
        Shadow& shadow = shadow_of(i);
        const unsigned long round = block.barrier.round;
        const int number = self().number;
        if (shadow.copied)
            fail("shared memory: element %d is read before the copy to it is waited for", i);
        if (shadow.writer == Shadow::kNone)
            fail("shared memory: element %d is read and was never written", i);
        if (shadow.writer != number && shadow.write_round == round)
            fail(
                "shared memory: element %d is read, and thread %d wrote it since the last "
                "barrier, a race",
                i, shadow.writer);
        const bool others = shadow.reader != Shadow::kNone && shadow.reader != number;
        shadow.reader = others && shadow.read_round == round ? Shadow::kSeveral : number;
        shadow.read_round = round;
        return values_[i];
    }

    void write(int i, T value) {
        Shadow& shadow = shadow_of(i);
        const unsigned long round = block.barrier.round;
        const int number = self().number;
        if (shadow.copied)
            fail("shared memory: element %d is written before the copy to it is waited for", i);
        const auto races = [&](int other, unsigned long since) {
            return other != Shadow::kNone && other != number && since == round;
        };
        if (races(shadow.writer, shadow.write_round) || races(shadow.reader, shadow.read_round))
            fail(
                "shared memory: element %d is written, and another thread touched it since the "
                "last barrier, a race",
                i);
        shadow.writer = number;
        shadow.write_round = round;
        values_[i] = value;
    }

    // Ends when this thread waits for it: until then nobody may touch the element.
    void copy(int i, const T& value) {
        write(i, value);
        shadow_of(i).copied = true;
        self().copies.push_back({self().copy_groups, [this, i] {
                                     Shadow& shadow = shadow_of(i);
                                     shadow.copied = false;
                                     shadow.write_round = block.barrier.round;
                                 }});
    }

    // Of `static_bytes` bytes that the launch does not know of.
    void start_block(std::size_t size, std::size_t static_bytes) {
        if (serial_ == block.serial) return;
        serial_ = block.serial;
        block.static_bytes += static_bytes;
        const std::size_t whole = block.static_bytes + block.shared_bytes;
        if (block.static_bytes > kMaxStaticBytes || whole > kMaxSharedBytes)
            fail(
                "shared memory: %zu bytes, %zu of them static; a block has %zu, %zu static at most",
                whole, block.static_bytes, kMaxSharedBytes, kMaxStaticBytes);
        values_.assign(size, T{});
        shadows_.assign(size, Shadow{});
    }

private:
    Shadow& shadow_of(int i) {
        if (i < 0 || i >= static_cast<int>(values_.size()))
            fail("shared memory: index %d of %zu elements", i, values_.size());
        return shadows_[i];
    }

    std::vector<T> values_;
    std::vector<Shadow> shadows_;
    unsigned long serial_ = 0;
};

template <typename T>
class SharedElement {
public:
    SharedElement(SharedMemory<T>& memory, int i) : memory_(memory), i_(i) {}
    operator T() const { return memory_.read(i_); }
    SharedElement& operator=(T value) {
        memory_.write(i_, value);
        return *this;
    }
    SharedElement& operator=(const SharedElement& other) { return *this = static_cast<T>(other); }
    void copy(const T& value) { memory_.copy(i_, value); }
    SharedElement& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

private:
    SharedMemory<T>& memory_;
    int i_;
};

template <typename T, int N>
class Shared {
public:
    SharedElement<T> operator[](int i) {
        memory_.start_block(N, N * sizeof(T));
        return {memory_, i};
    }

private:
    SharedMemory<T> memory_;
};

template <typename T>
class SharedArray {
public:
    SharedArray(SharedMemory<T>& memory, int first) : memory_(&memory), first_(first) {}
    SharedElement<T> operator[](int i) const { return {*memory_, first_ + i}; }
    SharedArray operator+(int i) const { return {*memory_, first_ + i}; }

private:
    SharedMemory<T>* memory_;
    int first_;
};

template <typename T>
SharedArray<T> dynamic_shared() {
    static SharedMemory<T> memory;
    memory.start_block(block.shared_bytes / sizeof(T), 0);
    return {memory, 0};
}

// Waits for this thread's copies but those of its last `left` groups.
inline void wait_copies(unsigned long left) {
    Fiber& fiber = self();
    const unsigned long done = fiber.copy_groups < left ? 0 : fiber.copy_groups - left;
    while (!fiber.copies.empty() && fiber.copies.front().group < done) {
        fiber.copies.front().finish();
        fiber.copies.pop_front();
    }
}

}  // namespace emulate
