#include "cpu/threads.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#ifdef SHALLOW_X86
#include <immintrin.h>
#endif

namespace shallow {
namespace {

// Covers the gap between two kernels called from Python; a thread that waits longer leaves its core to others.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kPauses = 32;

void pause() {
#ifdef SHALLOW_X86
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What a control group of either version leaves of `most`: its time over its period, if it is limited.
int limited(const std::string& group, int most) {
    double quota = -1, period = 0;
    std::ifstream(group + "/cpu.max") >> quota >> period;  // "max 100000": neither
    std::ifstream(group + "/cpu.cfs_quota_us") >> quota;   // -1: no limit
    std::ifstream(group + "/cpu.cfs_period_us") >> period;
    if (quota <= 0 || period <= 0) return most;
    return static_cast<int>(std::clamp(quota / period + 0.5, 1.0, static_cast<double>(most)));
}

int usable_cpus() {
    int cpus = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#endif
    return granted_cpus(std::max(1, cpus), "/proc/self/cgroup", "/sys/fs/cgroup");
}

thread_local bool inside_region = false;
std::atomic<Pool*> the_pool{nullptr};
std::atomic<int> the_forks{0};

}  // namespace

int granted_cpus(int most, const std::string& groups, const std::string& root) {
    std::ifstream file(groups);
    for (std::string line; std::getline(file, line);) {
        const auto names = line.find(':') + 1, path = line.find(':', names);
        if (names == 0 || path == std::string::npos) continue;
        const std::string controllers = "," + line.substr(names, path - names) + ",";
        const bool unified = controllers == ",,";
        if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
        const std::string top = unified ? root : root + "/cpu";
        // In a container the path may be the host's, of which only the top is there.
        for (std::string group = line.substr(path + 1);; group.resize(group.rfind('/'))) {
            most = limited(top + group, most);
            if (group.find('/') == std::string::npos) break;
        }
    }
    return most;
}

int forks_so_far() { return the_forks.load(std::memory_order_acquire); }

void Signal::advance() {
    // seq_cst here and in wait_past: either this thread sees the sleeper or the sleeper sees the
    // new value before it sleeps.
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    {
        std::lock_guard lock(mutex_);
    }
    moved_.notify_all();
}

void Signal::wait_past(uint32_t seen) {
    const auto moved = [&] {
        for (int i = 0; i < kPauses; ++i, pause())
            if (value() != seen) return true;
        return false;
    };
    if (moved()) return;
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        std::this_thread::yield();  // the awaited thread may need this very core
        if (moved()) return;
    } while (std::chrono::steady_clock::now() < until);

    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    moved_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Barrier::wait(int threads) {
    if (threads == 1) return;
    const uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.advance();
    } else {
        passed_.wait_past(seen);
    }
}

// Workers live as long as the process, so a signal never outlives its waiters.
struct Pool::Worker {
    Signal start, done;
    Call call;
    void* context;
    int thread, threads;
    Worker* next = nullptr;

    void loop() {
        inside_region = true;
        for (uint32_t seen = 0;; ++seen) {
            start.wait_past(seen);
            call(context, thread, threads);
            done.advance();
        }
    }

    // null when the system refuses another thread
    static Worker* spawn() {
        auto worker = std::make_unique<Worker>();
        sigset_t all, before;  // signals are for the threads that know what to do with them
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        Worker* spawned = worker.get();
        try {
            std::thread(&Worker::loop, spawned).detach();
            worker.release();
        } catch (const std::system_error&) {
            spawned = nullptr;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return spawned;
    }
};

Pool::Pool() : size_(usable_cpus()) {}

Pool& Pool::instance() {
    if (Pool* pool = the_pool.load(std::memory_order_acquire)) return *pool;
    // A forked child has none of the workers and perhaps a locked mutex: it abandons this pool.
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        the_pool = nullptr;
        inside_region = false;
        ++the_forks;
    });
    (void)registered;
    auto made = std::unique_ptr<Pool>(new Pool);
    Pool* expected = nullptr;
    if (the_pool.compare_exchange_strong(expected, made.get())) return *made.release();
    return *expected;
}

Pool::Worker* Pool::acquire(int& threads) {
    std::unique_lock lock(mutex_);
    const uint64_t ticket = next_ticket_++;
    freed_.wait(lock, [&] {
        threads = std::clamp(threads, 1, size());
        return ticket == serving_ && running_ + threads <= size();
    });
    ++serving_;
    Worker* team = nullptr;
    int found = 1;
    for (; found < threads; ++found) {
        Worker* worker = idle_ ? idle_ : Worker::spawn();
        if (!worker) break;
        if (worker == idle_) idle_ = worker->next;
        worker->next = team;
        team = worker;
    }
    threads = found;
    running_ += threads;
    if (serving_ != next_ticket_) freed_.notify_all();
    return team;
}

void Pool::release(int threads, Worker* team) {
    std::lock_guard lock(mutex_);
    running_ -= threads;
    while (team) {
        Worker* next = team->next;
        team->next = idle_;
        idle_ = team;
        team = next;
    }
    if (serving_ != next_ticket_) freed_.notify_all();
}

void Pool::resize(int threads) {
    std::unique_lock lock(mutex_);
    const uint64_t ticket = next_ticket_++;
    freed_.wait(lock, [&] { return ticket == serving_ && running_ == 0; });
    ++serving_;
    size_ = std::max(1, threads);
    freed_.notify_all();
}

void Pool::run_erased(int threads, Call call, void* context) {
    if (inside_region) return call(context, 0, 1);
    Worker* const team = acquire(threads);
    int thread = 0;
    for (Worker* worker = team; worker; worker = worker->next) {
        worker->call = call;
        worker->context = context;
        worker->thread = ++thread;
        worker->threads = threads;
        worker->start.advance();
    }
    inside_region = true;
    call(context, 0, threads);
    inside_region = false;
    // A worker's done counts the regions it finished, its start those it was given.
    for (Worker* worker = team; worker; worker = worker->next)
        worker->done.wait_past(worker->start.value() - 1);
    release(threads, team);
}

}  // namespace shallow
