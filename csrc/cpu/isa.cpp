#include "isa.h"

#include <stdexcept>

#ifdef SHALLOW_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shallow {
namespace {

constexpr const char* kNames[kIsas] = {"generic", "avx2", "avxvnni", "avx512", "amx"};

#ifdef SHALLOW_X86
struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers extended_features(unsigned subleaf) {
    Registers r;
    __get_cpuid_count(7, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// Linux grants the 8 KiB of tile state only to a process that asks.
bool tiles_granted() {
#ifdef __linux__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool detect(Isa isa) {
    // These builtins also ask whether the operating system saves the registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni");
    switch (isa) {
        case Isa::generic: return true;
        case Isa::avx2: return avx2;
        case Isa::avxvnni: return avx2 && (extended_features(1).eax >> 4 & 1);
        case Isa::avx512: return avx512;
        case Isa::amx: break;
    }
    constexpr unsigned kTileAndInt8 = 3u << 24;
    return avx512 && (extended_features(0).edx & kTileAndInt8) == kTileAndInt8 && tiles_granted();
}
#else
bool detect(Isa isa) { return isa == Isa::generic; }
#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
    for (int i = 0; i < kIsas; ++i)
        if (name == kNames[i]) return static_cast<Isa>(i);
    throw std::invalid_argument("isa must be one of generic, avx2, avxvnni, avx512, amx, found '" +
                                name + "'");
}

bool isa_supported(Isa isa) {
    static const unsigned found = [] {
        unsigned bits = 0;
        for (int i = 0; i < kIsas; ++i) bits |= unsigned{detect(static_cast<Isa>(i))} << i;
        return bits;
    }();
    return found >> static_cast<int>(isa) & 1;
}

Isa best_isa() {
    int best = kIsas - 1;
    while (!isa_supported(static_cast<Isa>(best))) --best;
    return static_cast<Isa>(best);
}

}  // namespace shallow
