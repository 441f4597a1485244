// 4 floats a vector of the compiler's own kind, for any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "w4.h"

namespace shallow {
namespace {

struct Lanes {
    typedef float F __attribute__((vector_size(16)));
    static constexpr int count = 4;
    static constexpr int wide = 2;

    static F set(float v) { return F{} + v; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static F min(F a, F b) { return a < b ? a : b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F abs(F v) { return v < 0 ? -v : v; }
    static F sign_of(F magnitude, F sign) { return sign < 0 ? -magnitude : magnitude; }
    static F round(F v) {
        return each(v, [](float x) { return std::nearbyintf(x); });
    }
    static F scale(F v, F n) {
        return v * each(n, [](float x) { return std::ldexp(1.0f, static_cast<int>(x)); });
    }

    static float sum(F v) {
        float total = 0;
        for (int i = 0; i < count; ++i) total += v[i];
        return total;
    }
    static float peak(F v) {
        float largest = v[0];
        for (int i = 1; i < count; ++i) largest = v[i] > largest ? v[i] : largest;
        return largest;
    }

    static F load(const float* p) { return load(p, count); }
    static F load(const std::uint16_t* p) {
        F v;
        for (int i = 0; i < count; ++i) v[i] = w4::half_to_float(p[i]);
        return v;
    }
    static F load(const std::int8_t* p) {
        F v;
        for (int i = 0; i < count; ++i) v[i] = p[i];
        return v;
    }
    static void store(float* p, F v) { store(p, v, count); }
    static void store(std::uint16_t* p, F v) {
        for (int i = 0; i < count; ++i) p[i] = w4::float_to_half(v[i]);
    }
    static void store(std::int8_t* p, F v) {
        for (int i = 0; i < count; ++i) p[i] = static_cast<std::int8_t>(v[i]);
    }

    static F load(const float* p, std::int64_t some) {
        F v{};
        std::memcpy(&v, p, static_cast<std::size_t>(some) * sizeof *p);
        return v;
    }
    static void store(float* p, F v, std::int64_t some) {
        std::memcpy(p, &v, static_cast<std::size_t>(some) * sizeof *p);
    }
    static F first(F v, std::int64_t some) {
        for (std::int64_t i = some; i < count; ++i) v[i] = 0;
        return v;
    }

private:
    template <class Function>
    static F each(F v, Function function) {
        for (int i = 0; i < count; ++i) v[i] = function(v[i]);
        return v;
    }
};

}  // namespace
}  // namespace shallow
