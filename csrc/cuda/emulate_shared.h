// Shared memory of kernels that run on a CPU; a part of emulate.h. Every access is checked: the
// element exists, a thread of this block wrote it, and a barrier lies between two threads' accesses
// of which one writes.
#pragma once

#include "cuda/emulate.h"

namespace emulate {

struct Shadow {
    static constexpr int kNone = -1, kSeveral = -2;
    int writer = kNone, reader = kNone;
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

    void start_block(std::size_t size) {
        if (serial_ == block.serial) return;
        serial_ = block.serial;
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
    SharedElement& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

private:
    SharedMemory<T>& memory_;
    int i_;
};

template <typename T, int N>
class Shared {
public:
    SharedElement<T> operator[](int i) {
        memory_.start_block(N);
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
    memory.start_block(block.shared_bytes / sizeof(T));
    return {memory, 0};
}

}  // namespace emulate
