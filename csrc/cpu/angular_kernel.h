// The angular kernel, once; angular_<isa>.cpp include it after defining their vectors. Everything
// has internal linkage, so that no copy compiled for one instruction set stands in for another.
//
// A vector type V holds W lanes of V::Lane and gives
//   Vector load(const Lane*)  Vector load(const T*)  for the input types T, converting
//   Vector zero()  Vector fma(a, b, c)  void store(Lane*, Vector)
//   void fold(double* sums, Vector)   adds the lanes to kSumLanes float64 running sums
//   kRows: side of the register tile     kBlock: features between two folds
// Wide has float64 lanes. Narrow has float32 lanes and serves 16-bit inputs, whose products are
// exact in float32; its sums are folded after 16 terms a lane. BfloatTiles is void, or a class that
// replaces Narrow for bfloat16 and sums as few terms in float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/angular.h"

namespace shallow {
namespace {

// Narrow sums err by up to 3e-7 of the norms, and an angle by that over its sine: pairs nearer than
// 0.2 radians to parallel or opposite are computed again, in float64.
constexpr double kCloseCosine2 = 0.96;
// Beyond these squared norms, float32 squares of features may overflow or lose digits.
constexpr double kLeastSquare = 1e-20, kMostSquare = 1e30;

// Pairs of `rows` boundaries from `row` on with `columns` from `column` on; where the two ranges
// are one, only its pairs r <= c.
struct Tile {
    int row, column, rows, columns;
    bool diagonal() const { return row == column && rows == columns; }
    int lanes() const { return rows * columns * kSumLanes; }
};

// sums[r][c] += a[r] . b[c] over n features, n a multiple of W; rows are kBlock apart.
template <class V, int R, int C, bool kDiagonal>
void multiply_tile(const typename V::Lane* a, const typename V::Lane* b, int n, double* sums) {
    typename V::Vector s[R][C];
    for (auto& row : s)
        for (auto& sum : row) sum = V::zero();
    for (int k = 0; k < n; k += V::W) {
        typename V::Vector y[C];
        for (int c = 0; c < C; ++c) y[c] = V::load(b + c * V::kBlock + k);
        for (int r = 0; r < R; ++r) {
            const auto x = kDiagonal ? y[r] : V::load(a + r * V::kBlock + k);
            for (int c = kDiagonal ? r : 0; c < C; ++c) s[r][c] = V::fma(x, y[c], s[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = kDiagonal ? r : 0; c < C; ++c)
            V::fold(sums + (r * C + c) * kSumLanes, s[r][c]);
}

template <class V>
using TileProduct = void (*)(const typename V::Lane*, const typename V::Lane*, int, double*);

template <class V, int R = V::kRows, int C = V::kRows>
TileProduct<V> product_of(const Tile& tile) {
    if constexpr (R > 1)
        if (tile.rows < R) return product_of<V, R - 1, C>(tile);
    if constexpr (C > 1)
        if (tile.columns < C) return product_of<V, R, C - 1>(tile);
    if constexpr (R == C)
        if (tile.diagonal()) return multiply_tile<V, R, C, true>;
    return multiply_tile<V, R, C, false>;
}

// Reads n features, writes them rounded up to whole vectors with zeros; returns that length.
template <class V, class T>
int stage(const T* source, int n, typename V::Lane* target) {
    int k = 0;
    for (; k + V::W <= n; k += V::W) V::store(target + k, V::load(source + k));
    if (k < n) {
        T rest[V::W] = {};
        std::memcpy(rest, source + k, (n - k) * sizeof(T));
        V::store(target + k, V::load(rest));
        k += V::W;
    }
    return k;
}

// One sample at a time: its Gram matrix, then the distances.
template <class T>
class Sampler {
public:
    Sampler(const AngularJob& job, int64_t end)
        : job_(job), end_(end), R_(job.R), strips_((R_ + Wide::kRows - 1) / Wide::kRows),
          stage_(R_ * std::max(sizeof(double) * Wide::kBlock, sizeof(float) * Narrow::kBlock)),
          lanes_(sizeof(double) * kSumLanes * Wide::kRows * Wide::kRows * tiles()),
          gram_(sizeof(double) * R_ * R_), inverse_(sizeof(double) * R_),
          all_(sizeof(Tile) * tiles()), close_(sizeof(Tile) * tiles()), used_(R_), own_tiles_(R_) {
        Tile* tile = static_cast<Tile*>(all_.data);
        for (int i = 0; i < strips_; ++i)
            for (int j = i; j < strips_; ++j)
                *tile++ = {start(i), start(j), start(i + 1) - start(i), start(j + 1) - start(j)};
    }

    void run(int64_t sample, double* sums) {
        const double weight = job_.weights ? job_.weights[sample] : 1;
        if (weight == 0) {
            for (int i = 0; i < R_; ++i) job_.squares[i * job_.B + sample] = 1;
            for (int64_t p = 0; job_.values && p < pairs(); ++p)
                job_.values[sample * pairs() + p] = 0;
            return;
        }
        const Tile* all = static_cast<const Tile*>(all_.data);
        if constexpr (sizeof(T) == 2 && !std::is_same_v<Wide, Narrow>) {
            if constexpr (kOwnTiles)
                own_tiles_.multiply([&](int i) { return source(i, sample, 0); }, job_.D,
                                    &gram(0, 0));
            else
                multiply<Narrow>(sample, all, tiles(), true);
            Tile* close = static_cast<Tile*>(close_.data);
            if (const int count = find_close(close)) multiply<Wide>(sample, close, count, false);
        } else {
            multiply<Wide>(sample, all, tiles(), true);
        }
        finish(sample, weight, sums);
    }

private:
    static_assert(Wide::kRows == Narrow::kRows);
    static constexpr bool kOwnTiles = std::is_same_v<T, Bfloat> && !std::is_void_v<BfloatTiles>;
    struct None {
        explicit None(int) {}
    };

    int64_t pairs() const { return int64_t(R_) * (R_ - 1) / 2; }
    int tiles() const { return strips_ * (strips_ + 1) / 2; }
    // Strips differ by at most one row: no thin tiles, with fewer sums than an FMA's latency.
    int start(int strip) const { return strip * R_ / strips_; }
    double& gram(int i, int j) const { return static_cast<double*>(gram_.data)[i * R_ + j]; }
    bool& used(int i) const { return static_cast<bool*>(used_.data)[i]; }
    const T* source(int i, int64_t sample, int64_t d) const {
        return static_cast<const T*>(job_.rows[i]) + sample * job_.strides[i] + d;
    }

    // The Gram matrix at the tiles; boundaries of no tile are not read.
    template <class V>
    void multiply(int64_t sample, const Tile* tiles, int count, bool first) {
        auto* staged = static_cast<typename V::Lane*>(stage_.data);
        double* const sums = static_cast<double*>(lanes_.data);
        double* lanes = sums;
        std::memset(used_.data, 0, R_);
        for (int t = 0; t < count; lanes += tiles[t++].lanes()) {
            for (int r = 0; r < tiles[t].rows; ++r) used(tiles[t].row + r) = true;
            for (int c = 0; c < tiles[t].columns; ++c) used(tiles[t].column + c) = true;
        }
        std::fill(sums, lanes, 0.0);
        for (int64_t d = 0; d < job_.D; d += V::kBlock) {
            const int n = int(std::min<int64_t>(V::kBlock, job_.D - d));
            int length = 0;
            for (int i = 0; i < R_; ++i)
                if (used(i)) length = stage<V>(source(i, sample, d), n, staged + i * V::kBlock);
            lanes = sums;
            for (int t = 0; t < count; ++t) {
                const Tile& tile = tiles[t];
                if (first) prefetch<V>(t * R_ / count, (t + 1) * R_ / count, sample, d + V::kBlock);
                product_of<V>(tile)(staged + tile.row * V::kBlock, staged + tile.column * V::kBlock,
                                    length, lanes);
                lanes += tile.lanes();
            }
        }
        lanes = sums;
        for (int t = 0; t < count; ++t)
            for (int r = 0; r < tiles[t].rows; ++r)
                for (int c = 0; c < tiles[t].columns; ++c, lanes += kSumLanes) {
                    double sum = 0;
                    for (int lane = 0; lane < kSumLanes; ++lane) sum += lanes[lane];
                    gram(tiles[t].row + r, tiles[t].column + c) = sum;
                }
    }

    // Asks for a block of some boundaries, of the next sample after the last block.
    template <class V>
    void prefetch(int begin, int end, int64_t sample, int64_t d) const {
        if (d >= job_.D) d = 0, ++sample;
        if (sample == end_) return;
        const int bytes = int(std::min<int64_t>(V::kBlock, job_.D - d)) * int(sizeof(T));
        for (int i = begin; i < end; ++i) {
            const char* next = reinterpret_cast<const char*>(source(i, sample, d));
            for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte, 0, 2);
        }
    }

    // Of every tile, the part that covers the pairs that float32 sums do not settle, and the norms
    // these need; returns how many tiles that leaves.
    int find_close(Tile* close) const {
        std::memset(used_.data, 0, R_);
        for (int i = 0; i < R_; ++i)
            for (int j = i; j < R_; ++j)
                if (doubtful(i, j)) used(i) = used(j) = true;
        int count = 0;
        const Tile* all = static_cast<const Tile*>(all_.data);
        for (int t = 0; t < tiles(); ++t) {
            const int bottom = all[t].row + all[t].rows, right = all[t].column + all[t].columns;
            int first = R_, last = -1, left = R_, most = -1;
            for (int i = all[t].row; i < bottom; ++i)
                for (int j = std::max(i, all[t].column); used(i) && j < right; ++j) {
                    if (i != j && !doubtful(i, j)) continue;
                    first = std::min(first, i), last = i;
                    left = std::min(left, j), most = std::max(most, j);
                }
            if (last >= 0) close[count++] = {first, left, last - first + 1, most - left + 1};
        }
        return count;
    }

    bool doubtful(int i, int j) const {
        const double ii = gram(i, i), jj = gram(j, j), ij = gram(i, j);
        const bool plain =
            ii > kLeastSquare && ii < kMostSquare && jj > kLeastSquare && jj < kMostSquare;
        return !plain || (i != j && !(ij * ij <= kCloseCosine2 * ii * jj));
    }

    void finish(int64_t sample, double weight, double* sums) {
        auto* inverse = static_cast<double*>(inverse_.data);
        for (int i = 0; i < R_; ++i) {
            job_.squares[i * job_.B + sample] = gram(i, i);
            inverse[i] = 1 / std::sqrt(gram(i, i));
        }
        const int64_t P = pairs();
        double* value = job_.values ? job_.values + sample * P : nullptr;
        for (int i = 0; i < R_ - 1; ++i)
            for (int j = i + 1; j < R_; ++j, ++sums) {
                const double cosine = gram(i, j) * inverse[i] * inverse[j];
                const double distance = angle_over_pi(cosine);
                const double apart = gram(i, i) + gram(j, j) - 2 * gram(i, j);
                sums[0] += weight * distance;
                sums[P] += weight * distance * distance;
                sums[2 * P] += weight * cosine;
                sums[3 * P] += weight * std::sqrt(std::max(apart, 0.0)) * inverse[j];
                if (value) *value++ = distance;
            }
    }

    // arccos(cosine) / pi; the rational function is fdlibm's for arcsin on [0, 0.5].
    static double angle_over_pi(double cosine) {
        const double a = std::min(std::fabs(cosine), 1.0);
        const bool central = a < 0.5;
        const double z = central ? a * a : (1 - a) / 2;
        const double s = central ? a : std::sqrt(z);
        // clang-format off
        const double p = z * (0.16666666666666666 + z * (-0.3255658186224009 +
            z * (0.20121253213486293 + z * (-0.04005553450067941 +
            z * (7.915349942898145e-4 + z * 3.479331075960212e-5)))));
        const double q = 1 + z * (-2.403394911734414 + z * (2.0209457602335057 +
            z * (-0.6882839716054533 + z * 0.07703815055590194)));
        // clang-format on
        const double arcsine = s + s * (p / q);
        const double angle = (central ? kPi / 2 - arcsine : 2 * arcsine) / kPi;
        return cosine < 0 ? 1 - angle : angle;
    }

    static constexpr double kPi = 3.14159265358979323846;
    const AngularJob& job_;
    const int64_t end_;
    const int R_, strips_;
    // stage: (R, kBlock) lanes; lanes: kSumLanes for each pair of the tiles; gram: (R, R), upper
    // triangle; inverse: (R,) 1 / norm; all, close: (tiles,) Tile; used: (R,) bool, whether a tile
    // of the current list has the boundary
    Scratch stage_, lanes_, gram_, inverse_, all_, close_, used_;
    std::conditional_t<kOwnTiles, BfloatTiles, None> own_tiles_;
};

template <class T>
void run_samples(const AngularJob& job, int64_t begin, int64_t end, double* sums) {
    Sampler<T> sampler(job, end);
    for (int64_t sample = begin; sample < end; ++sample) sampler.run(sample, sums);
}

void run_typed(const AngularJob& job, int64_t begin, int64_t end, double* sums) {
    switch (job.type) {
        case Float::f64: return run_samples<double>(job, begin, end, sums);
        case Float::f32: return run_samples<float>(job, begin, end, sums);
        case Float::f16: return run_samples<Half>(job, begin, end, sums);
        case Float::bf16: return run_samples<Bfloat>(job, begin, end, sums);
    }
}

}  // namespace
}  // namespace shallow
