#include "memory.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace shallow {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kSlab = 8 * kHugePage;
constexpr std::size_t kLine = 64;

constexpr std::size_t round_up(std::size_t size, std::size_t unit) {
    return (size + unit - 1) / unit * unit;
}

// Whole huge pages, zeroed, untouched until first written.
std::shared_ptr<std::uint8_t> map(std::size_t bytes) {
    if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
    const std::size_t size = round_up(bytes, kHugePage);
#ifdef __linux__
    void* const base = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    auto* const start = static_cast<std::uint8_t*>(base);
    const std::size_t lead = round_up(reinterpret_cast<std::uintptr_t>(start), kHugePage) -
                             reinterpret_cast<std::uintptr_t>(start);
    if (lead) munmap(start, lead);
    if (lead < kHugePage) munmap(start + lead + size, kHugePage - lead);
    madvise(start + lead, size, MADV_HUGEPAGE);  // a refusal costs speed only
    return {start + lead, [size](std::uint8_t* data) { munmap(data, size); }};
#else
    void* const data = std::calloc(1, size + kLine);
    if (!data) throw std::bad_alloc();
    auto* const aligned = reinterpret_cast<std::uint8_t*>(
        round_up(reinterpret_cast<std::uintptr_t>(data), kLine));
    return {aligned, [data](std::uint8_t*) { std::free(data); }};
#endif
}

}  // namespace

Memory::Memory(std::size_t bytes) : size_(bytes) {
    if (bytes >= kSlab / 2) {
        slab_ = map(bytes);
        data_ = slab_.get();
        return;
    }
    static std::mutex mutex;
    static std::weak_ptr<std::uint8_t> current;
    static std::size_t used = 0;
    const std::size_t size = round_up(bytes, kLine);
    std::lock_guard lock(mutex);
    slab_ = current.lock();
    if (!slab_ || used + size > kSlab) {
        current = slab_ = map(kSlab);
        used = 0;
    }
    data_ = slab_.get() + used;
    used += size;
}

bool huge_pages_available() {
    bool available = false;
#ifdef __linux__
    if (FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
        char text[64] = {};
        const std::size_t read = std::fread(text, 1, sizeof text - 1, file);
        std::fclose(file);
        available = read && !std::strstr(text, "[never]");
    }
#endif
    return available;
}

}  // namespace shallow
