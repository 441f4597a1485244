// Rows by vectors, and exp, tanh and erf to about 2e-7. Included after one of lanes_<isa>.h.
#pragma once

#include <cstdint>

namespace shallow {
namespace {

using F = Lanes::F;
using std::int64_t;

// body(i, some) for every vector of n floats, `some` of whose lanes count.
template <class Body>
inline void each_vector(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + Lanes::count <= n; i += Lanes::count) body(i, int64_t{Lanes::count});
    if (i < n) body(i, n - i);
}

inline F load(const float* p, int64_t some) {
    return some == Lanes::count ? Lanes::load(p) : Lanes::load(p, some);
}

inline void store(float* p, F v, int64_t some) {
    some == Lanes::count ? Lanes::store(p, v) : Lanes::store(p, v, some);
}

inline F fma(F a, F b, float c) { return Lanes::fma(a, b, Lanes::set(c)); }

inline F exponential(F x) {
    x = Lanes::max(Lanes::set(-87.3f), x);  // NaN, the second operand, stays
    x = Lanes::min(Lanes::set(88.3f), x);
    const F n = Lanes::round(Lanes::mul(x, Lanes::set(1.44269504f)));
    F r = Lanes::fma(n, Lanes::set(-0.693359375f), x);  // ln 2 in two parts
    r = Lanes::fma(n, Lanes::set(2.12194440e-4f), r);
    F p = fma(r, Lanes::set(1.9875691500e-4f), 1.3981999507e-3f);
    p = fma(p, r, 8.3334519073e-3f);
    p = fma(p, r, 4.1665795894e-2f);
    p = fma(p, r, 1.6666665459e-1f);
    p = fma(p, r, 5.0000001201e-1f);
    p = Lanes::add(Lanes::fma(Lanes::mul(p, r), r, r), Lanes::set(1.0f));
    return Lanes::scale(p, n);
}

inline F inverse(F x) { return Lanes::div(Lanes::set(1.0f), x); }

inline F hyperbolic_tangent(F x) {
    const F grown = exponential(Lanes::mul(Lanes::abs(x), Lanes::set(2.0f)));
    const F rest = inverse(Lanes::add(grown, Lanes::set(1.0f)));
    return Lanes::sign_of(fma(rest, Lanes::set(-2.0f), 1.0f), x);
}

// Abramowitz and Stegun, 7.1.26.
inline F error_function(F x) {
    const F a = Lanes::abs(x), t = inverse(fma(a, Lanes::set(0.3275911f), 1.0f));
    F p = fma(t, Lanes::set(1.061405429f), -1.453152027f);
    p = fma(p, t, 1.421413741f);
    p = fma(p, t, -0.284496736f);
    p = fma(p, t, 0.254829592f);
    p = Lanes::mul(p, t);
    const F tail = exponential(Lanes::mul(Lanes::mul(a, a), Lanes::set(-1.0f)));
    return Lanes::sign_of(fma(Lanes::mul(p, tail), Lanes::set(-1.0f), 1.0f), x);
}

}  // namespace
}  // namespace shallow
