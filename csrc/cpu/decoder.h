// A decoder over its kept layers: one call runs a prompt or a token through all of it.
// defines: Weights Call Decoder
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/step.h"

namespace shallow {

// Weights by role ("q", "up", "attn_norm", "q.bias"), as engine/architecture/families.py names them.
struct Weights {
    std::map<std::string, std::shared_ptr<const TiledMatrix>> matrices;
    std::map<std::string, std::vector<float>> vectors;
};

// One forward call. `lengths` is updated when the call succeeds.
struct Call {
    KvCache* cache = nullptr;
    const std::int64_t* tokens = nullptr;  // (batch, steps); negative ones, left, are padding
    std::int64_t batch = 0, steps = 1;
    std::int64_t* lengths = nullptr;       // (batch, slots): filled positions of the cache
    const std::uint8_t* chosen = nullptr;  // null: all slots; or (batch, slots): which of them run
    std::vector<const float*> angles;  // a table each rope: (positions, dim), cosines then sines
    std::vector<std::int64_t> angle_sizes;  // elements of each
    const float* entering = nullptr;  // null: the tokens' embeddings; or (tokens, hidden), padding
                                      // left out: the stream before the first chosen slot
    float* leaving = nullptr;         // null, or as entering: the stream after the last; no logits
    bool all = false;                 // logits of every token; else of each sequence's last
    float* logits = nullptr;          // null, or (tokens asked for, vocab), padding left out
    std::int64_t* best = nullptr;     // null, or (tokens asked for,): the lowest column of the
                                      // largest logit; -1: not finite, or one of the row is NaN
};

class Decoder {
public:
    Decoder(const Rules& rules, Isa isa, int threads);

    // Rows of the embedding: of a matrix, or `rows` x `columns` elements that the caller keeps.
    // Throws std::invalid_argument for what has not the model's sizes, and for a rule without its
    // weights; so does add_layer.
    void set_outer(Weights weights, const void* embedding, std::int64_t rows, std::int64_t columns,
                   ScaleType type);
    // rope: index of the angles' table, -1 for none; rope_dim: how many values of a head it rotates.
    void add_layer(Weights weights, std::int64_t window, int rope, std::int64_t rope_dim);

    // `pause` is called between chunks of a long prompt; what it throws ends the call. Throws
    // std::invalid_argument where the call breaks a rule, std::bad_alloc. One call at a time runs;
    // std::runtime_error where `pause` makes another.
    // Returns how many rows of logits were written.
    std::int64_t forward(Call& call, const std::function<void()>& pause);

    KvCache new_cache(KvType type, std::int64_t batch) const;
    std::int64_t slots() const { return static_cast<std::int64_t>(model_.layers.size()); }
    std::int64_t nbytes() const;  // of all matrices, a tied one once
    const Model& model() const { return model_; }

    // Both wait for a call that runs.
    void measure(bool on);  // from now on; clears what was measured
    Times times();

private:
    // What a call works in; one call at a time.
    struct Working {
        std::mutex mutex;
        std::atomic<std::thread::id> runner{};  // who has it
        std::vector<Row> rows;
        Chunk chunk;
        Sizes sizes;
        std::vector<Best> best;
        Memory workspace;
        std::vector<Queue> queues;
    };
    Working& working();
    class Turn;

    void check(const Call& call) const;
    void run_chunk(const Call& call, Working& w, std::size_t begin, std::size_t end,
                   std::int64_t written);
    void choose(const Working& w, std::int64_t wanted, std::int64_t* best) const;

    Model model_;
    std::vector<std::unique_ptr<Weights>> weights_;
    int threads_;
    std::int64_t identity_;  // of this decoder in the process, for its caches
    std::unique_ptr<Working> working_ = std::make_unique<Working>();
    std::atomic<int> forks_;  // of the process when `working_` was made
    bool measured_ = false;
    Times times_{};
};

}  // namespace shallow
