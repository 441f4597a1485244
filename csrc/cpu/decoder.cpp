#include "cpu/decoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>

namespace shallow {
namespace {

// Tokens that run through the layers together: those of a wide model take no more than kChunkBytes.
std::size_t chunk_rows(const Rules& r) {
    constexpr std::int64_t kChunkBytes = 40 << 20;
    const std::int64_t floats = 3 * r.hidden + r.qkv_width() + r.query_width() + r.up_stride() +
                                r.hidden + r.query_width() + r.ffn;  // the last as inputs
    return static_cast<std::size_t>(rows_within(kChunkBytes, 4 * floats));
}

std::string found(const std::string& expected, std::int64_t got) {
    return ": expected " + expected + ", found " + std::to_string(got);
}
std::string found(std::int64_t expected, std::int64_t got) {
    return found(std::to_string(expected), got);
}

// Takes weights by role, checked against their sizes.
class Roles {
public:
    Roles(const Weights& weights, const Rules& rules) : weights_(weights), rules_(rules) {}

    std::shared_ptr<const TiledMatrix> matrix(const std::string& role, std::int64_t n,
                                              std::int64_t k) const {
        const auto at = weights_.matrices.find(role);
        if (at == weights_.matrices.end()) throw std::invalid_argument("no matrix " + role);
        const TileView& v = at->second->view();
        if (v.n != n) throw std::invalid_argument(role + " outputs" + found(n, v.n));
        if (v.k != k) throw std::invalid_argument(role + " inputs" + found(k, v.k));
        return at->second;
    }
    const float* vector(const std::string& role, std::int64_t n) const {  // null: absent
        const auto at = weights_.vectors.find(role);
        if (at == weights_.vectors.end()) return nullptr;
        const auto size = static_cast<std::int64_t>(at->second.size());
        if (size != n) throw std::invalid_argument(role + found(n, size));
        return at->second.data();
    }
    Norm norm(const std::string& role, std::int64_t n) const {
        Norm norm;
        norm.weight = vector(role, n);
        norm.bias = vector(role + ".bias", n);
        norm.eps = rules_.norm_eps;
        norm.centred = rules_.centred;
        return norm;
    }
    // `column` and `aside` as in Product::add.
    void add(Product& product, const std::string& role, std::int64_t n, std::int64_t k,
             std::int64_t column = 0, bool aside = false) const {
        product.add(matrix(role, n, k), vector(role + ".bias", n), column, aside);
    }

private:
    const Weights& weights_;
    const Rules& rules_;
};

std::atomic<std::int64_t> decoders{0};
constexpr std::int64_t kMostSequences = std::int64_t{1} << 31;  // times the layers, 64 bits

}  // namespace

Decoder::Decoder(const Rules& rules, Isa isa, int threads)
    : model_(rules, isa), threads_(threads), identity_(++decoders), forks_(forks_so_far()) {
    if (threads < 1) throw std::invalid_argument("threads" + found("at least 1", threads));
    if (rules.head_dim > kMaxHeadDim)
        throw std::invalid_argument(
            "head_dim" + found("at most " + std::to_string(kMaxHeadDim), rules.head_dim));
    const std::pair<const char*, std::int64_t> sizes[] = {
        {"hidden", rules.hidden},     {"vocab", rules.vocab},       {"heads", rules.heads},
        {"kv_heads", rules.kv_heads}, {"head_dim", rules.head_dim}, {"ffn", rules.ffn}};
    for (const auto& [name, size] : sizes)
        if (size < 1) throw std::invalid_argument(name + found("at least 1", size));
    if (rules.heads % rules.kv_heads)
        throw std::invalid_argument("heads: expected a multiple of " +
                                    std::to_string(rules.kv_heads) + ", found " +
                                    std::to_string(rules.heads));
}

void Decoder::set_outer(Weights weights, const void* embedding, std::int64_t rows,
                        std::int64_t columns, ScaleType type) {
    if (model_.final_norm.weight) throw std::invalid_argument("set_outer: expected one call");
    auto kept = std::make_unique<Weights>(std::move(weights));
    const Rules& r = model_.rules;
    const Roles roles(*kept, r);
    const Norm norm = roles.norm("norm", r.hidden);
    if (!norm.weight) throw std::invalid_argument("no vector norm");
    std::shared_ptr<const TiledMatrix> matrix;
    if (!embedding)
        matrix = roles.matrix("embedding", r.vocab, r.hidden);
    else if (rows != r.vocab)
        throw std::invalid_argument("embedding rows" + found(r.vocab, rows));
    else if (columns != r.hidden)
        throw std::invalid_argument("embedding columns" + found(r.hidden, columns));
    Product head = model_.product(true);
    roles.add(head, "head", r.vocab, r.hidden);
    if (r.logit_softcap == 0) head.add_bounds();
    weights_.push_back(std::move(kept));  // all is checked: nothing of a call that throws is kept
    model_.final_norm = norm;
    model_.head = std::move(head);
    model_.embedding = std::move(matrix);
    model_.embedding_rows = embedding;
    model_.embedding_type = type;
}

void Decoder::add_layer(Weights weights, std::int64_t window, int rope, std::int64_t rope_dim) {
    if (window < 0) throw std::invalid_argument("window" + found("at least 0", window));
    if (rope_dim < 0 || rope_dim > model_.rules.head_dim || rope_dim % 2)
        throw std::invalid_argument(
            "rope_dim" +
            found("an even number up to " + std::to_string(model_.rules.head_dim), rope_dim));
    auto kept = std::make_unique<Weights>(std::move(weights));
    const Rules& r = model_.rules;
    const Roles roles(*kept, r);
    const std::int64_t queries = r.query_width(), keys = r.key_width();
    const bool whole = r.qk_norm == QkNorm::all;
    Layer layer;
    layer.window = window;
    layer.rope = rope;
    layer.rope_dim = rope_dim;
    layer.attn_norm = roles.norm("attn_norm", r.hidden);
    layer.attn_post = roles.norm("attn_post_norm", r.hidden);
    layer.mlp_norm = roles.norm("mlp_norm", r.hidden);
    layer.mlp_post = roles.norm("mlp_post_norm", r.hidden);
    layer.q_norm = roles.norm("q_norm", whole ? queries : r.head_dim);
    layer.k_norm = roles.norm("k_norm", whole ? keys : r.head_dim);
    if (r.qk_norm != QkNorm::none && !(layer.q_norm.weight && layer.k_norm.weight))
        throw std::invalid_argument("no vector q_norm or k_norm, which the rule qk_norm asks for");
    layer.qkv = model_.product(true);
    layer.o = model_.product(false);
    layer.up = r.parallel ? Product(layer.qkv.shared_input()) : model_.product(true);
    layer.down = model_.product(false);
    roles.add(layer.qkv, "q", queries, r.hidden);
    roles.add(layer.qkv, "k", keys, r.hidden, queries);
    roles.add(layer.qkv, "v", keys, r.hidden, queries + keys);
    roles.add(layer.o, "o", r.hidden, queries);
    roles.add(layer.up, "up", r.ffn, r.hidden);
    if (r.gated) roles.add(layer.up, "gate", r.ffn, r.hidden, r.ffn, true);
    roles.add(layer.down, "down", r.hidden, r.ffn);
    weights_.push_back(std::move(kept));
    model_.layers.push_back(std::move(layer));
}

KvCache Decoder::new_cache(KvType type, std::int64_t batch) const {
    const Rules& r = model_.rules;
    if (model_.layers.empty()) throw std::invalid_argument("a cache is of layers, found none");
    if (batch < 1 || batch > kMostSequences)
        throw std::invalid_argument("batch: expected 1 to " + std::to_string(kMostSequences) +
                                    ", found " + std::to_string(batch));
    return KvCache(KvShape(type, r.kv_heads, r.head_dim), batch, slots(), identity_);
}

std::int64_t Decoder::nbytes() const {
    std::set<const TiledMatrix*> seen;
    std::int64_t bytes = 0;
    for (const auto& weights : weights_)
        for (const auto& [role, matrix] : weights->matrices)
            if (seen.insert(matrix.get()).second)
                bytes += static_cast<std::int64_t>(matrix->nbytes());
    return bytes;
}

// A child that was forked while a call ran has that call's locked mutex and half a chunk: it leaves
// them where they are.
Decoder::Working& Decoder::working() {
    static std::mutex once;
    if (forks_ != forks_so_far()) {
        const std::lock_guard lock(once);
        if (forks_ != forks_so_far()) {
            static_cast<void>(working_.release());
            working_ = std::make_unique<Working>();
            forks_ = forks_so_far();
        }
    }
    return *working_;
}

// One at a time. A signal's handler, which the pause of a call runs, would wait for that call.
class Decoder::Turn {
public:
    explicit Turn(Working& working) : working_(working) {
        if (working.runner.load() == std::this_thread::get_id())
            throw std::runtime_error("this model is running already, in this very thread");
        working.mutex.lock();
        working.runner.store(std::this_thread::get_id());
    }
    ~Turn() {
        working_.runner.store({});
        working_.mutex.unlock();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

private:
    Working& working_;
};

void Decoder::measure(bool on) {
    const Turn turn(working());
    measured_ = on;
    times_ = {};
}

Times Decoder::times() {
    const Turn turn(working());
    return times_;
}

// The rules of engine/reference/decoder.py, which says what is wrong with a call that breaks them.
void Decoder::check(const Call& call) const {
    const auto require = [](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(what);
    };
    require(!model_.layers.empty() && model_.final_norm.weight, "layers");
    require(call.cache->decoder() == identity_ && call.cache->slots() == slots() &&
                call.batch == call.cache->batch(),
            "cache");
    require(call.steps >= 1, "tokens");
    std::int64_t reach = 0;
    for (std::int64_t b = 0; b < call.batch; ++b) {
        const std::int64_t* const lengths = call.lengths + b * slots();
        const std::int64_t* const tokens = call.tokens + b * call.steps;
        const std::int64_t start = *std::max_element(lengths, lengths + slots());
        std::int64_t padding = 0;
        while (padding < call.steps && tokens[padding] < 0) ++padding;
        for (std::int64_t t = padding; t < call.steps; ++t)
            require(tokens[t] >= 0 && tokens[t] < model_.rules.vocab, "tokens");
        require(start >= 0 && start <= model_.rules.max_context, "lengths");
        require(start + call.steps - padding <= model_.rules.max_context, "context");
        for (std::int64_t s = 0; s < slots(); ++s)
            require(lengths[s] == start || (call.chosen && !call.chosen[b * slots() + s]), "slots");
        reach = std::max(reach, start + call.steps - padding);
    }
    for (const Layer& layer : model_.layers) {
        if (layer.rope < 0) continue;
        const auto at = static_cast<std::size_t>(layer.rope);
        require(at < call.angle_sizes.size() && call.angle_sizes[at] >= reach * layer.rope_dim,
                "angles");
    }
}

std::int64_t Decoder::forward(Call& call, const std::function<void()>& pause) {
    Working& w = working();
    const Turn turn(w);
    const auto start = std::chrono::steady_clock::now();
    check(call);
    w.rows.clear();
    const std::int64_t total = slots();
    for (std::int64_t b = 0; b < call.batch; ++b) {
        std::int64_t position =
            *std::max_element(call.lengths + b * total, call.lengths + (b + 1) * total);
        for (std::int64_t t = 0; t < call.steps; ++t) {
            const std::int64_t token = call.tokens[b * call.steps + t];
            if (token < 0) continue;
            Row row;
            row.token = token;
            row.sequence = b;
            row.position = position++;
            row.wanted = call.all || t + 1 == call.steps;
            w.rows.push_back(row);
        }
        for (std::int64_t s = 0; s < total; ++s)
            if (!call.chosen || call.chosen[b * total + s]) call.cache->reserve(b, s, position);
    }
    const std::size_t many = chunk_rows(model_.rules);
    std::int64_t written = 0;
    for (std::size_t begin = 0; begin < w.rows.size(); begin += many) {
        if (begin) pause();
        const std::size_t end = std::min(begin + many, w.rows.size());
        run_chunk(call, w, begin, end, written);
        written += w.chunk.sets[w.chunk.wanted].size();
    }
    for (const Row& row : w.rows)
        for (std::int64_t s = 0; s < total; ++s)
            if (!call.chosen || call.chosen[row.sequence * total + s])
                call.lengths[row.sequence * total + s] = row.position + 1;
    if (measured_)
        times_.whole +=
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return written;
}

void Decoder::run_chunk(const Call& call, Working& w, std::size_t begin, std::size_t end,
                        std::int64_t written) {
    w.chunk.rows.assign(w.rows.begin() + static_cast<std::ptrdiff_t>(begin),
                        w.rows.begin() + static_cast<std::ptrdiff_t>(end));
    w.chunk.angles = call.angles.data();
    w.chunk.cache = call.cache;
    const auto at = static_cast<std::int64_t>(begin) * model_.rules.hidden;
    w.chunk.entering = call.entering ? call.entering + at : nullptr;
    w.chunk.leaving = call.leaving ? call.leaving + at : nullptr;
    w.chunk.used = 0;
    w.chunk.set_of.clear();
    // The set of the rows that `runs` accepts: an earlier one with the same rows, or a new one.
    const auto set_of = [&](const auto& runs) {
        if (w.chunk.sets.size() == w.chunk.used) w.chunk.sets.emplace_back();
        RowSet& set = w.chunk.sets[w.chunk.used];
        set.members.clear();
        for (std::size_t i = 0; i < w.chunk.rows.size(); ++i)
            if (runs(w.chunk.rows[i])) set.members.push_back(static_cast<std::int32_t>(i));
        for (std::size_t s = 0; s < w.chunk.used; ++s)
            if (w.chunk.sets[s].members == set.members) return s;
        set.add_items(w.chunk.rows, model_);
        return w.chunk.used++;
    };
    if (!call.chosen)
        w.chunk.set_of.assign(model_.layers.size(), set_of([](const Row&) { return true; }));
    for (std::int64_t s = 0; call.chosen && s < slots(); ++s)
        w.chunk.set_of.push_back(
            set_of([&](const Row& row) { return call.chosen[row.sequence * slots() + s] != 0; }));
    w.chunk.wanted = set_of([&](const Row& row) { return row.wanted && !call.leaving; });

    const std::int64_t wanted = w.chunk.sets[w.chunk.wanted].size(), vocab = model_.rules.vocab;
    const auto bytes =
        static_cast<std::size_t>(workspace_bytes(model_, w.chunk, threads_, w.sizes));
    const bool bounded = call.best && !call.logits && model_.head.bounded(wanted);
    const std::int64_t logits = call.logits ? 0 : wanted * vocab;
    const std::int64_t bounds = bounded ? wanted * model_.head.tiles() : 0;
    const std::size_t own = static_cast<std::size_t>(logits + bounds) * sizeof(float);
    if (w.workspace.size() < bytes + own) {
        w.workspace = Memory();
        w.workspace = Memory(bytes + own);
    }
    w.chunk.logits = call.logits ? call.logits + written * vocab
                                 : reinterpret_cast<float*>(w.workspace.data() + bytes);
    w.chunk.bounds = bounded ? w.chunk.logits + logits : nullptr;
    w.best.assign(call.best ? static_cast<std::size_t>(threads_ * wanted) : 0, Best());
    w.chunk.best = call.best ? w.best.data() : nullptr;
    while (w.queues.size() < queues_needed(model_)) w.queues.emplace_back(threads_);
    run_step(model_, w.chunk, threads_, w.sizes, w.workspace.data(), w.queues.data(),
             measured_ ? &times_ : nullptr);
    if (call.best) choose(w, wanted, call.best + written);
}

// What the threads met, joined.
void Decoder::choose(const Working& w, std::int64_t wanted, std::int64_t* best) const {
    for (std::int64_t i = 0; i < wanted; ++i) {
        Best all;
        for (std::int64_t thread = 0; thread < threads_; ++thread)
            all.meet(w.best[static_cast<std::size_t>(thread * wanted + i)]);
        best[i] = std::isfinite(all.value) ? all.column : -1;
    }
}

}  // namespace shallow
