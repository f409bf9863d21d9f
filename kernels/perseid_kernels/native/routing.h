// Rows whose adapters are chosen by gates: the structures of routing.py (in this folder), which lays them out.
#pragma once

#include <cstdint>

#include "low_rank.h"

namespace perseid {

struct Gates {  // of one fused linear; those of projection s are rows s · C …
    const float* weight;  // [num_slices · C][num_inputs], or null where no projection has any
    const float* bias;    // [num_slices · C]
    int64_t gated;        // bit s: whether projection s has gates
};

struct LayerGates {
    Gates qkv, o, gate_up, down;
};

struct Routed {  // `RoutedRows` of the package's routing.py
    const LayerGates* layers;  // null where the gates are given beside
    int64_t num_columns;       // C
    const int32_t* absolute;   // [C]
    int64_t num_rows, max_k;
    const int32_t* rows;
    const int32_t* k;
    const float* temperature;
    const int32_t* allowed;  // [num_rows][C]
    const int32_t* pages;
    const int32_t* page_indptr;
    float* tally;  // [num_rows][C + 1]
};

// Chooses for each row and projection, adds to the tally, and gives the chosen pages' products to `sums`.
void route(const Adapted& linear, const Gates& gates, const Routed& routed, LowRank& sums);

}  // namespace perseid
