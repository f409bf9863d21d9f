// The ops that look at one row at a time: norms, SiLU, rotary embedding, the largest logit. Each row's sums have a fixed
// order.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"
#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

void norm_row(const float* x, const float* weight, int64_t width, float eps, float* out) {
    V squares = zero();
    for_vectors(width, [&](int64_t n, int64_t count) {
        const V value = read(x + n, count);
        squares = fma(value, value, squares);
    });
    const V inverse = set1(1.0f / std::sqrt(sum(squares) / float(width) + eps));
    for_vectors(width, [&](int64_t n, int64_t count) {
        write(out + n, mul(mul(read(x + n, count), inverse), read(weight + n, count)), count);
    });
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for_vectors(half, [&](int64_t d, int64_t count) {
        const V a = read(x + d, count), b = read(x + half + d, count);
        const V c = read(cos + d, count), s = read(sin + d, count);
        write(x + d, sub(mul(a, c), mul(b, s)), count);
        write(x + half + d, add(mul(b, c), mul(a, s)), count);
    });
}

// The largest number, then where it first stands.
void best_of(const float* logits, int64_t width, float& value, int64_t& index) {
    V most = set1(logits[0]), nans = zero();
    for_vectors(width, [&](int64_t n, int64_t count) {
        const V values = first_lanes(read(logits + n, count), int(count), most);
        most = max(values, most);  // leaves NaN out
        nans = add(nans, sub(values, values));  // NaN from NaN and from infinities, else zeros
    });
    value = largest(most);
    index = 0;
    if (std::isnan(sum(nans)) && std::any_of(logits, logits + width, [](float x) { return std::isnan(x); })) {
        value = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    while (index + LANES <= width && !equal_lanes(load(logits + index), set1(value))) {
        index += LANES;
    }
    while (index + 1 < width && logits[index] != value) {
        ++index;
    }
}

}  // namespace

PERSEID_OP void perseid_rms_norm(
    const float* x, int64_t rows, int64_t heads, int64_t width, int64_t stride_row, int64_t stride_head,
    const float* weight, float eps, float* out) {
    for_rows(rows * heads, width, [&](int64_t i) {
        norm_row(x + i / heads * stride_row + i % heads * stride_head, weight, width, eps, out + i * width);
    });
}

PERSEID_OP void perseid_add_rms_norm(
    const float* x, float* residual, int64_t rows, int64_t width, const float* weight, float eps, float* out) {
    for_rows(rows, width, [&](int64_t t) {
        const float* from = x + t * width;
        float* held = residual + t * width;
        for_vectors(width, [&](int64_t n, int64_t count) {
            write(held + n, add(read(held + n, count), read(from + n, count)), count);
        });
        norm_row(held, weight, width, eps, out + t * width);
    });
}

PERSEID_OP void perseid_silu_mul(
    const float* gate_up, int64_t rows, int64_t width, int64_t stride, float* out) {
    for_rows(rows, width, [&](int64_t t) {
        const float* gate = gate_up + t * stride;
        for_vectors(width, [&](int64_t n, int64_t count) {
            const V g = read(gate + n, count);
            const V silu = div(g, add(set1(1.0f), exp(sub(zero(), g))));
            write(out + t * width + n, mul(silu, read(gate + width + n, count)), count);
        });
    });
}

PERSEID_OP void perseid_rope_and_store(
    float* q, int64_t stride_q, float* k, int64_t stride_k, const float* v, int64_t stride_v, int64_t rows,
    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, const float* cos, const float* sin,
    const int64_t* positions, float* k_cache, float* v_cache, const int64_t* slots) {
    const int64_t half = head_dim / 2, kv_width = num_kv_heads * head_dim;
    for_rows(rows, num_heads * head_dim, [&](int64_t t) {
        const float* c = cos + positions[t] * half;
        const float* s = sin + positions[t] * half;
        for (int64_t h = 0; h < num_heads; ++h) {
            rotate(q + t * stride_q + h * head_dim, c, s, half);
        }
        for (int64_t h = 0; h < num_kv_heads; ++h) {
            rotate(k + t * stride_k + h * head_dim, c, s, half);
        }
        std::memcpy(k_cache + slots[t] * kv_width, k + t * stride_k, kv_width * sizeof(float));
        std::memcpy(v_cache + slots[t] * kv_width, v + t * stride_v, kv_width * sizeof(float));
    });
}

PERSEID_OP void perseid_best(const float* logits, int64_t rows, int64_t width, float* values, int64_t* indices) {
    for_rows(rows, width, [&](int64_t t) { best_of(logits + t * width, width, values[t], indices[t]); });
}

PERSEID_OP void perseid_set_num_threads(int64_t count) {
    set_num_threads(int(count));
}

}  // namespace perseid
