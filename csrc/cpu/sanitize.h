// Masked and tile intrinsics and assembly reach memory unseen by sanitizers: these tell them.
// defines: sanitizer_reads sanitizer_writes
#pragma once

#include <cstddef>

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

}  // namespace
}  // namespace shallow
