#include "cpu/isa.h"

#include <stdexcept>

#include "cpu/features.h"

#if defined(SHALLOW_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shallow {
namespace {

constexpr const char* kNames[kIsas] = {"generic", "avx2", "avxvnni", "avx512",
                                       "amx",     "neon", "dotprod", "i8mm"};

// Linux grants the 8 KiB of tile state only to a process that asks.
bool tiles_granted() {
#if defined(SHALLOW_X86) && defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool detect(Isa isa) {
    const Features& f = features();
    const bool avx2 = f.avx2 && f.fma && f.f16c;
    const bool avx512 =
        avx2 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512_vnni;
    switch (isa) {
        case Isa::generic: return true;
        case Isa::avx2: return avx2;
        case Isa::avxvnni: return kEmulates ? avx512 : avx2 && f.avx_vnni;
        case Isa::avx512: return avx512;
        case Isa::amx:
            return avx512 && f.avx512_bf16 &&
                   (kEmulates || (f.amx_tile && f.amx_int8 && f.amx_bf16 && tiles_granted()));
        case Isa::neon: return f.neon;
        case Isa::dotprod: return f.neon && f.neon_dotprod;
        case Isa::i8mm: return f.neon && f.neon_dotprod && f.neon_i8mm;
    }
    return false;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
    for (int i = 0; i < kIsas; ++i)
        if (name == kNames[i]) return static_cast<Isa>(i);
    std::string known;
    for (const char* each : kNames) known += std::string(known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("isa must be one of " + known + ", found '" + name + "'");
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
