// Masked and tile intrinsics and assembly reach memory unseen by sanitizers: these tell them.
// defines: sanitizer_reads sanitizer_writes sanitizer_forbids sanitizer_allows kSanitizerGap
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define SHALLOW_READS __asan_loadN
#define SHALLOW_WRITES __asan_storeN
#elif defined(__SANITIZE_THREAD__)
#define SHALLOW_READS __tsan_read_range
#define SHALLOW_WRITES __tsan_write_range
#endif

#if defined(SHALLOW_READS)
extern "C" void SHALLOW_READS(void* from, std::size_t bytes);
extern "C" void SHALLOW_WRITES(void* to, std::size_t bytes);
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const void* from, std::size_t bytes);
extern "C" void __asan_unpoison_memory_region(const void* from, std::size_t bytes);
#endif

namespace shallow {
namespace {  // shared by files compiled for different instruction sets

inline void sanitizer_reads([[maybe_unused]] const void* from, [[maybe_unused]] std::size_t bytes) {
#if defined(SHALLOW_READS)
    SHALLOW_READS(const_cast<void*>(from), bytes);
#endif
}

inline void sanitizer_writes([[maybe_unused]] void* to, [[maybe_unused]] std::size_t bytes) {
#if defined(SHALLOW_WRITES)
    SHALLOW_WRITES(to, bytes);
#endif
}

// Whoever touches these bytes is reported by AddressSanitizer, until they are allowed again.
inline void sanitizer_forbids([[maybe_unused]] const void* from,
                              [[maybe_unused]] std::int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(from, static_cast<std::size_t>(bytes));
#endif
}

inline void sanitizer_allows([[maybe_unused]] const void* from,
                             [[maybe_unused]] std::int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(from, static_cast<std::size_t>(bytes));
#endif
}

}  // namespace

// Between the parts of one allocation: bytes in which AddressSanitizer is to see an overrun.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::int64_t kSanitizerGap = 256;
#else
constexpr std::int64_t kSanitizerGap = 0;
#endif

}  // namespace shallow
