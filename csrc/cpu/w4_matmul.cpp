#include "cpu/w4_matmul.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/plan.h"
#include "cpu/threads.h"

namespace shallow {
namespace {

// Grows, never shrinks; one a calling thread.
uint8_t* workspace(int64_t bytes) {
    thread_local Memory memory;
    if (static_cast<int64_t>(memory.size()) < bytes) {
        memory = Memory();
        memory = Memory(static_cast<std::size_t>(bytes));
    }
    return memory.data();
}

// Rows begin..end-1.
Rows part(const Rows& x, int64_t begin, int64_t end) {
    Rows some = x;
    some.m = end - begin;
    some.data = static_cast<const uint8_t*>(x.data) + begin * x.stride * element_bytes(x.type);
    return some;
}

void multiply(const Rows& x, const TiledMatrix& matrix, const Output& y, Path path,
              const Kernels& kernels, int threads) {
    const TileView& w = matrix.view();
    threads = useful_threads(w, x.m, threads);
    const Form form(w, path, x.m, true);
    const int64_t claim = form.claim(w.tiles, threads);
    const int64_t gathered_bytes =
        matrix.perm() ? line_up(form.panel * x.k * element_bytes(x.type)) : 0;
    const int64_t own_bytes = gathered_bytes + form.scratch_bytes(w, claim);
    uint8_t* const rows = workspace(form.nbytes() + own_bytes * threads);
    Queue queue(threads);
    Barrier ready;
    Pool::instance().run(threads, [&](int thread, int count) {
        uint8_t* const own = rows + form.nbytes() + thread * own_bytes;
        for (int64_t row = thread * kPanelRows; row < x.m; row += count * kPanelRows) {
            Rows some = part(x, row, std::min(row + kPanelRows, x.m));
            if (matrix.perm()) some = gather(some, matrix.perm(), own);
            form.write(kernels, some, rows, row, 0);
        }
        ready.wait(count);
        const auto take = [&](int64_t begin, int64_t end) {
            form.multiply(kernels, w, rows, y, begin, end, own + gathered_bytes);
        };
        if (claim)
            queue.take(w.tiles, claim, take);
        else
            queue.take_shares(w.tiles, thread, count, 0, take);
    });
}

}  // namespace

const Kernels& kernels(Isa isa) {
    if (!isa_supported(isa))
        throw std::invalid_argument(std::string("this processor does not run ") + isa_name(isa));
    switch (isa) {
#if defined(SHALLOW_X86)
        case Isa::avx2: return kKernelsAvx2;
        case Isa::avxvnni: return kKernelsAvxvnni;
        case Isa::avx512: return kKernelsAvx512;
        case Isa::amx: return kKernelsAmx;
#elif defined(SHALLOW_ARM)
        case Isa::neon: return kKernelsNeon;
        case Isa::dotprod: return kKernelsDotprod;
        case Isa::i8mm: return kKernelsI8mm;
#endif
        default: return kKernelsGeneric;
    }
}

Mode mode_from_name(const std::string& name) {
    if (name == "int8") return Mode::int8;
    if (name == "exact") return Mode::exact;
    throw std::invalid_argument("mode must be 'int8' or 'exact', found '" + name + "'");
}

void matmul(const Rows& x, const TiledMatrix& matrix, const Output& y, Mode mode, Isa isa,
            int threads) {
    const Kernels& chosen = kernels(isa);
    const Path path = choose_path(matrix.view(), x.m, mode, chosen);
    const int64_t rows = rows_at_once(matrix.view(), path);
    threads = std::clamp(threads, 1, Pool::instance().size());
    for (int64_t row = 0; row < x.m; row += rows) {
        Output some = y;
        some.data = static_cast<uint8_t*>(y.data) + row * y.stride * element_bytes(y.type);
        multiply(part(x, row, std::min(row + rows, x.m)), matrix, some, path, chosen, threads);
    }
}

}  // namespace shallow
