#include "cpu/features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace shallow {
namespace {

#if defined(__x86_64__)

struct Leaf {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    Leaf(uint32_t leaf, uint32_t subleaf) {
        // zeros where there is no such leaf
        __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
    }
};

bool bit(uint32_t word, int index) { return word >> index & 1; }

bool by_amd() {
    const Leaf vendor(0, 0);
    return vendor.ebx == 0x68747541 && vendor.edx == 0x69746e65 && vendor.ecx == 0x444d4163;
}

// XCR0: the register states that the operating system saves.
uint64_t saved_states() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

Features detect() {
    const Leaf basic(1, 0), extended(7, 0), more(7, 1);
    const uint64_t states = bit(basic.ecx, 27) ? saved_states() : 0;
    const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6;
    const bool tiles = (states & 0x60000) == 0x60000;
    Features f;
    f.fma = ymm && bit(basic.ecx, 12);
    f.f16c = ymm && bit(basic.ecx, 29);
    f.avx2 = ymm && bit(extended.ebx, 5);
    f.avx_vnni = ymm && bit(more.eax, 4);
    f.avx512f = zmm && bit(extended.ebx, 16);
    f.avx512dq = zmm && bit(extended.ebx, 17);
    f.avx512bw = zmm && bit(extended.ebx, 30);
    f.avx512vl = zmm && bit(extended.ebx, 31);
    f.avx512_vnni = zmm && bit(extended.ecx, 11);
    f.avx512_bf16 = zmm && bit(more.eax, 5);
    f.amx_bf16 = tiles && bit(extended.edx, 22);
    f.amx_tile = tiles && bit(extended.edx, 24);
    f.amx_int8 = tiles && bit(extended.edx, 25);
    return f;
}

#elif defined(__aarch64__)

Features detect() {
    Features f;
    f.neon = true;
#if defined(__linux__)
    f.neon_dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
    f.neon_i8mm = getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#else
#if defined(__ARM_FEATURE_DOTPROD)
    f.neon_dotprod = true;
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    f.neon_i8mm = true;
#endif
#endif
    return f;
}

#else

Features detect() { return {}; }

#endif

#if !defined(__x86_64__)
bool by_amd() { return false; }
#endif

// AMD's generations, told apart by the feature that each was the first to have: AVX-VNNI (Zen 5) and
// AVX-512 (Zen 4).
enum class Core { zen, zen4, zen5, other };

Core core() {
    static const Core found = kEmulates || !by_amd() ? Core::other
                              : features().avx_vnni  ? Core::zen5
                              : features().avx512f   ? Core::zen4
                                                     : Core::zen;
    return found;
}

}  // namespace

const Features& features() {
    static const Features found = detect();
    return found;
}

int bytes_ahead(bool twice) {
    switch (core()) {
        case Core::zen4: return twice ? 5120 : 2048;
        case Core::zen5: return 4096;
        default: return 2048;
    }
}

bool fetches_twice(bool holds_codes, std::int64_t rows) {
    switch (core()) {
        case Core::zen5: return false;
        case Core::other: return !holds_codes || (features().avx512f && rows > 1);
        default: return !holds_codes;
    }
}

bool unpacks_nibbles() { return core() == Core::other; }

bool passes_512_in_halves() { return core() == Core::zen4; }

int page_bytes_ahead(std::int64_t positions, std::int64_t most) {
    const bool whole = positions == most;
    switch (core()) {
        case Core::zen4: return whole ? 4096 : 2 * positions < most ? 0 : 1024;
        case Core::zen5: return whole ? 8192 : 1024;
        default: return 1024;
    }
}

int long_streams(std::int64_t rows) {
    switch (core()) {
        case Core::zen4: return rows == 1 ? 2 : 1;
        case Core::zen5:
        case Core::zen: return 2;
        default: return 4;
    }
}

}  // namespace shallow
