// Rows whose adapters were named by their requests.
#pragma once

#include <cstdint>

#include "low_rank.h"

namespace perseid {

struct RowSegments {  // `Segments` of segments.py
    int64_t count;
    const int32_t* rows;
    const int32_t* indptr;
    const int32_t* pages;
    const float* weights;
    const int32_t* page_indptr;
};

void add_segments(const RowSegments& segments, int64_t num_slices, LowRank& sums);

}  // namespace perseid
