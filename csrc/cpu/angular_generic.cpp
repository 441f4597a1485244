#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/angular.h"

namespace shallow {
namespace {

constexpr int kSumLanes = 4;

double widen(double value) { return value; }
double widen(float value) { return value; }

double widen(Bfloat value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

double widen(Half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const double size = exponent == 0    ? std::ldexp(fraction, -24)
                        : exponent == 31 ? (fraction ? NAN : INFINITY)
                                         : std::ldexp(fraction + 1024, exponent - 25);
    return value.bits & 0x8000 ? -size : size;
}

// Four float64 lanes that a compiler keeps in whatever vector registers it may use.
struct Wide {
    using Lane = double;
    struct Vector {
        double lane[4];
    };
    static constexpr int W = 4, kRows = 2, kBlock = 256;
    static Vector zero() { return {}; }
    static Vector fma(const Vector& a, const Vector& b, Vector c) {
        for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static void store(double* p, const Vector& v) { std::memcpy(p, v.lane, sizeof v); }
    static void fold(double* sums, const Vector& v) {
        for (int i = 0; i < W; ++i) sums[i] += v.lane[i];
    }
    template <class T>
    static Vector load(const T* p) {
        return {{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
    }
};
using Narrow = Wide;
using BfloatTiles = void;

}  // namespace
}  // namespace shallow

#include "cpu/angular_kernel.h"

void shallow::angular_generic(const AngularJob& job, int64_t begin, int64_t end, double* sums) {
    run_typed(job, begin, end, sums);
}
