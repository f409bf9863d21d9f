// What the library offers: Python calls these (backend.py says what the pointers stand for), and so do decoder.cpp
// and draft_heads.cpp.
#pragma once

#include <cstdint>

#include "weight.h"

#define PERSEID_OP extern "C" __attribute__((visibility("default")))

namespace perseid {

struct Decoder;  // decoder.h
struct Step;
struct DraftHeads;  // draft_heads.h
struct DraftRows;
struct Gates;  // routing.h
struct Routed;

// out = x Wᵀ
PERSEID_OP void perseid_matmul(const Weight* w, const float* x, int64_t num_rows, int64_t stride_x, float* out,
                               int64_t stride_out);

// Rows `ids` of W.
PERSEID_OP void perseid_embed(const Weight* w, const int64_t* ids, int64_t count, float* out);

// out += the low-rank products of the rows' pages
PERSEID_OP void perseid_add_lora(const float* x, int64_t stride_x, int64_t num_inputs, const float* a, const float* b,
                                 const int32_t* live, const int64_t* slice_ends, int64_t num_slices,
                                 const int32_t* rows, const int32_t* indptr, const int32_t* pages,
                                 const float* weights, const int32_t* page_indptr, int64_t num_segments, float* out,
                                 int64_t stride_out);

// out += the low-rank products of the columns that the rows' gates choose
PERSEID_OP void perseid_add_routed(const float* x, int64_t stride_x, int64_t num_inputs, const float* a, const float* b,
                                   const int32_t* live, const int64_t* slice_ends, int64_t num_slices,
                                   const Gates* gates, const Routed* routed, float* out, int64_t stride_out);

// x [T, H, N] with strides, out [T, H, N] contiguous.
PERSEID_OP void perseid_rms_norm(const float* x, int64_t rows, int64_t heads, int64_t width, int64_t stride_row,
                                 int64_t stride_head, const float* weight, float eps, float* out);

// residual += x, then out = the norm of it.
PERSEID_OP void perseid_add_rms_norm(const float* x, float* residual, int64_t rows, int64_t width,
                                     const float* weight, float eps, float* out);

// out = silu(gate) · up
PERSEID_OP void perseid_silu_mul(const float* gate_up, int64_t rows, int64_t width, int64_t stride, float* out);

// Rotates q and k in place, then copies k and v to slot `slots[t]` of the caches [NB · BS, Hkv, D].
PERSEID_OP void perseid_rope_and_store(float* q, int64_t stride_q, float* k, int64_t stride_k, const float* v,
                                       int64_t stride_v, int64_t rows, int64_t num_heads, int64_t num_kv_heads,
                                       int64_t head_dim, const float* cos, const float* sin, const int64_t* positions,
                                       float* k_cache, float* v_cache, const int64_t* slots);

// Causal attention over the paged caches. `ancestors` [T] is null where no sequence is a tree.
PERSEID_OP void perseid_attention(const float* q, int64_t stride_q, const float* k_cache, const float* v_cache,
                                  const int32_t* query_start, const int32_t* context_len, const int32_t* block_table,
                                  int64_t stride_table, int64_t num_sequences, const uint64_t* ancestors,
                                  int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                                  float scale, float* out, int64_t stride_out);

// In each of the caches [NB · BS][width] what lies in slot sources[i] goes to slot targets[i], in order.
PERSEID_OP void perseid_move_slots(float* const* caches, int64_t num_caches, int64_t width, const int64_t* sources,
                                   const int64_t* targets, int64_t num_moves);

// Of each row: its largest number (NaN if it has one) and the lowest index at which it stands.
PERSEID_OP void perseid_best(const float* logits, int64_t rows, int64_t width, float* values, int64_t* indices);

// A whole forward pass.
PERSEID_OP void perseid_forward(const Decoder* decoder, const Step* step);

// Each head's likeliest tokens after each row.
PERSEID_OP void perseid_draft(const DraftHeads* heads, const DraftRows* rows);

// From now on forward passes add the seconds of each op to `seconds` [NUM_OPS]; null ends that.
PERSEID_OP void perseid_set_profile(double* seconds);

PERSEID_OP void perseid_set_num_threads(int64_t count);

// Outputs of a weight's panel: 2 · LANES.
PERSEID_OP int64_t perseid_panel();

// Whether weights may be packed as QUADS4 and QUADS8.
PERSEID_OP int64_t perseid_has_integer_matmul();

}  // namespace perseid
