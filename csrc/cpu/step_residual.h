// The residual stream of a step: what is added to it, and its norms.
// defines: Residual
#pragma once

#include "cpu/step_worker.h"

namespace shallow {

class Residual {
public:
    explicit Residual(Worker& worker) : w_(worker) {}

    // The chunk's rows: their embeddings, or what enters.
    void embed();
    // Writes them out, with all that is to be added.
    void leave();
    // From its next norm on, the stream of these rows has y added, after `post` where there is one,
    // and `y2` where that is not null.
    void add(const RowSet& set, const Norm& post, const FloatRows& y,
             const FloatRows* y2 = nullptr);
    // Writes the norm of the stream into hidden_forms.
    void write_norm(const RowSet& set, const Norm& norm, const Input& input);

private:
    void add_pending(std::int64_t row);
    void add_all_pending();

    struct Pending {
        const RowSet* set = nullptr;  // null: nothing is
        const Norm* post = nullptr;
        const FloatRows *y = nullptr, *y2 = nullptr;
    };

    Worker& w_;
    Pending pending_;
};

}  // namespace shallow
