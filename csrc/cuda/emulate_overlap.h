// A kernel that starts while the one before it runs, on a CPU; a part of emulate.h. Memory that the
// kernel before writes cannot be touched by a thread until it has waited.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cuda/emulate.h"

namespace emulate {

// Whole pages that hold one output of the kernel before, and a page behind that nobody may touch:
// the bytes end where that page begins, but for their alignment.
class Output {
public:
    static constexpr std::size_t kAlignment = 16;

    // `bytes` bytes, `offset` off a multiple of kAlignment.
    Output(std::size_t bytes, std::size_t offset);
    ~Output();
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;

    char* data() const { return data_; }
    void protect(bool on) const {
        if (mprotect(pages_, size_, on ? PROT_NONE : PROT_READ | PROT_WRITE))
            fail("memory cannot be protected");
    }
    bool holds(const char* address) const { return address >= pages_ && address < pages_ + size_; }
    bool guards(const char* address) const {
        return address >= pages_ + size_ && address < pages_ + size_ + page_;
    }

private:
    char* pages_;
    std::size_t size_, page_;
    char* data_;
};

inline std::vector<const Output*> outputs;
inline bool outputs_protected = false;

// Async-signal-safe but for printing, after which the process ends.
inline void on_fault(int signal, siginfo_t* info, void*) {
    const char* address = static_cast<const char*>(info->si_addr);
    for (const Output* output : outputs) {
        if (outputs_protected && output->holds(address))
            fail("touches what the kernel before writes, and has not waited for it");
        if (output->guards(address)) fail("touches memory behind what the kernel before writes");
    }
    ::signal(signal, SIG_DFL);  // another fault: again, and out
}

inline Output::Output(std::size_t bytes, std::size_t offset)
    : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    const std::size_t whole = (bytes + offset + kAlignment - 1) / kAlignment * kAlignment;
    size_ = (whole + page_ - 1) / page_ * page_;
    if (!size_) size_ = page_;
    void* memory =
        mmap(nullptr, size_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for an output");
    pages_ = static_cast<char*>(memory);
    if (mprotect(pages_ + size_, page_, PROT_NONE)) fail("memory cannot be protected");
    data_ = pages_ + size_ - whole + offset;
    if (outputs.empty()) {
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, nullptr);
    }
    outputs.push_back(this);
}

inline Output::~Output() {
    outputs.erase(std::find(outputs.begin(), outputs.end(), this));
    munmap(pages_, size_ + page_);
}

inline void protect_outputs(bool on) {
    if (on == outputs_protected) return;
    for (const Output* output : outputs) output->protect(on);
    outputs_protected = on;
}

inline void wait_for_previous_kernel() {
    self().waited = true;
    protect_outputs(false);
}

}  // namespace emulate
