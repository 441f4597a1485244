// Runs CUDA kernels on a CPU, for tests: kernel.h includes this where the compiler is not nvcc.
// The threads of a block are fibers of one CPU thread. A fiber runs until it waits: at a barrier, for
// the other lanes of a shuffle or an mma. Blocks run one after another, in a new order every launch.
// What a GPU leaves undefined ends the process with a message that names the thread and the line:
//   a barrier, shuffle or mma that a thread of the block, or lane of the mask, never reaches
//   a shuffle from a lane outside the mask; a load of 16 bytes, or of elements at once, off its
//   alignment
//   shared memory read before this block wrote it, indexed out of bounds, or touched by two threads
//   (one of them writing) with no barrier between
//   more threads or shared memory than the smallest supported GPU allows
//   shared memory touched before an asynchronous copy into it has completed (emulate_shared.h)
//   data of the previous kernel touched without waiting for it (emulate_overlap.h)
//   a counter of blocks raised, or what they wrote read, without a fence (emulate_arrival.h)
// AddressSanitizer, where on, sees accesses outside the memory that a kernel was given.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // one block at a time, so one copy of its shared memory

namespace emulate {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 512 << 10;
constexpr std::size_t kGuardBytes = 4096;

// The line that called, taken as a default argument.
struct Site {
    const char* file;
    int line;
    bool operator==(const Site& other) const {
        return line == other.line && !std::strcmp(file, other.file);
    }
};

// Where fibers wait for each other: the round ends when the last has come.
struct Gate {
    const char* what = "";
    Site site{};
    unsigned long round = 0;
};

// To shared memory, not yet waited for; groups are counted from 0.
struct Copy {
    unsigned long group;
    std::function<void()> finish;
};

struct Fiber {
    ucontext_t context;
    void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber is switched out
    uint3 index;
    int number;
    bool finished = false;
    bool waited = false;                     // for the kernel before
    bool released = false, acquired = true;  // see emulate_arrival.h
    unsigned long copy_groups = 0;
    std::deque<Copy> copies;
    const Gate* waits_at = nullptr;
    unsigned long round = 0;
    bool runnable() const { return !finished && (!waits_at || waits_at->round != round); }
};

using Registers = std::array<std::uint32_t, 6>;
using Warpful = std::array<Registers, kLanes>;

// What the lanes of a warp hand each other. A round's values live until its last reader has them.
struct Warp {
    Gate gate;
    unsigned mask = 0, arrived = 0;
    std::shared_ptr<Warpful> values = std::make_shared<Warpful>();
};

struct Block {
    dim3 grid, size;
    std::size_t shared_bytes = 0;  // dynamic
    std::size_t static_bytes = 0;  // of shared memory that this block has touched
    bool overlap = false;
    uint3 index{};
    unsigned long serial = 0;  // of this block among all, for shared memory to know it is new
    Gate barrier;
    int arrived = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Fiber* current = nullptr;
    ucontext_t scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_bytes = 0;
    const std::function<void()>* kernel = nullptr;
};

inline Block block;

inline Fiber& self() { return *block.current; }
inline int lane() { return self().number % kLanes; }

// Of compute capability 8.6, 8.9 and 12.0.
constexpr std::size_t kMaxThreads = 1024;          // of a block
constexpr std::size_t kMaxSharedBytes = 99 << 10;  // of a block, opted in
constexpr std::size_t kMaxStaticBytes = 48 << 10;  // of it, without its size at the launch
constexpr unsigned kMaxGridYZ = 65535;

[[noreturn]] inline void fail(const char* format, ...) {
    std::fprintf(stderr, "emulate: block (%u, %u, %u)", block.index.x, block.index.y,
                 block.index.z);
    if (block.current) std::fprintf(stderr, " thread %d", self().number);
    std::fprintf(stderr, ": ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::abort();
}

// ---- fibers ----

inline char* stack_of(int number) {
    static std::vector<char*> stacks;
    while (static_cast<int>(stacks.size()) <= number) {
        void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE))
            fail("no memory for a fiber's stack");
        stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
    }
    return stacks[number];
}

inline void switch_to_scheduler(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from.finished ? nullptr : &from.fake_stack,
                                   block.scheduler_stack, block.scheduler_stack_bytes);
#endif
    swapcontext(&from.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
    (*block.kernel)();
    self().finished = true;
    switch_to_scheduler(self());
}

void protect_outputs(bool on);  // emulate_overlap.h

inline void switch_to(Fiber& fiber) {
    block.current = &fiber;
    protect_outputs(block.overlap && !fiber.waited);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, stack_of(fiber.number),
                                   kStackBytes);
#endif
    swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
    protect_outputs(false);
    if (fiber.finished && block.overlap && !fiber.waited)
        fail("returns, and has not waited for the kernel before");
    block.current = nullptr;
}

inline void wait_at(const Gate& gate) {
    self().waits_at = &gate;
    self().round = gate.round;
    switch_to_scheduler(self());
}

// ---- barriers ----

