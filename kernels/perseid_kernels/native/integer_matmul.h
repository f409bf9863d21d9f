// The product of weights whose codes are whole numbers, in integers.
#pragma once

#include <cstdint>

#include "weight.h"

namespace perseid {

// out = x Wᵀ for a weight of kind QUADS4 or QUADS8 (layout: weight.h). Only where PERSEID_VNNI is defined.
void integer_matmul(const Weight& w, const float* x, int64_t num_rows, int64_t stride_x, float* out,
                    int64_t stride_out);

}  // namespace perseid
