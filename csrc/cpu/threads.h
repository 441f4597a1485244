// The process's warm thread pool. Workers spin briefly for the next region, then sleep.
// defines: forks_so_far granted_cpus Signal Barrier Pool Queue parallel_for
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>

namespace shallow {

// How often this process was forked from one that had a pool: what belongs to calls under way in the
// parent is of no use where it has grown.
int forks_so_far();

// What the control groups of a process, and those around them, leave it of `most` CPUs. groups: a file
// as /proc/self/cgroup; root: where the groups are.
int granted_cpus(int most, const std::string& groups, const std::string& root);

// A counter that threads wait on: they spin briefly, then sleep until it moves.
class Signal {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void advance();
    void wait_past(uint32_t seen);  // returns once value() != seen

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable moved_;
};

// Meeting point of the threads of one region; usable any number of times.
class Barrier {
public:
    void wait(int threads);  // all of the region's threads call it

private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) Signal passed_;
};

// Threads of all regions together never exceed size(): a region that does not fit waits its
// turn. Safe from any number of threads. A forked child starts with a pool of its own.
class Pool {
public:
    static Pool& instance();

    // CPUs this process may use (affinity and cgroup quota), unless resized.
    int size() const { return size_.load(std::memory_order_relaxed); }
    // Waits for running regions. More threads than CPUs is for tests.
    void resize(int threads);

    // Calls body(thread, threads) once on each of `threads` threads at the same time, the calling
    // one being thread 0, and returns when all are done. `threads` is clamped to 1..size(); a call
    // from inside a region runs on the calling thread alone. body must not throw.
    template <class Body>
    void run(int threads, Body&& body) {
        using Type = std::remove_reference_t<Body>;
        run_erased(
            threads,
            [](void* context, int thread, int count) {
                (*static_cast<Type*>(context))(thread, count);
            },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

private:
    struct Worker;
    using Call = void (*)(void* context, int thread, int threads);

    Pool();
    void run_erased(int threads, Call call, void* context);
    Worker* acquire(int& threads);  // sets threads to how many may run: the caller, and these
    void release(int threads, Worker* team);

    std::atomic<int> size_;
    std::mutex mutex_;
    std::condition_variable freed_;
    int running_ = 0;                         // threads inside regions, callers included
    uint64_t next_ticket_ = 0, serving_ = 0;  // regions start in the order they asked
    Worker* idle_ = nullptr;                  // most recently used first: still spinning
};

// Hands out work to the threads of a region, claim by claim.
class Queue {
public:
    explicit Queue(int threads = 1)
        : shares_(std::make_unique<Share[]>(static_cast<std::size_t>(threads))) {}

    // All shares, by any thread each, before it hands out anew.
    void reset(int share) { shares_[share].taken.store(0, std::memory_order_relaxed); }

    // call(begin, end) until all of `count` are taken, `step` at a time.
    template <class Call>
    void take(int64_t count, int64_t step, const Call& call) {
        std::atomic<int64_t>& next = shares_[0].taken;
        for (int64_t i; (i = next.fetch_add(step, std::memory_order_relaxed)) < count;)
            call(i, std::min(i + step, count));
    }
    // The same of fewer than 2^31, with a share for each thread: it takes `first` of its own at once,
    // then half of what is left, again and again; once its share is empty it steals from the ends of
    // the others', by halves too. So threads end together and read mostly sequentially. One counter
    // for all cost a cache line from another core for each claim (benchmarks/results/decoder.md).
    template <class Call>
    void take_shares(int64_t count, int thread, int threads, int64_t first, const Call& call) {
        const bool whole = first * threads >= count;  // nothing is left for others
        for (int i = 0; i < (whole ? 1 : threads); ++i) {
            const int of = (thread + i) % threads;
            const int64_t begin = count * of / threads;
            const int64_t size = count * (of + 1) / threads - begin;
            if (whole && size > 0) return call(begin, begin + size);
            for (Claim some; (some = shares_[of].claim(size, first, i > 0)).size > 0;)
                call(begin + some.begin, begin + some.begin + some.size);
        }
    }

private:
    struct Claim {
        int64_t begin, size;
    };
    struct alignas(64) Share {
        std::atomic<int64_t> taken{0};  // from behind, times 2^32, and from the front

        Claim claim(int64_t size, int64_t first, bool behind) {
            for (int64_t seen = taken.load(std::memory_order_relaxed);;) {
                const int64_t back = seen >> 32, front = seen - (back << 32);
                const int64_t left = size - front - back;
                if (left <= 0) return {0, 0};
                const bool begins = !behind && front == 0 && first > 0;
                const int64_t some =
                    begins ? std::min(first, left) : std::max<int64_t>(1, left / 2);
                const int64_t then = seen + (behind ? some << 32 : some);
                if (taken.compare_exchange_weak(seen, then, std::memory_order_relaxed))
                    return {behind ? size - back - some : front, some};
            }
        }
    };
    std::unique_ptr<Share[]> shares_;
};

// body(begin, end) over [0, count), in chunks that idle threads claim. The split depends on
// timing, so body must compute each item independently of it. What it throws, first of several, is
// thrown when all threads have ended.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t chunk, Body&& body) {
    if (count <= 0) return;
    const int64_t chunks = (count + chunk - 1) / chunk;
    Queue queue;
    std::mutex mutex;
    std::exception_ptr thrown;
    Pool::instance().run(chunks < threads ? static_cast<int>(chunks) : threads, [&](int, int) {
        try {
            queue.take(count, chunk, body);
        } catch (...) {
            const std::lock_guard lock(mutex);
            if (!thrown) thrown = std::current_exception();
        }
    });
    if (thrown) std::rethrow_exception(thrown);
}

}  // namespace shallow
