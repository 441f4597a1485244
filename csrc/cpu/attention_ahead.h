// Keys and values fetched before they are read. Everything is local to the including file.
#pragma once

#include <algorithm>
#include <cstdint>

namespace shallow {
namespace {

using std::int64_t;

constexpr int64_t kLine = 64;  // bytes of a cache line

// What a thread reads next, one kv head of a page, to be fetched into L2 meanwhile: a line of each of
// six streams in turn, since so many come faster than one (benchmarks/results/decoder.md).
class Ahead {
public:
    static constexpr int kStreams = 6;

    explicit Ahead(int64_t near) : near(near) {}

    // `bytes` from `from` on, as the next `streams` of the streams, three or six.
    void add(const void* from, int64_t bytes, int streams) {
        int64_t length = (bytes - 1) / (streams * kLine) + 1;
        // Streams a multiple of 4 KiB apart lie in the same sets of L1, and a Zen 4 takes half as
        // long again for them.
        if (length % 64 == 0) ++length;
        length *= kLine;
        for (int i = 0; i < streams; ++i, ++count_) {
            starts_[count_] = static_cast<const char*>(from) + i * length;
            ends_[count_ / kHalf] = length;
        }
    }

    // The next line of each stream that has one; returns whether any had.
    bool fetch_next() {
        bool any = false;
        for (int half = 0; half < kStreams; half += kHalf) {
            if (at_ >= ends_[half / kHalf]) continue;
            for (int i = 0; i < kHalf; ++i) __builtin_prefetch(starts_[half + i] + at_, 0, 2);
            any = true;
        }
        at_ += kLine;
        return any;
    }

    const int64_t near;  // bytes from what is read now to what goes into L1; 0: nothing does

private:
    static constexpr int kHalf = kStreams / 2;

    const char* starts_[kStreams];
    int64_t ends_[2];  // bytes of each stream of a half
    int64_t at_ = 0;
    int count_ = 0;
};

// step(i) for i < n, each of which reads `bytes` bytes; between them, what comes next is fetched.
// ahead: null where other rows have done so.
template <int64_t bytes, class Step>
inline __attribute__((always_inline)) void fetching(Ahead* ahead, int64_t n, const Step& step) {
    constexpr int64_t kSteps = Ahead::kStreams * kLine / bytes;
    static_assert(kSteps > 0, "one call of fetch_next() covers what these steps read");
    for (int64_t i = 0; i < n;) {
        if (ahead) ahead->fetch_next();
        for (const int64_t end = std::min(i + kSteps, n); i < end; ++i) step(i);
    }
}

// What is read soon after `bytes` bytes at `here`, into L1.
inline void fetch_near(const Ahead* ahead, const void* here, int64_t bytes) {
    if (!ahead || !ahead->near) return;
    for (int64_t at = 0; at < bytes; at += kLine)
        __builtin_prefetch(static_cast<const char*>(here) + ahead->near + at, 0, 3);
}

}  // namespace
}  // namespace shallow
