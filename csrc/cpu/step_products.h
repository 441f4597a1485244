// The products of a step, and what follows their outputs while the first-level cache holds them.
// defines: multiply FeedForward write_logits
#pragma once

#include "cpu/step_worker.h"

namespace shallow {

// m rows of forms times a product's matrices, this thread's claims of them.
void multiply(Worker& worker, const Product& product, std::uint8_t* forms, std::int64_t m,
              const FloatRows& y, Part part);

// The MLP of some rows: `up` and the gate, activated, then `down`.
class FeedForward {
public:
    FeedForward(Worker& worker, const Layer& layer, const RowSet& set);
    void write_activated();  // reads hidden_forms
    void write_down(const FloatRows& y);  // behind a barrier

private:
    void activate(std::int64_t begin, std::int64_t end) const;
    void write_input_of_down();

    Worker& w_;
    const Layer& layer_;
    const std::int64_t m_;
    // Columns by which the input of `down` is rounded where it is activated, by the thread that
    // did; 0 where threads cannot divide them, or unevenly: then each takes whole rows.
    const std::int64_t grain_;
};

// The logits of hidden_forms, and each thread's largest where they are asked for.
void write_logits(Worker& worker, std::int64_t m);

}  // namespace shallow
