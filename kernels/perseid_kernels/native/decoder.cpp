// The forward pass of `Decoder.forward` in one call: the same ops in the same order with the same results, without the
// Python between them. Whoever changes one changes the other; a test holds them together, bit by bit.
#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "lora.h"
#include "low_rank.h"
#include "ops.h"
#include "routing.h"

namespace perseid {
namespace {

double* profile = nullptr;

// Runs an op, and counts its time if somebody wants to know.
template <class F>
void timed(Op op, F run) {
    if (!profile) {
        return run();
    }
    const auto started = std::chrono::steady_clock::now();
    run();
    profile[op] += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

// Activations, kept from step to step. They grow to the largest step's size.
struct Buffers {
    std::vector<float> residual, x, qkv, q, k, attended, gate_up, activated, out;
    LowRank sums;
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
        timed(EMBED, [&] { perseid_embed(d_.embedding, s_.token_ids, s_.num_rows, residual_); });
        timed(NORM, [&] {
            perseid_rms_norm(residual_, s_.num_rows, 1, d_.hidden_size, d_.hidden_size, d_.hidden_size,
                             d_.layers[0].input_norm, d_.norm_eps, x_);
        });
        for (layer_ = 0; layer_ < d_.num_layers; ++layer_) {
            const Layer& layer = d_.layers[layer_];
            attend(layer);
            add_norm(layer.post_attention_norm);
            feed_forward(layer);
            add_norm(layer_ + 1 < d_.num_layers ? d_.layers[layer_ + 1].input_norm : d_.final_norm);
        }
        timed(LM_HEAD, [&] { outputs(); });
    }

  private:
    void linear(Op op, const Linear& w, Gates LayerGates::* gates, const float* x, float* out) const {
        timed(op, [&] { product(w, x, out); });
        if (w.a && s_.num_segments + s_.num_routed > 0) {
            adapt(w, gates, x, out);
        }
    }

    // All rows' low-rank sums at once. No row is in two of the groups, so this is one group after the other.
    void adapt(const Linear& w, Gates LayerGates::* gates, const float* x, float* out) const {
        const Adapted linear{x,      w.num_inputs, w.num_inputs, w.a, w.b,
                             w.live, w.slice_ends, w.num_slices, out, w.num_outputs};
        buffers_.sums.begin(linear);
        for (int64_t i = 0; i < s_.num_routed; ++i) {
            const Gates& of_set = s_.routed[i].layers[layer_].*gates;
            if (of_set.weight) {
                timed(ROUTE, [&] { route(linear, of_set, s_.routed[i], buffers_.sums); });
            }
        }
        timed(LORA, [&] {
            add_segments({s_.num_segments, s_.segment_rows, s_.indptr, s_.pages, s_.weights, s_.page_indptr},
                         w.num_slices, buffers_.sums);
            buffers_.sums.run();
        });
    }

    void product(const Linear& w, const float* x, float* out) const {
        for (int64_t i = 0; i < w.num_parts; ++i) {
            perseid_matmul(w.parts[i], x, s_.num_rows, w.num_inputs, out + w.first_outputs[i], w.num_outputs);
        }
        for (int64_t t = 0; w.bias && t < s_.num_rows; ++t) {
            for (int64_t n = 0; n < w.num_outputs; ++n) {
                out[t * w.num_outputs + n] += w.bias[n];
            }
        }
    }

    // Queries, keys and values of all rows, and how far apart rows lie.
    struct Projected {
        float *q, *k;
        const float* v;
        int64_t stride_q, stride_k, stride_v;
    };

    Projected project(const Layer& layer) {
        const int64_t rows = s_.num_rows, dim = d_.head_dim, heads = d_.num_heads, kv_heads = d_.num_kv_heads;
        const int64_t width = layer.qkv.num_outputs;
        float* q = room(buffers_.qkv, rows * width);
        float* k = q + heads * dim;
        linear(QKV, layer.qkv, &LayerGates::qkv, x_, q);
        if (!layer.q_norm) {
            return {q, k, k + kv_heads * dim, width, width, width};
        }
        float* normed_q = room(buffers_.q, rows * heads * dim);
        float* normed_k = room(buffers_.k, rows * kv_heads * dim);
        timed(NORM, [&] {
            perseid_rms_norm(q, rows, heads, dim, width, dim, layer.q_norm, d_.norm_eps, normed_q);
            perseid_rms_norm(k, rows, kv_heads, dim, width, dim, layer.k_norm, d_.norm_eps, normed_k);
        });
        return {normed_q, normed_k, k + kv_heads * dim, heads * dim, kv_heads * dim, width};
    }

    void attend(const Layer& layer) {
        const int64_t rows = s_.num_rows, dim = d_.head_dim, heads = d_.num_heads, kv_heads = d_.num_kv_heads;
        const Projected p = project(layer);
        timed(ROPE, [&] {
            perseid_rope_and_store(p.q, p.stride_q, p.k, p.stride_k, p.v, p.stride_v, rows, heads, kv_heads, dim,
                                   d_.cos, d_.sin, s_.positions, layer.k_cache, layer.v_cache, s_.slots);
        });
        float* attended = room(buffers_.attended, rows * heads * dim);
        timed(ATTENTION, [&] {
            perseid_attention(p.q, p.stride_q, layer.k_cache, layer.v_cache, s_.query_start, s_.context_len,
                              s_.block_table, s_.stride_table, s_.num_sequences, s_.ancestors, heads, kv_heads, dim,
                              d_.block_size, d_.attention_scale, attended, heads * dim);
        });
        linear(O, layer.o, &LayerGates::o, attended, out_);
    }

    void feed_forward(const Layer& layer) {
        const int64_t width = layer.down.num_inputs;
        float* gate_up = room(buffers_.gate_up, s_.num_rows * 2 * width);
        float* activated = room(buffers_.activated, s_.num_rows * width);
        linear(GATE_UP, layer.gate_up, &LayerGates::gate_up, x_, gate_up);
        timed(SILU, [&] { perseid_silu_mul(gate_up, s_.num_rows, width, 2 * width, activated); });
        linear(DOWN, layer.down, &LayerGates::down, activated, out_);
    }

    void add_norm(const float* weight) const {
        timed(NORM, [&] {
            perseid_add_rms_norm(out_, residual_, s_.num_rows, d_.hidden_size, weight, d_.norm_eps, x_);
        });
    }

    void outputs() const {
        for (int64_t i = 0; i < s_.num_logits; ++i) {
            const float* row = x_ + s_.logits_rows[i] * d_.hidden_size;
            std::memcpy(s_.hidden + i * d_.hidden_size, row, d_.hidden_size * sizeof(float));
        }
        perseid_matmul(d_.lm_head, s_.hidden, s_.num_logits, d_.hidden_size, s_.logits, d_.lm_head->num_outputs);
    }

    const Decoder& d_;
    const Step& s_;
    Buffers& buffers_;
    float *residual_, *x_, *out_;
    int64_t layer_ = 0;  // the one that runs
};

}  // namespace

PERSEID_OP void perseid_forward(const Decoder* decoder, const Step* step) {
    static thread_local Buffers buffers;
    Pass(*decoder, *step, buffers).run();
}

PERSEID_OP void perseid_set_profile(double* seconds) { profile = seconds; }

}  // namespace perseid
