// What the thread pool promises, as assertions; test_threads.py compiles and runs it.
#undef NDEBUG
#include "cpu/threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using shallow::Barrier;
using shallow::parallel_for;
using shallow::Pool;

namespace {

std::atomic<int> running{0};  // threads inside regions of the whole process

void regions_run_each_thread_once(int threads) {
    std::vector<int> hits(64, 0);
    int count = 0;
    Pool::instance().run(threads, [&](int thread, int of) {
        assert(++running <= Pool::instance().size());
        ++hits[thread];
        if (thread == 0) count = of;
        Pool::instance().run(4, [](int inner, int alone) { assert(inner == 0 && alone == 1); });
        --running;
    });
    assert(count >= 1 && count <= threads);
    for (int i = 0; i < 64; ++i) assert(hits[i] == (i < count));
}

void barriers_keep_step(int threads) {
    Barrier barrier;
    std::vector<int> step(64, -1);
    Pool::instance().run(threads, [&](int thread, int count) {
        for (int i = 0; i < 200; ++i) {
            step[thread] = i;
            barrier.wait(count);
            for (int other = 0; other < count; ++other) assert(step[other] == i);
            barrier.wait(count);
        }
    });
}

void loops_cover_their_range(int threads) {
    for (int64_t count : {0, 1, 7, 1000})
        for (int64_t chunk : {1, 3, 64}) {
            std::vector<int> hits(count, 0);
            parallel_for(threads, count, chunk, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) ++hits[i];
            });
            assert(std::count(hits.begin(), hits.end(), 1) == count);
        }
}

// What ThreadSanitizer must report.
void race() {
    int count = 0;
    Pool::instance().resize(2);
    Pool::instance().run(2, [&](int, int) { ++count; });
}

void all(int threads, int repeats) {
    for (int i = 0; i < repeats; ++i) {
        regions_run_each_thread_once(threads);
        barriers_keep_step(threads);
        loops_cover_their_range(threads);
    }
}

}  // namespace

int main(int, char** argv) {
    if (std::strcmp(argv[1], "granted") == 0)
        return std::printf("%d\n", shallow::granted_cpus(std::atoi(argv[2]), argv[3], argv[4])), 0;
    Pool& pool = Pool::instance();
    assert(pool.size() >= 1);
    if (std::strcmp(argv[1], "race") == 0) return race(), 0;
    all(pool.size(), 20);
    pool.resize(3);
    for (int threads = 1; threads <= 4; ++threads) all(threads, 5);

    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) callers.emplace_back(all, 1 + i % 3, 10);
    callers.emplace_back([&] {
        for (int size : {2, 1, 3}) pool.resize(size);
    });
    for (std::thread& caller : callers) caller.join();

    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // workers fall asleep
    all(3, 1);

    if (std::strcmp(argv[1], "fork") != 0) return 0;
    const pid_t child = fork();
    if (child == 0) {
        all(2, 3);
        _exit(0);
    }
    int status = -1;
    assert(waitpid(child, &status, 0) == child && status == 0);
    all(3, 1);
}
