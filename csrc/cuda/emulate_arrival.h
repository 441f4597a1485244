// Blocks that meet, on a CPU; a part of emulate.h. A counter says that what a block wrote is there, and
// who comes last reads what the others wrote with __ldcg. Blocks run one after another, so no race in
// global memory is seen; but whether the warp that raises the counter has a fence before it, and one
// behind it before it reads. That the fence follows the last write, and those of other warps, is not.
#pragma once

#include "cuda/emulate.h"

namespace emulate {

inline void fence() { self().released = self().acquired = true; }

// Before a counter is raised each lane of the warp has a fence behind what it wrote.
inline void arrive(Site site) {
    const int first = self().number / kLanes * kLanes;
    const int end = std::min(first + kLanes, static_cast<int>(block.fibers.size()));
    for (int number = first; number < end; ++number) {
        Fiber& fiber = block.fibers[number];
        if (!fiber.released)
            fail("atomicAdd, %s:%d: thread %d has not come to a __threadfence before it", site.file,
                 site.line, number);
        fiber.released = fiber.acquired = false;
    }
}

// After it each has one before it reads.
inline void check_fence(Site site) {
    if (!self().acquired)
        fail("__ldcg, %s:%d: no __threadfence since the warp's atomicAdd", site.file, site.line);
}

}  // namespace emulate
