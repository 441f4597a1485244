// Instruction sets a kernel may be compiled for, and which of them this processor runs.
// defines: Isa isa_name isa_from_name isa_supported best_isa
#pragma once

#include <string>

namespace shallow {

// In order of preference. Names are the suffixes of the files compiled for them.
enum class Isa : int {
    generic,
    avx2,     // AVX2, FMA, F16C
    avxvnni,  // avx2 and 256-bit int8 dot products
    avx512,   // AVX-512 F, BW, DQ, VL, VNNI
    amx,      // avx512 and tile products of int8 and bfloat16
    neon,     // 64-bit ARM
    dotprod,  // neon and int8 dot products
    i8mm,     // dotprod and products of unsigned and signed bytes
};
constexpr int kIsas = 8;

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::invalid_argument
bool isa_supported(Isa isa);                 // by processor and operating system
Isa best_isa();

}  // namespace shallow
