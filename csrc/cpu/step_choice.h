// The likeliest token of each row, without the logits of all others.
// defines: choose_likeliest
#pragma once

#include "cpu/step_worker.h"

namespace shallow {

// Makes of Chunk::best, to the bit, what write_logits() would, for m rows whose final norms are in the
// head's forms; needs Chunk::bounds. Tiles that cannot hold a row's largest logit are left out.
void choose_likeliest(Worker& worker, std::int64_t m);

}  // namespace shallow
