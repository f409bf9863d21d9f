// out[t, o] = Σ_b scale_w(o, b) · scale_x(t, b) · Σ_i∈b q_w(o, i) · q_x(t, i)  +  offset(o, b) · Σ_i∈b x(t, i)
//
// The inner sum is exact: 4- or 8-bit codes times integers of three bytes (quantize.h), in 32 bits. It may pass them on
// the way, since what wraps comes back; its end never does. The blocks are added in ascending order in float32, so a
// result is the same bits beside any other rows.
//
// A panel's block passes once, 16 outputs × 4 inputs a register. Each meets every row's three bytes: sums of ROWS rows
// × three bytes stay in registers, enough of them that no product waits for the one before it.
#include "integer_matmul.h"

#ifdef PERSEID_VNNI

#include <algorithm>

#include "quantize.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int ROW_TILE = 8;                      // sums in registers: 24 of 32
constexpr int64_t ROW_BLOCK_BYTES = 256 * 1024;  // quantised rows that stay in the second cache while panels pass
constexpr int64_t TASK_PRODUCTS = 100 * 1000;    // of a task: a few microseconds, enough to be worth taking

struct Product {
    const Weight& w;
    QuantizedRows x;
    float* out;
    int64_t stride_out;

    void write(int64_t row, int64_t panel, __m512 values) const {
        const int64_t left = std::min<int64_t>(QUAD_PANEL, w.num_outputs - panel * QUAD_PANEL);
        _mm512_mask_storeu_ps(out + row * stride_out + panel * QUAD_PANEL, __mmask16((1u << left) - 1), values);
    }
};

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Inputs 4j … 4j + 3 of a block, all outputs of the panel, as unsigned bytes.
template <int BITS, int QUADS>
inline __m512i decode(const uint8_t* codes, int j) {
    if constexpr (BITS == 8) {
        return _mm512_loadu_si512(codes + 64 * j);
    } else {
        const __m512i both = _mm512_loadu_si512(codes + 64 * (j % (QUADS / 2)));
        const __m512i code = j < QUADS / 2 ? both : _mm512_srli_epi16(both, 4);
        return _mm512_and_si512(code, _mm512_set1_epi8(15));
    }
}

// Four bytes in every lane.
inline __m512i four(const int8_t* bytes) {
    int32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return _mm512_set1_epi32(word);
}

// sums[t] = Σ codes · q over a block, for the panel's outputs. Rows of bytes lie `stride` apart.
template <int BITS, int QUADS, int ROWS>
inline void block_sums(const uint8_t* codes, const int8_t* bytes, int64_t stride, __m512i sums[ROWS]) {
    __m512i planes[ROWS][PLANES];
    for (int t = 0; t < ROWS; ++t) {
        for (int p = 0; p < PLANES; ++p) {
            planes[t][p] = _mm512_setzero_si512();
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < QUADS; ++j) {
        const __m512i weights = decode<BITS, QUADS>(codes, j);
#pragma GCC unroll 8
        for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 3
            for (int p = 0; p < PLANES; ++p) {
                planes[t][p] = _mm512_dpbusd_epi32(planes[t][p], weights, four(bytes + t * stride + 4 * (p * QUADS + j)));
            }
        }
    }
    for (int t = 0; t < ROWS; ++t) {
        const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(planes[t][0], PLANE_BITS), planes[t][1]);
        sums[t] = _mm512_add_epi32(_mm512_slli_epi32(upper, PLANE_BITS), planes[t][2]);
    }
}