inline void check_same_site(const Gate& gate, const char* what, Site site) {
    if (!(gate.site == site) || std::strcmp(gate.what, what))
        fail("is at %s, %s:%d, while others wait at %s, %s:%d", what, site.file, site.line,
             gate.what, gate.site.file, gate.site.line);
}

inline void barrier(Site site) {
    Gate& gate = block.barrier;
    if (block.arrived == 0) {
        gate.what = "__syncthreads";
        gate.site = site;
    }
    check_same_site(gate, "__syncthreads", site);
    if (++block.arrived < static_cast<int>(block.fibers.size())) return wait_at(gate);
    block.arrived = 0;
    ++gate.round;
}

// Says which thread the waiting ones miss, when none can run.
[[noreturn]] inline void report_deadlock() {
    const Fiber* waiting = nullptr;
    for (const Fiber& fiber : block.fibers)
        if (!fiber.finished && !waiting) waiting = &fiber;
    const Gate& gate = *waiting->waits_at;
    const Warp& warp = block.warps[waiting->number / kLanes];
    const int threads = static_cast<int>(block.fibers.size());
    const int warp_first = waiting->number / kLanes * kLanes;
    const bool whole_block = &gate == &block.barrier;
    const int first = whole_block ? 0 : warp_first;
    const int end = whole_block ? threads : warp_first + kLanes;
    for (int number = first; number < end; ++number) {
        const Fiber* missed = number < threads ? &block.fibers[number] : nullptr;
        const bool awaited = whole_block || warp.mask >> (number - warp_first) & 1;
        if (!awaited || (missed && !missed->finished && missed->waits_at == &gate)) continue;
        const bool waits = missed && !missed->finished;
        fail("thread %d waits at %s, %s:%d, which not all threads reach: thread %d %s%s",
             waiting->number, gate.what, gate.site.file, gate.site.line, number,
             waits    ? "is at "
             : missed ? "has returned"
                      : "does not exist",
             waits ? missed->waits_at->what : "");
    }
    fail("threads wait for each other");
}

// ---- warps ----

inline const std::shared_ptr<Warpful> exchange(const char* what, Site site, unsigned mask,
                                               const Registers& mine) {
    Warp& warp = block.warps[self().number / kLanes];
    if (!(mask >> lane() & 1))
        fail("%s, %s:%d: mask %08x lacks this lane", what, site.file, site.line, mask);
    if (warp.arrived == 0) {
        warp.mask = mask;
        warp.gate.what = what;
        warp.gate.site = site;
    }
    check_same_site(warp.gate, what, site);
    if (mask != warp.mask)
        fail("%s, %s:%d: mask %08x, other lanes have %08x", what, site.file, site.line, mask,
             warp.mask);
    const std::shared_ptr<Warpful> values = warp.values;
    (*values)[lane()] = mine;
    warp.arrived |= 1u << lane();
    if (warp.arrived != warp.mask) {
        wait_at(warp.gate);
        return values;
    }
    warp.arrived = 0;
    warp.values = std::make_shared<Warpful>();
    ++warp.gate.round;
    return values;
}

template <typename T>
T shuffle(const char* what, Site site, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
    Registers registers{};
    std::memcpy(&registers[0], &value, 4);
    const auto values = exchange(what, site, mask, registers);
    if (!(mask >> source & 1))
        fail("%s, %s:%d: reads lane %d, which mask %08x lacks", what, site.file, site.line, source,
             mask);
    std::memcpy(&value, &(*values)[source][0], 4);
    return value;
}

// The address of so many bytes that are loaded at once.
inline const void* aligned(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes)
        fail("%zu-byte load from %p, off its alignment", bytes, address);
    return address;
}

// ---- launches ----

inline void run_block(uint3 index) {
    block.index = index;
    ++block.serial;
    block.arrived = 0;
    block.static_bytes = 0;
    const int threads = block.size.x * block.size.y * block.size.z;
    block.fibers = std::vector<Fiber>(threads);
    block.warps = std::vector<Warp>((threads + kLanes - 1) / kLanes);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        const unsigned number = i;
        fiber.number = i;
        fiber.index = {number % block.size.x, number / block.size.x % block.size.y,
                       number / (block.size.x * block.size.y)};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack_of(i);
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
        fiber.context.uc_stack.ss_size = 0;  // or AddressSanitizer forgets the stack's variables
    }
    for (int left = threads; left;) {
        bool progress = false;
        for (Fiber& fiber : block.fibers) {
            if (!fiber.runnable()) continue;
            progress = true;
            switch_to(fiber);
            left -= fiber.finished;
        }
        if (!progress) report_deadlock();
    }
}

// The blocks of a grid in an order that no kernel may rely on; it is another at every launch.
inline std::vector<uint3> shuffled_blocks(dim3 grid) {
    static std::mt19937 random(2026);
    std::vector<uint3> blocks;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    std::shuffle(blocks.begin(), blocks.end(), random);
    return blocks;
}

}  // namespace emulate

