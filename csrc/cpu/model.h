// A decoder's weights as a step runs through them.
// defines: QkNorm Rules Layer Model
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace shallow {

enum class QkNorm : int { none, head, all };

// What the family and the sizes fix; names as in engine/architecture/config.py.
struct Rules {
    std::int64_t hidden, vocab, heads, kv_heads, head_dim, ffn, max_context;
    float norm_eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;
    bool centred, gated, parallel;  // centred: LayerNorm
    QkNorm qk_norm;
    Activation activation;
    Mode mode;

    std::int64_t query_width() const { return heads * head_dim; }
    std::int64_t key_width() const { return kv_heads * head_dim; }
    std::int64_t up_width() const { return gated ? 2 * ffn : ffn; }
    // An odd number of cache lines: rows 12 KiB apart shared the same few cache sets.
    std::int64_t up_stride() const { return (up_width() + 15) / 16 * 16 | 16; }
    std::int64_t qkv_width() const { return query_width() + 2 * key_width(); }
};

// Norms without weight are absent.
struct Layer {
    Norm attn_norm, attn_post, mlp_norm, mlp_post, q_norm, k_norm;
    Product qkv, o, up, down;  // up: the gate runs aside; parallel: its input is qkv's
    std::int64_t window;
    int rope;  // index of the angles' table, -1 for none
    std::int64_t rope_dim;
};

struct Model {
    Rules rules;
    const Kernels& kernels;
    const RowKernels& row_kernels;
    const AttentionKernels& attention_kernels;
    std::vector<Layer> layers;
    Norm final_norm{};
    Product head;
    std::shared_ptr<const TiledMatrix> embedding;  // or
    const void* embedding_rows = nullptr;          // (vocab, hidden)
    ScaleType embedding_type{};

    Model(const Rules& rules, Isa isa);
    // Of a norm's outputs the input is `fine`: outliers in much the same columns of every row hold
    // most of the error of rounding to int8. Those of other inputs are elsewhere in every row: fine
    // too, a batch of 8 would be 17 % slower (benchmarks/results/decoder.md).
    Product product(bool of_norm) const;
    void embed(std::int64_t token, float* x) const;
};

}  // namespace shallow