// ROWS rows from `row` on, one panel, all inputs.
template <class Form, int ROWS>
void multiply_tile(const Product& p, int64_t panel, int64_t row) {
    constexpr int QUADS = Form::QUADS, BYTES = QUADS * 8 * Form::BITS, ROW_BYTES = QUADS * 4 * PLANES;
    using S = typename Form::Scale;
    const int64_t blocks = p.x.num_blocks, groups = p.w.num_inputs / p.w.group;
    const int64_t blocks_in_group = blocks / groups;
    const auto* codes = static_cast<const uint8_t*>(p.w.codes) + panel * blocks * BYTES;
    const S* scales = static_cast<const S*>(p.w.scale) + panel * groups * QUAD_PANEL;
    const S* offsets = static_cast<const S*>(p.w.offset) + (Form::OFFSET ? panel * groups * QUAD_PANEL : 0);
    const int8_t* bytes = p.x.bytes + row * blocks * ROW_BYTES;
    const BlockSums* rows = p.x.blocks + row * blocks;
    const int32_t first = int32_t(p.w.codebook[0]);

    __m512 total[ROWS];
    for (int t = 0; t < ROWS; ++t) {
        total[t] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; ++b) {
        __m512i sums[ROWS];
        block_sums<Form::BITS, QUADS, ROWS>(codes + b * BYTES, bytes + b * ROW_BYTES, blocks * ROW_BYTES, sums);
        const int64_t group = blocks_in_group == 1 ? b : b / blocks_in_group;
        const __m512 scale = load16(scales + group * QUAD_PANEL);
        const __m512 offset = Form::OFFSET ? load16(offsets + group * QUAD_PANEL) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int t = 0; t < ROWS; ++t) {
            const BlockSums& x = rows[t * blocks + b];
            if constexpr (!Form::OFFSET) {
                sums[t] = _mm512_add_epi32(sums[t], _mm512_set1_epi32(first * x.total));
            }
            const __m512 both_scales = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale));
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), both_scales, total[t]);
            if constexpr (Form::OFFSET) {
                total[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum), total[t]);
            }
        }
    }
    for (int t = 0; t < ROWS; ++t) {
        p.write(row + t, panel, total[t]);
    }
}

// Rows [row, end) in tiles of 8, then 4, 2, 1.
template <class Form, int ROWS = ROW_TILE>
void multiply_rows(const Product& p, int64_t panel, int64_t row, int64_t end) {
    for (; row + ROWS <= end; row += ROWS) {
        multiply_tile<Form, ROWS>(p, panel, row);
    }
    if constexpr (ROWS > 1) {
        multiply_rows<Form, ROWS / 2>(p, panel, row, end);
    }
}

template <class S, int BITS_, bool OFFSET_, int QUADS_>
struct FormOf {
    using Scale = S;
    static constexpr int BITS = BITS_, QUADS = QUADS_;
    static constexpr bool OFFSET = OFFSET_;
};

// Calls f(FormOf<…>{}) for the weight's form.
template <class S, int QUADS, class F>
void with_scaled_form(const Weight& w, F f) {
    if (w.kind == QUADS8) {
        f(FormOf<S, 8, false, QUADS>{});
    } else if (w.offset) {
        f(FormOf<S, 4, true, QUADS>{});
    } else {
        f(FormOf<S, 4, false, QUADS>{});
    }
}

template <class F>
void with_form(const Weight& w, F f) {
    if (w.quad_block() == 32) {
        w.type == F16 ? with_scaled_form<Half, 8>(w, f) : with_scaled_form<float, 8>(w, f);
    } else {
        w.type == F16 ? with_scaled_form<Half, 4>(w, f) : with_scaled_form<float, 4>(w, f);
    }
}

int64_t panels_of_a_task(const Weight& w, int64_t rows) {
    return std::clamp<int64_t>(TASK_PRODUCTS / (QUAD_PANEL * w.num_inputs * rows), 1, 8);
}

}  // namespace

void integer_matmul(const Weight& w, const float* x, int64_t num_rows, int64_t stride_x, float* out,
                    int64_t stride_out) {
    const int magnitude_bits = w.kind == QUADS8 ? 19 : 21;  // 32 products with codes of 8 or 4 bits fit 32 bits
    const Product p{w, quantize_rows(x, stride_x, num_rows, w.num_inputs, w.quad_block(), magnitude_bits), out, stride_out};
    const int64_t row_block = std::max<int64_t>(ROW_TILE, ROW_BLOCK_BYTES / (PLANES * w.num_inputs) / ROW_TILE * ROW_TILE);
    const int64_t row_blocks = (num_rows + row_block - 1) / row_block;
    const int64_t num_panels = (w.num_outputs + QUAD_PANEL - 1) / QUAD_PANEL;
    const int64_t grain = panels_of_a_task(w, std::min(num_rows, row_block));
    const int64_t tasks = (num_panels + grain - 1) / grain;
    with_form(w, [&](auto form) {
        using Form = decltype(form);
        parallel_for(row_blocks * tasks, [&](int64_t task) {
            const int64_t row = task / tasks * row_block, first = task % tasks * grain;
            for (int64_t panel = first; panel < std::min(num_panels, first + grain); ++panel) {
                multiply_rows<Form>(p, panel, row, std::min(num_rows, row + row_block));
            }
        });
    });
}

}  // namespace perseid

#endif