#include "cuda/emulate_arrival.h"
#include "cuda/emulate_numbers.h"
#include "cuda/emulate_overlap.h"
#include "cuda/emulate_shared.h"

// ---- CUDA's names ----

#define threadIdx (::emulate::self().index)
#define blockIdx (::emulate::block.index)
#define blockDim (::emulate::block.size)
#define gridDim (::emulate::block.grid)

#define EMULATE_SITE {__builtin_FILE(), __builtin_LINE()}

#define __builtin_assume_aligned(address, bytes) (::emulate::aligned(address, bytes))

inline void __syncthreads(emulate::Site site = EMULATE_SITE) { emulate::barrier(site); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, emulate::Site site = EMULATE_SITE) {
    return emulate::shuffle("__shfl_sync", site, mask, value, source & (emulate::kLanes - 1));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, emulate::Site site = EMULATE_SITE) {
    return emulate::shuffle("__shfl_xor_sync", site, mask, value, emulate::lane() ^ bits);
}

inline void __syncwarp(unsigned mask = ~0u, emulate::Site site = EMULATE_SITE) {
    emulate::exchange("__syncwarp", site, mask, {});
}

inline void __threadfence() { emulate::fence(); }

inline int atomicAdd(int* to, int value, emulate::Site site = EMULATE_SITE) {
    emulate::arrive(site);
    const int before = *to;
    *to += value;
    return before;
}

template <typename T>
T __ldcg(const T* from, emulate::Site site = EMULATE_SITE) {
    emulate::check_fence(site);
    return *from;
}

// ---- kernel.h's names ----

namespace shallow {

using emulate::dynamic_shared;
using emulate::Shared;
using emulate::SharedArray;

inline std::uint32_t and_or(std::uint32_t v, std::uint32_t mask, std::uint32_t bits) {
    return (v & mask) | bits;
}

inline uint4 load_stream(const void* address) {
    return *static_cast<const uint4*>(emulate::aligned(address, 16));
}

template <typename Array>
void copy_async(Array&& to, int i, const void* from) {
    to[i].copy(load_stream(from));
}
inline void commit_copies() { ++emulate::self().copy_groups; }
template <int LEFT>
void wait_copies() {
    emulate::wait_copies(LEFT);
}

inline float half_of(__half, std::uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

inline float half_of(__nv_bfloat16, std::uint32_t bits) { return __uint_as_float(bits << 16); }

template <typename T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
         emulate::Site site = EMULATE_SITE) {
    const auto lanes = emulate::exchange("mma", site, ~0u, {a[0], a[1], a[2], a[3], b[0], b[1]});
    const int g = emulate::lane() / 4, t = emulate::lane() % 4;
    for (int i = 0; i < 4; ++i) {       // c[i]: row g + 8 (i / 2), column 2 t + i % 2
        for (int k = 0; k < 16; ++k) {  // held by lane k % 8 / 2 of a quad, register k / 8
            const int holder = k % 8 / 2, high = 16 * (k % 2);
            const std::uint32_t row = (*lanes)[4 * g + holder][2 * (k / 8) + i / 2];
            const std::uint32_t column = (*lanes)[4 * (2 * t + i % 2) + holder][4 + k / 8];
            c[i] += half_of(T{}, row >> high & 0xffff) * half_of(T{}, column >> high & 0xffff);
        }
    }
}

inline void wait_for_previous_kernel() { emulate::wait_for_previous_kernel(); }
inline void allow_next_kernel() {}

inline void prepare(const void*, std::size_t) {}  // nothing to load

template <typename... Parameters>
void launch(const Launch& where, void (*kernel)(Parameters...), Parameters... arguments) {
    if (where.shared_bytes > where.max_shared_bytes)
        emulate::fail("launch: %zu bytes of shared memory, more than the %zu announced",
                      where.shared_bytes, where.max_shared_bytes);
    const std::size_t threads = std::size_t{where.block.x} * where.block.y * where.block.z;
    if (threads == 0 || threads > emulate::kMaxThreads)
        emulate::fail("launch: %zu threads, a block has 1 to %zu", threads, emulate::kMaxThreads);
    if (where.max_shared_bytes > emulate::kMaxSharedBytes)
        emulate::fail("launch: %zu bytes of shared memory, a block has %zu at most",
                      where.max_shared_bytes, emulate::kMaxSharedBytes);
    if (std::max(where.grid.y, where.grid.z) > emulate::kMaxGridYZ)
        emulate::fail("launch: a grid of (%u, %u, %u) blocks", where.grid.x, where.grid.y,
                      where.grid.z);
    const std::function<void()> body = [&] { kernel(arguments...); };
    emulate::block.kernel = &body;
    emulate::block.grid = where.grid;
    emulate::block.size = where.block;
    emulate::block.shared_bytes = where.shared_bytes;
    emulate::block.overlap = where.overlap;
    for (const uint3 index : emulate::shuffled_blocks(where.grid)) emulate::run_block(index);
}

}  // namespace shallow
