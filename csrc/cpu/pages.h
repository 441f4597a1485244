// Zeroed memory in huge pages where the system gives them, else in small ones.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace shallow {

class Pages {
public:
    static constexpr size_t kHuge = size_t{2} << 20;  // bytes of a huge page, and the alignment

    explicit Pages(size_t bytes) : mapped_(bytes + kHuge) {
        if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        const auto address = reinterpret_cast<uintptr_t>(base_);
        data_ = reinterpret_cast<void*>((address + kHuge - 1) / kHuge * kHuge);
#if defined(MADV_HUGEPAGE)
        madvise(data_, bytes, MADV_HUGEPAGE);  // advice: a refusal changes the speed alone
#endif
    }
    ~Pages() { munmap(base_, mapped_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    void* data() const { return data_; }

private:
    size_t mapped_;
    void* base_;
    void* data_;
};

}  // namespace shallow
