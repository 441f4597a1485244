#include "cpu/memory.h"

#include <pthread.h>

#include <cstring>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/pages.h"

namespace shallow {

struct Slab {
    std::unique_ptr<Pages> pages;
    bool common = false;
    bool written = false;  // by buffers before, so that it is not zero

    Slab() = default;
    ~Slab();
    std::uint8_t* data() const { return static_cast<std::uint8_t*>(pages->data()); }
};

namespace {

constexpr std::size_t kSlab = 8 * Pages::kHuge;
constexpr std::size_t kSpares = 4;  // slabs: 64 MiB
constexpr std::size_t kLine = 64;

class CommonSlabs {
public:
    static CommonSlabs& get() {
        static CommonSlabs& slabs = *new CommonSlabs;  // outlives the last buffer
        return slabs;
    }

    // `size` bytes behind those cut before.
    std::pair<std::shared_ptr<Slab>, std::uint8_t*> cut(std::size_t size) {
        // Let go behind the lock, which they take if their last buffers have gone meanwhile.
        std::shared_ptr<Slab> full, slab;
        std::lock_guard lock(mutex_);
        slab = current_.lock();
        if (!slab || used_ + size > kSlab) {
            full = std::exchange(slab, next());
            current_ = slab;
            used_ = 0;
        }
        std::uint8_t* const data = slab->data() + std::exchange(used_, used_ + size);
        return {std::move(slab), data};
    }

    void keep(std::unique_ptr<Pages> pages) {
        std::lock_guard lock(mutex_);
        if (spares_.size() < kSpares) spares_.push_back(std::move(pages));
    }

private:
    CommonSlabs() {
        spares_.reserve(kSpares);
        // A child has the lock as it was, of a thread that it has not: so nobody holds it then.
        const auto unlock = [] { get().mutex_.unlock(); };
        pthread_atfork([] { get().mutex_.lock(); }, unlock, unlock);
    }

    std::shared_ptr<Slab> next() {
        auto slab = std::make_shared<Slab>();
        slab->written = !spares_.empty();
        if (slab->written) {
            slab->pages = std::move(spares_.back());
            spares_.pop_back();
        } else {
            slab->pages = std::make_unique<Pages>(kSlab);
        }
        slab->common = true;
        return slab;
    }

    std::mutex mutex_;
    std::weak_ptr<Slab> current_;
    std::size_t used_ = 0;
    std::vector<std::unique_ptr<Pages>> spares_;
};

}  // namespace

Slab::~Slab() {
    if (common) CommonSlabs::get().keep(std::move(pages));
}

Memory::Memory(std::size_t bytes) : size_(bytes) {
    if (bytes >= kSlab / 2) {
        slab_ = std::make_shared<Slab>();
        slab_->pages = std::make_unique<Pages>(bytes);
        data_ = slab_->data();
        return;
    }
    std::tie(slab_, data_) = CommonSlabs::get().cut((bytes + kLine - 1) / kLine * kLine);
    if (slab_->written) std::memset(data_, 0, bytes);
}

}  // namespace shallow
