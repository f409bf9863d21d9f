// The forward pass of `Decoder.forward` in one call: the same ops in the same order with the same results, without the
// Python between them. Whoever changes one changes the other; a test holds them together, bit by bit.
#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"

namespace perseid {
namespace {

// Activations, kept from step to step. They grow to the largest step's size.
struct Buffers {
    std::vector<float> residual, x, qkv, q, k, attended, gate_up, activated, out;
};

float* room(std::vector<float>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) {
        buffer.resize(size);
    }
    return buffer.data();
}

class Pass {
  public:
    Pass(const Decoder& decoder, const Step& step, Buffers& buffers) : d_(decoder), s_(step), buffers_(buffers) {
        residual_ = room(buffers.residual, step.num_rows * d_.hidden_size);
        x_ = room(buffers.x, step.num_rows * d_.hidden_size);
        out_ = room(buffers.out, step.num_rows * d_.hidden_size);
    }

    void run() {
        perseid_embed(d_.embedding, s_.token_ids, s_.num_rows, residual_);
        perseid_rms_norm(residual_, s_.num_rows, 1, d_.hidden_size, d_.hidden_size, d_.hidden_size,
                         d_.layers[0].input_norm, d_.norm_eps, x_);
        for (int64_t i = 0; i < d_.num_layers; ++i) {
            const Layer& layer = d_.layers[i];
            attend(layer);
            add_norm(layer.post_attention_norm);
            feed_forward(layer);
            add_norm(i + 1 < d_.num_layers ? d_.layers[i + 1].input_norm : d_.final_norm);
        }
        logits();
    }

  private:
    void linear(const Linear& w, const float* x, float* out) const {
        for (int64_t i = 0; i < w.num_parts; ++i) {
            perseid_matmul(w.parts[i], x, s_.num_rows, w.num_inputs, out + w.first_outputs[i], w.num_outputs);
        }
        for (int64_t t = 0; w.bias && t < s_.num_rows; ++t) {
            for (int64_t n = 0; n < w.num_outputs; ++n) {
                out[t * w.num_outputs + n] += w.bias[n];
            }
        }
        if (w.a && s_.num_segments > 0) {
            perseid_add_lora(x, w.num_inputs, w.num_inputs, w.a, w.b, w.live, w.slice_ends, w.num_slices,
                             s_.segment_rows, s_.indptr, s_.pages, s_.weights, s_.page_indptr, s_.num_segments, out,
                             w.num_outputs);
        }
    }

    void attend(const Layer& layer) {
        const int64_t rows = s_.num_rows, dim = d_.head_dim, heads = d_.num_heads, kv_heads = d_.num_kv_heads;
        int64_t stride_q = layer.qkv.num_outputs, stride_k = stride_q;
        float* q = room(buffers_.qkv, rows * layer.qkv.num_outputs);
        float* k = q + heads * dim;
        const float* v = k + kv_heads * dim;
        linear(layer.qkv, x_, q);
        if (layer.q_norm) {
            float* normed_q = room(buffers_.q, rows * heads * dim);
            float* normed_k = room(buffers_.k, rows * kv_heads * dim);
            perseid_rms_norm(q, rows, heads, dim, stride_q, dim, layer.q_norm, d_.norm_eps, normed_q);
            perseid_rms_norm(k, rows, kv_heads, dim, stride_k, dim, layer.k_norm, d_.norm_eps, normed_k);
            q = normed_q, stride_q = heads * dim;
            k = normed_k, stride_k = kv_heads * dim;
        }
        perseid_rope_and_store(q, stride_q, k, stride_k, v, layer.qkv.num_outputs, rows, heads, kv_heads, dim, d_.cos,
                               d_.sin, s_.positions, layer.k_cache, layer.v_cache, s_.slots);
        float* attended = room(buffers_.attended, rows * heads * dim);
        perseid_attention(q, stride_q, layer.k_cache, layer.v_cache, s_.query_start, s_.context_len, s_.block_table,
                          s_.stride_table, s_.num_sequences, heads, kv_heads, dim, d_.block_size, d_.attention_scale,
                          attended, heads * dim);
        linear(layer.o, attended, out_);
    }

    void feed_forward(const Layer& layer) {
        const int64_t width = layer.down.num_inputs;
        float* gate_up = room(buffers_.gate_up, s_.num_rows * 2 * width);
        float* activated = room(buffers_.activated, s_.num_rows * width);
        linear(layer.gate_up, x_, gate_up);
        perseid_silu_mul(gate_up, s_.num_rows, width, 2 * width, activated);
        linear(layer.down, activated, out_);
    }

    void add_norm(const float* weight) const {
        perseid_add_rms_norm(out_, residual_, s_.num_rows, d_.hidden_size, weight, d_.norm_eps, x_);
    }

    void logits() const {
        for (int64_t i = 0; i < s_.num_logits; ++i) {
            const float* row = x_ + s_.logits_rows[i] * d_.hidden_size;
            std::memcpy(out_ + i * d_.hidden_size, row, d_.hidden_size * sizeof(float));
        }
        perseid_matmul(d_.lm_head, out_, s_.num_logits, d_.hidden_size, s_.logits, d_.lm_head->num_outputs);
    }

    const Decoder& d_;
    const Step& s_;
    Buffers& buffers_;
    float *residual_, *x_, *out_;
};

}  // namespace

PERSEID_OP void perseid_forward(const Decoder* decoder, const Step* step) {
    static thread_local Buffers buffers;
    Pass(*decoder, *step, buffers).run();
}

}  // namespace perseid
