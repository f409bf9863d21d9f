// A decoder and one step of it, as Python lays them out: the same fields as the structures in decoder.py.
#pragma once

#include <cstdint>

#include "routing.h"
#include "weight.h"

namespace perseid {

constexpr int MOST_PARTS = 3;  // q, k and v may come in a type each

struct Linear {  // y = W x + bias + low-rank products
    int64_t num_inputs, num_outputs;
    int64_t num_parts;
    const Weight* parts[MOST_PARTS];
    int64_t first_outputs[MOST_PARTS];  // the output that a part begins with
    const float* bias;                  // or null
    const float* a;                     // the adapters' pages, or null
    const float* b;
    const int32_t* live;
    const int64_t* slice_ends;
    int64_t num_slices;
};

struct Layer {
    const float* input_norm;
    Linear qkv;
    const float* q_norm;  // or null, and so k_norm
    const float* k_norm;
    Linear o;
    const float* post_attention_norm;
    Linear gate_up, down;
    float* k_cache;  // [NB, BS, Hkv, D]
    float* v_cache;
};

struct Decoder {
    int64_t num_layers;
    const Layer* layers;
    const Weight* embedding;  // [V, E]
    const Weight* lm_head;    // [V, E]
    const float* final_norm;
    const float* cos;  // [positions, D / 2]
    const float* sin;
    int64_t hidden_size, num_heads, num_kv_heads, head_dim, block_size;
    float norm_eps, attention_scale;
};

struct Step {  // names as in backend.py (AttentionBatch) and segments.py
    int64_t num_rows;
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* slots;
    int64_t num_sequences;
    const int32_t* query_start;
    const int32_t* context_len;
    const int32_t* block_table;
    int64_t stride_table;
    const uint64_t* ancestors;  // or null: no sequence is a tree
    int64_t num_segments;  // 0 where no row uses an adapter
    const int32_t* segment_rows;
    const int32_t* indptr;
    const int32_t* pages;
    const float* weights;
    const int32_t* page_indptr;
    int64_t num_routed;  // gate sets in use
    const Routed* routed;
    int64_t num_logits;
    const int64_t* logits_rows;
    float* hidden;  // [num_logits, E]
    float* logits;  // [num_logits, V]
};

// What a forward pass spends its time on, in the order of `profile.OPS` in Python.
enum Op { EMBED, NORM, QKV, ROPE, ATTENTION, O, GATE_UP, SILU, DOWN, ROUTE, LORA, LM_HEAD, NUM_OPS };

}  // namespace perseid
