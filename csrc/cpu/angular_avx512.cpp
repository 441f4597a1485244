#include "cpu/angular_vector_avx512.h"

namespace shallow {
namespace {

using BfloatTiles = void;

}  // namespace
}  // namespace shallow

#include "cpu/angular_kernel.h"

void shallow::angular_avx512(const AngularJob& job, int64_t begin, int64_t end, double* sums) {
    run_typed(job, begin, end, sums);
}
