#include "cpu/memory.h"

#include <cstdio>
#include <cstring>
#include <mutex>

#include "cpu/pages.h"

namespace shallow {
namespace {

constexpr std::size_t kSlab = 8 * Pages::kHuge;
constexpr std::size_t kLine = 64;

}  // namespace

Memory::Memory(std::size_t bytes) : size_(bytes) {
    if (bytes >= kSlab / 2) {
        slab_ = std::make_shared<Pages>(bytes);
        data_ = static_cast<std::uint8_t*>(slab_->data());
        return;
    }
    static std::mutex mutex;
    static std::weak_ptr<Pages> current;
    static std::size_t used = 0;
    const std::size_t size = (bytes + kLine - 1) / kLine * kLine;
    std::lock_guard lock(mutex);
    slab_ = current.lock();
    if (!slab_ || used + size > kSlab) {
        current = slab_ = std::make_shared<Pages>(kSlab);
        used = 0;
    }
    data_ = static_cast<std::uint8_t*>(slab_->data()) + used;
    used += size;
}

bool huge_pages_available() {
    bool available = false;
    if (FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
        char text[64] = {};
        const std::size_t read = std::fread(text, 1, sizeof text - 1, file);
        std::fclose(file);
        available = read && !std::strstr(text, "[never]");
    }
    return available;
}

}  // namespace shallow
