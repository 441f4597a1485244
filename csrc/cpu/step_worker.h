// One thread of a step: what it shares with the others, what is its own, where they meet.
// defines: Team Worker
#pragma once

#include <algorithm>
#include <chrono>

#include "cpu/step_buffers.h"

namespace shallow {

struct Team {
    const Model& model;
    const Chunk& chunk;
    Buffers buffers;
    int planned;  // threads that the buffers are for: fewer may come
    Queue* queues;
    Times* times;  // null or the first thread's
    Barrier barrier;

    Team(const Model& model, const Chunk& chunk, int threads, Sizes& sizes, std::uint8_t* workspace)
        : model(model), chunk(chunk), buffers(model, chunk, threads, sizes, workspace),
          planned(threads) {}
};

class Worker {
public:
    Worker(Team& team, int thread, int threads)
        : model(team.model), rules(model.rules), chunk(team.chunk), shared(team.buffers),
          own(shared.of(thread)), thread(thread), threads(threads), planned(team.planned),
          kept(chunk.size() <= kKeptRows), x(kept ? own.x : shared.x),
          qkv(kept ? own.qkv : shared.qkv),
          hidden_forms(kept ? own.hidden_forms : shared.hidden_forms), team_(team),
          queue_(team.queues), times_(thread == 0 ? team.times : nullptr) {
        if (times_) last_ = std::chrono::steady_clock::now();
    }

    const Model& model;
    const Rules& rules;
    const Chunk& chunk;
    const Buffers& shared;
    const ThreadBuffers own;
    const int thread, threads, planned;
    const bool kept;      // every thread has all rows for itself, in x to hidden_forms
    const FloatRows x;    // by the chunk's rows
    const FloatRows qkv;  // by the set's, as is all else
    std::uint8_t* const hidden_forms;

    // The next of the step's queues: all threads ask for them in the same order.
    Queue& next_queue() { return *queue_++; }
    // By the next queue, call(begin, end) for all of the product's units, as first_share() divides them.
    template <class Call>
    void take_shares(std::int64_t units, std::int64_t m, const Product& product, const Call& call) {
        const std::int64_t first = first_share(units, m, product.nbytes(), threads);
        next_queue().take_shares(units, thread, threads, first, call);
    }
    // Its part of what a step's queues have from the step before; all threads call it first.
    void reset_queues(std::size_t count) {
        for (std::size_t i = 0; i < count; ++i)
            for (int share = thread; share < planned; share += threads) queue_[i].reset(share);
        barrier();
    }

    void barrier() {
        team_.barrier.wait(threads);
        mark(Part::wait);
    }
    void barrier_unless_kept() {
        if (!kept) barrier();
    }
    // What passed since the last mark was spent on this part.
    void mark(Part part) {
        if (!times_) return;
        const auto now = std::chrono::steady_clock::now();
        times_->seconds[static_cast<int>(part)] +=
            std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

    // call(first, count) for this thread's share of m rows, one or a panel at a time. They lie
    // together, since the keys of neighbouring positions share cache lines: by every second panel
    // turning and storing took 10.8 ms of a prefill of 512, not 2.9 (benchmarks/results/decoder.md).
    template <class Call>
    void each_share(std::int64_t m, const Call& call) const {
        const std::int64_t unit = m < kManyRows ? 1 : kPanelRows;
        const std::int64_t units = w4::ceil_div(m, unit);
        const std::int64_t end = std::min(m, units * (thread + 1) / threads * unit);
        for (std::int64_t i = units * thread / threads * unit; i < end; i += unit)
            call(i, std::min(unit, end - i));
    }
    // The same, or for all of them at once where every thread keeps them.
    template <class Call>
    void each_share_or_kept(std::int64_t m, const Call& call) const {
        if (kept) return call(std::int64_t{0}, m);
        each_share(m, call);
    }

private:
    Team& team_;
    Queue* queue_;
    Times* const times_;
    std::chrono::steady_clock::time_point last_;
};

}  // namespace shallow
