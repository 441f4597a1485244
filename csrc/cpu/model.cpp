#include "cpu/model.h"

#include <cstring>

namespace shallow {

Model::Model(const Rules& rules, Isa isa)
    : rules(rules), kernels(shallow::kernels(isa)), row_kernels(shallow::row_kernels(isa)),
      attention_kernels(shallow::attention_kernels(isa, rules.mode == Mode::int8)) {}

Product Model::product(bool of_norm) const {
    return Product(std::make_shared<Input>(kernels, rules.mode, of_norm));
}

void Model::embed(std::int64_t token, float* x) const {
    if (embedding) return read_row(*embedding, token, x);
    const std::int64_t n = rules.hidden;
    if (embedding_type == ScaleType::float32) {
        std::memcpy(x, static_cast<const float*>(embedding_rows) + token * n,
                    static_cast<std::size_t>(n) * sizeof(float));
        return;
    }
    const auto* const row = static_cast<const std::uint16_t*>(embedding_rows) + token * n;
    for (std::int64_t i = 0; i < n; ++i)
        x[i] = embedding_type == ScaleType::float16 ? w4::half_to_float(row[i])
                                                    : w4::bfloat_to_float(row[i]);
}

}  // namespace shallow
