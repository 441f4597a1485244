#include "cpu/step.h"

#include "cpu/step_attention.h"
#include "cpu/step_choice.h"
#include "cpu/step_products.h"
#include "cpu/step_residual.h"

namespace shallow {
namespace {

void run_layer(Worker& worker, Residual& residual, const Layer& layer, std::int64_t slot,
               const RowSet& set) {
    const Buffers& shared = worker.shared;
    const bool parallel = worker.rules.parallel;
    FeedForward mlp(worker, layer, set);

    residual.write_norm(set, layer.attn_norm, layer.qkv.input());
    multiply(worker, layer.qkv, worker.hidden_forms, set.size(), shared.qkv, Part::qkv);
    if (parallel) mlp.write_activated();
    StepAttention attention(worker, layer, slot, set);
    attention.fetch();
    worker.barrier();
    std::uint8_t* const attended = attention.run();
    multiply(worker, layer.o, attended, set.size(), shared.y, Part::o);
    worker.barrier();
    if (!parallel) {
        residual.add(set, layer.attn_post, shared.y);
        residual.write_norm(set, layer.mlp_norm, layer.up.input());
        mlp.write_activated();
        worker.barrier();
    }
    mlp.write_down(parallel ? shared.y2 : shared.y);
    worker.barrier();
    residual.add(set, layer.mlp_post, shared.y, parallel ? &shared.y2 : nullptr);
}

void run(Worker& worker) {
    const Model& model = worker.model;
    const Chunk& chunk = worker.chunk;
    Residual residual(worker);
    residual.embed();
    for (std::size_t slot = 0; slot < model.layers.size(); ++slot) {
        const RowSet& set = chunk.sets[chunk.set_of[slot]];
        if (set.size())
            run_layer(worker, residual, model.layers[slot], static_cast<std::int64_t>(slot), set);
    }
    if (chunk.leaving) residual.leave();
    const RowSet& wanted = chunk.sets[chunk.wanted];
    if (!wanted.size()) return;
    residual.write_norm(wanted, model.final_norm, model.head.input());
    if (chunk.bounds)
        choose_likeliest(worker, wanted.size());
    else
        write_logits(worker, wanted.size());
}

}  // namespace

// Of a layer q, k and v, attention, its output, gate and up, down; then the head, and its choice by bounds.
std::size_t queues_needed(const Model& model) { return model.layers.size() * 5 + 2; }

std::int64_t workspace_bytes(const Model& model, const Chunk& chunk, int threads, Sizes& sizes) {
    return Buffers(model, chunk, threads, sizes, nullptr).bytes;
}

void run_step(const Model& model, const Chunk& chunk, int threads, Sizes& sizes,
              std::uint8_t* workspace, Queue* queues, Times* times) {
    Team team(model, chunk, threads, sizes, workspace);
    team.queues = queues;
    team.times = times;
    Pool::instance().run(threads, [&](int thread, int count) {
        Worker worker(team, thread, count);
        worker.reset_queues(queues_needed(model));
        run(worker);
    });
    sanitizer_allows(workspace, team.buffers.bytes);  // the next step cuts it in other places
}

}  // namespace shallow
