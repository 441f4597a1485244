// A decoder at the other end of a pipe: what engine._cpu.Decoder is asked, asked of a program for
// another processor. tests/support/crossed.py speaks to it; numbers are little-endian on both sides.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "cpu/decoder.h"

using namespace shallow;

namespace {

template <class T>
std::vector<T> read_many(std::size_t count) {
    std::vector<T> values(count);
    if (count && std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(0);
    return values;
}

template <class T>
T read() {
    return read_many<T>(1)[0];
}

std::size_t count() { return static_cast<std::size_t>(read<std::int64_t>()); }

std::string text() {
    const auto letters = read_many<char>(count());
    return {letters.begin(), letters.end()};
}

template <class T>
std::vector<T> array() {
    return read_many<T>(count());
}

template <class T>
void write(const T* values, std::size_t count) {
    std::fwrite(values, sizeof(T), count, stdout);
}

Rules rules() {
    Rules r{};
    for (std::int64_t* size :
         {&r.hidden, &r.vocab, &r.heads, &r.kv_heads, &r.head_dim, &r.ffn, &r.max_context})
        *size = read<std::int64_t>();
    for (float* real : {&r.norm_eps, &r.attention_scale, &r.attention_softcap, &r.logit_softcap,
                        &r.embedding_scale})
        *real = read<float>();
    for (bool* flag : {&r.centred, &r.gated, &r.parallel}) *flag = read<std::int64_t>() != 0;
    r.qk_norm = static_cast<QkNorm>(read<std::int64_t>());
    r.activation = static_cast<Activation>(read<std::int64_t>());
    r.mode = static_cast<Mode>(read<std::int64_t>());
    return r;
}

// Tiles lie on cache lines, as those of the mapped layout do.
std::shared_ptr<const TiledMatrix> matrix() {
    const std::size_t bytes = count();
    auto memory = std::make_shared<Memory>(bytes);
    if (std::fread(memory->data(), 1, bytes, stdin) != bytes) std::exit(0);
    const auto tiles = std::make_shared<TiledMatrix>(memory->data(), bytes);
    return {tiles.get(), [memory, tiles](const TiledMatrix*) {}};
}

Weights weights() {
    Weights found;
    for (std::size_t left = count(); left; --left) {
        const std::string role = text();
        found.matrices[role] = matrix();
    }
    for (std::size_t left = count(); left; --left) {
        const std::string role = text();
        found.vectors[role] = array<float>();
    }
    return found;
}

void forward(Decoder& decoder, KvCache& cache) {
    Call call;
    call.cache = &cache;
    call.batch = read<std::int64_t>();
    call.steps = read<std::int64_t>();
    call.all = read<std::int64_t>() != 0;
    const auto tokens = array<std::int64_t>();
    auto lengths = array<std::int64_t>();
    const auto chosen = array<std::uint8_t>();
    std::vector<std::vector<float>> tables;
    for (std::size_t left = count(); left; --left) tables.push_back(array<float>());
    call.tokens = tokens.data();
    call.lengths = lengths.data();
    call.chosen = chosen.empty() ? nullptr : chosen.data();
    for (const auto& table : tables) {
        call.angles.push_back(table.data());
        call.angle_sizes.push_back(static_cast<std::int64_t>(table.size()));
    }
    const auto vocab = static_cast<std::size_t>(decoder.model().rules.vocab);
    std::vector<float> logits(static_cast<std::size_t>(call.batch * call.steps) * vocab);
    call.logits = logits.data();
    const std::int64_t written = decoder.forward(call, [] {});
    write(&written, 1);
    write(lengths.data(), lengths.size());
    write(logits.data(), static_cast<std::size_t>(written) * vocab);
}

void serve(Isa isa) {
    const Rules asked = rules();
    Decoder decoder(asked, isa, static_cast<int>(read<std::int64_t>()));
    Weights outer = weights();
    const auto rows = read<std::int64_t>(), columns = read<std::int64_t>();
    const auto type = static_cast<ScaleType>(read<std::int64_t>());
    const auto embedding = array<std::uint8_t>();
    decoder.set_outer(std::move(outer), embedding.empty() ? nullptr : embedding.data(), rows,
                      columns, type);
    while (read<std::int64_t>()) {
        Weights layer = weights();
        const auto window = read<std::int64_t>(), rope = read<std::int64_t>();
        decoder.add_layer(std::move(layer), window, static_cast<int>(rope), read<std::int64_t>());
    }
    std::vector<KvCache> caches;
    for (;;) {
        const std::size_t which = count();
        if (which == caches.size()) {
            const auto type = static_cast<KvType>(read<std::int64_t>());
            caches.push_back(decoder.new_cache(type, read<std::int64_t>()));
        }
        forward(decoder, caches[which]);
        std::fflush(stdout);
    }
}

}  // namespace

int main(int, char** arguments) {
    if (std::string(arguments[1]) == "best") {
        std::puts(isa_name(best_isa()));
        return 0;
    }
    try {
        serve(isa_from_name(arguments[1]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
