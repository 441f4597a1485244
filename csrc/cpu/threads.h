// The process's warm thread pool. Workers spin briefly for the next region, then sleep.
// defines: forks_so_far Signal Barrier Pool Queue parallel_for
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>

namespace shallow {

// How often this process was forked from one that had a pool: what belongs to calls under way in the
// parent is of no use where it has grown.
int forks_so_far();

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
    void reset() { next_.store(0, std::memory_order_relaxed); }
    // call(begin, end) until all of `count` are taken, `step` at a time.
    template <class Call>
    void take(int64_t count, int64_t step, const Call& call) {
        for (int64_t i; (i = next_.fetch_add(step, std::memory_order_relaxed)) < count;)
            call(i, std::min(i + step, count));
    }
    // The same, `first` for each thread, then half of a fair share of what is left at a time: threads
    // end together.
    template <class Call>
    void take_shares(int64_t count, int threads, int64_t first, const Call& call) {
        for (int64_t i = next_; i < count; i = next_) {
            const int64_t share = (count - i) / (2 * threads);
            const int64_t end = i + (i < first * threads ? first : std::max<int64_t>(1, share));
            if (next_.compare_exchange_strong(i, end)) call(i, std::min(end, count));
        }
    }

private:
    alignas(64) std::atomic<int64_t> next_{0};
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
