// Medusa heads and one question to them, as Python lays them out: the same fields as the structures in draft_heads.py.
#pragma once

#include <cstdint>

#include "lora.h"
#include "weight.h"

namespace perseid {

struct DraftBlock {  // y = W x + b
    const Weight* weight;
    const float* bias;  // or null
};

struct DraftHeads {
    int64_t hidden_size, num_heads, num_layers, vocab_size, num_candidates;
    DraftBlock first;              // [H · E, E]
    const DraftBlock* further;     // [num_layers − 1][H], each [E, E]
    const Weight* const* lm_heads; // [V, E] each
    int64_t num_lm_heads;          // H, or 1 for all
    const int64_t* vocabulary;     // or null: row v of an lm_head is token v
};

struct DraftRows {
    int64_t num_rows;
    const float* hidden;  // [S, E]
    const float* a;       // the adapters' pages for the first blocks
    const float* b;
    const int32_t* live;
    const int64_t* slice_ends;
    int64_t num_slices;    // at least H
    RowSegments segments;  // none where no row's adapter changes the heads
    float* probabilities;  // [S, H, K]
    int64_t* token_ids;    // [S, H, K]
};

}  // namespace perseid
