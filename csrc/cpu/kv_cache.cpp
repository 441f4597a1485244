#include "cpu/kv_cache.h"

namespace shallow {

KvShape::KvShape(KvType type, std::int64_t heads, std::int64_t head_dim)
    : type(type), heads(heads), head_dim(head_dim) {
    const std::int64_t element = type == KvType::float32 ? 4 : type == KvType::float16 ? 2 : 1;
    width = (head_dim + 15) / 16 * 16;
    key_bytes = kPage * head_dim * element;
    value_bytes = kPage * width * element;
    head_bytes = key_bytes + value_bytes + (type == KvType::int8 ? 2 * kPage * 4 : 0);
    page_bytes = heads * head_bytes;
}

void KvCache::reserve(std::int64_t sequence, std::int64_t slot, std::int64_t length) {
    auto& pages = pages_[static_cast<std::size_t>(sequence * slots_ + slot)];
    const std::int64_t missing =
        (length + kPage - 1) / kPage - static_cast<std::int64_t>(pages.size());
    if (missing <= 0) return;
    const std::int64_t bytes = missing * shape_.page_bytes;
    memory_.emplace_back(static_cast<std::size_t>(bytes));
    for (std::int64_t i = 0; i < missing; ++i)
        pages.push_back(memory_.back().data() + i * shape_.page_bytes);
    nbytes_ += bytes;
}

}  // namespace shallow
