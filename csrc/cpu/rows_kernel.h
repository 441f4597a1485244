// The row operations, once; rows_<isa>.cpp include them after their lanes. Everything is local to
// the including file.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/functions.h"
#include "cpu/rows.h"

namespace shallow {
namespace {

// Of call(i, some), vectors, in four sums side by side, none of which waits for another.
template <class Call>
float sum_of(int64_t n, const Call& call) {
    F sums[4] = {Lanes::set(0), Lanes::set(0), Lanes::set(0), Lanes::set(0)};
    const int64_t whole = n - n % (4 * Lanes::count);
    for (int64_t i = 0; i < whole; i += 4 * Lanes::count)
        for (int j = 0; j < 4; ++j)
            sums[j] = Lanes::add(sums[j], call(i + j * Lanes::count, Lanes::count));
    each_vector(n - whole, [&](int64_t i, int64_t some) {
        sums[0] = Lanes::add(sums[0], call(whole + i, some));
    });
    return Lanes::sum(Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])));
}

void normalise(const Norm& norm, const float* x, float* out, int64_t n) {
    const auto count = static_cast<float>(n);
    const float mean =
        norm.centred ? sum_of(n, [&](int64_t i, int64_t some) { return load(x + i, some); }) / count
                     : 0.0f;
    const F centre = Lanes::set(mean);
    const float variance = sum_of(n,
                                  [&](int64_t i, int64_t some) {
                                      F v = Lanes::sub(load(x + i, some), centre);
                                      if (some < Lanes::count) v = Lanes::first(v, some);
                                      return Lanes::mul(v, v);
                                  }) /
                           count;
    const F factor = Lanes::set(1.0f / std::sqrt(variance + norm.eps));
    each_vector(n, [&](int64_t i, int64_t some) {
        const F v = Lanes::mul(Lanes::sub(load(x + i, some), centre), factor);
        const F offset = norm.bias ? load(norm.bias + i, some) : Lanes::set(0);
        store(out + i, Lanes::fma(v, load(norm.weight + i, some), offset), some);
    });
}

void add(float* x, const float* y, int64_t n) {
    each_vector(n, [&](int64_t i, int64_t some) {
        store(x + i, Lanes::add(load(x + i, some), load(y + i, some)), some);
    });
}

void scale(float* x, float factor, int64_t n) {
    each_vector(n, [&](int64_t i, int64_t some) {
        store(x + i, Lanes::mul(load(x + i, some), Lanes::set(factor)), some);
    });
}

template <Activation A>
inline F activated(F x) {
    const F half = Lanes::mul(x, Lanes::set(0.5f));
    if constexpr (A == Activation::relu) {
        return Lanes::max(Lanes::set(0), x);
    } else if constexpr (A == Activation::silu) {
        const F decay = exponential(Lanes::mul(x, Lanes::set(-1.0f)));
        return Lanes::div(x, Lanes::add(decay, Lanes::set(1.0f)));
    } else if constexpr (A == Activation::gelu) {
        return Lanes::fma(half, error_function(Lanes::mul(x, Lanes::set(0.70710678f))), half);
    } else {
        const F inner = fma(Lanes::mul(x, x), Lanes::set(0.7978845608f * 0.044715f), 0.7978845608f);
        return Lanes::fma(half, hyperbolic_tangent(Lanes::mul(x, inner)), half);
    }
}

template <Activation A>
void activate_by(const float* gate, float* x, int64_t n) {
    each_vector(n, [&](int64_t i, int64_t some) {
        const F v = load(x + i, some);
        store(x + i, gate ? Lanes::mul(activated<A>(load(gate + i, some)), v) : activated<A>(v),
              some);
    });
}

void activate(Activation activation, const float* gate, float* x, int64_t n) {
    switch (activation) {
        case Activation::silu: return activate_by<Activation::silu>(gate, x, n);
        case Activation::gelu: return activate_by<Activation::gelu>(gate, x, n);
        case Activation::gelu_tanh: return activate_by<Activation::gelu_tanh>(gate, x, n);
        case Activation::relu: return activate_by<Activation::relu>(gate, x, n);
    }
}

void rotate(float* x, const float* angles, int64_t half) {
    each_vector(half, [&](int64_t i, int64_t some) {
        const F a = load(x + i, some), b = load(x + half + i, some);
        const F cosine = load(angles + i, some), sine = load(angles + half + i, some);
        store(x + i, Lanes::sub(Lanes::mul(a, cosine), Lanes::mul(b, sine)), some);
        store(x + half + i, Lanes::fma(b, cosine, Lanes::mul(a, sine)), some);
    });
}

void softcap(float* x, float cap, int64_t n) {
    each_vector(n, [&](int64_t i, int64_t some) {
        const F v = hyperbolic_tangent(Lanes::mul(load(x + i, some), Lanes::set(1.0f / cap)));
        store(x + i, Lanes::mul(v, Lanes::set(cap)), some);
    });
}

float peak(const float* x, int64_t n) {  // NaN where one is
    const int64_t whole = n - n % Lanes::count;
    F top = Lanes::set(x[0]), total = Lanes::set(0);
    each_vector(whole, [&](int64_t i, int64_t) {
        const F v = Lanes::load(x + i);
        top = Lanes::max(top, v);
        total = Lanes::add(total, Lanes::min(Lanes::set(1), v));  // NaN only where v is
    });
    float found = Lanes::peak(top), sum = Lanes::sum(total);
    for (int64_t i = whole; i < n; ++i) {
        found = std::max(found, x[i]);
        sum += std::min(x[i], 1.0f);
    }
    return std::isnan(sum) ? sum : found;
}

int64_t largest(const float* x, int64_t n) {
    constexpr int64_t some = 256;
    float best = -INFINITY;
    int64_t at = 0;
    for (int64_t i = 0; i < n; i += some) {
        const float top = peak(x + i, std::min(some, n - i));
        if (std::isnan(top)) return -1;
        if (top > best) best = top, at = i;
    }
    return std::find(x + at, x + n, best) - x;
}

constexpr RowKernels make_row_kernels() {
    RowKernels kernels{};
    kernels.normalise = normalise;
    kernels.add = add;
    kernels.scale = scale;
    kernels.activate = activate;
    kernels.rotate = rotate;
    kernels.softcap = softcap;
    kernels.largest = largest;
    return kernels;
}

}  // namespace
}  // namespace shallow
