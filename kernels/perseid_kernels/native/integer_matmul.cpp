// out[t, o] = Σ_b scale_w(o, b) · scale_x(t, b) · Σ_i∈b q_w(o, i) · q_x(t, i)  +  offset(o, b) · Σ_i∈b x(t, i)
//
// The inner sum is exact: 4- or 8-bit codes times integers of up to three bytes (quantize.h), in 32 bits. It may pass
// them on the way, since what wraps comes back; its end never does. The blocks are added in ascending order in float32,
// so a result is the same bits beside any other rows.
//
// A tile is a panel and two rows: two registers of weights hold 32 outputs × 4 inputs, and each meets the bytes of both
// rows. So every load is used twice, and with three bytes twelve sums run side by side: no product waits for another.
// With one byte four rows leave registers enough, and eight sums. (Eight rows × 16 outputs need no fewer loads, and with
// three bytes their 24 sums leave no registers for the rest.)
#include "integer_matmul.h"

#ifdef PERSEID_VNNI

#include <algorithm>

#include "quantize.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int HALF = 16;                          // outputs of a register; a panel has two
constexpr int MOST_TILE_ROWS = 4;
constexpr int64_t ROW_BLOCK_BYTES = 256 * 1024;   // quantised rows that stay in the second cache while panels pass
constexpr int64_t TASK_PRODUCTS = 300 * 1000;     // of a task: a microsecond or more, so that taking it costs little

static_assert(PANEL == 2 * HALF, "AVX-512 has 16 lanes");

struct Product {
    const Weight& w;
    QuantizedRows x;
    float* out;
    int64_t stride_out;

    void write(int64_t row, int64_t panel, const __m512 values[2]) const {
        float* to = out + row * stride_out + panel * PANEL;
        const int64_t left = w.num_outputs - panel * PANEL;
        for (int64_t n = 0; n < 2 && left > n * HALF; ++n) {
            const auto lanes = __mmask16((1u << std::min<int64_t>(HALF, left - n * HALF)) - 1);
            _mm512_mask_storeu_ps(to + n * HALF, lanes, values[n]);
        }
    }
};

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Inputs 4j … 4j + 3 of a block, half n of the panel's outputs, as unsigned bytes.
template <int BITS, int QUADS>
inline __m512i decode(const uint8_t* codes, int j, int n) {
    if constexpr (BITS == 8) {
        return _mm512_loadu_si512(codes + 128 * j + 64 * n);
    } else {
        const __m512i both = _mm512_loadu_si512(codes + 128 * (j % (QUADS / 2)) + 64 * n);
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

// sums[t][n] = Σ codes · q over a block, for half n of the panel's outputs.
template <int BITS, int QUADS, int PLANES, int ROWS>
inline void block_sums(const uint8_t* codes, const int8_t* const bytes[ROWS], __m512i sums[ROWS][2]) {
    __m512i planes[ROWS][2][PLANES] = {};
#pragma GCC unroll 8
    for (int j = 0; j < QUADS; ++j) {
        const __m512i weights[2] = {decode<BITS, QUADS>(codes, j, 0), decode<BITS, QUADS>(codes, j, 1)};
        for (int t = 0; t < ROWS; ++t) {
            for (int p = 0; p < PLANES; ++p) {
                const __m512i x = four(bytes[t] + 4 * (p * QUADS + j));
                planes[t][0][p] = _mm512_dpbusd_epi32(planes[t][0][p], weights[0], x);
                planes[t][1][p] = _mm512_dpbusd_epi32(planes[t][1][p], weights[1], x);
            }
        }
    }
    for (int t = 0; t < ROWS; ++t) {
        for (int n = 0; n < 2; ++n) {
            sums[t][n] = planes[t][n][0];
            for (int p = 1; p < PLANES; ++p) {
                sums[t][n] = _mm512_add_epi32(_mm512_slli_epi32(sums[t][n], PLANE_BITS), planes[t][n][p]);
            }
        }
    }
}

// A group's scales (or offsets) of a panel.
template <class S, bool FETCH>
inline void load_scales(const S* from, int64_t group, int64_t num_groups, __m512 to[2]) {
    to[0] = load16(from + group * PANEL);
    to[1] = load16(from + group * PANEL + HALF);
    if constexpr (FETCH) {  // the next panel's
        fetch<PANEL * sizeof(S)>(from + (group + num_groups) * PANEL);
    }
}

// total += scale_w · scale_x · sum + offset · x's own sum, for a row and a block.
template <class Form>
inline void add_block(const BlockSums& x, int32_t first_code, const __m512 scale[2], const __m512 offset[2],
                      __m512i sums[2], __m512 total[2]) {
    for (int n = 0; n < 2; ++n) {
        if constexpr (!Form::OFFSET) {
            const auto correction = int32_t(uint32_t(first_code) * uint32_t(x.total));  // wraps, as the sum does
            sums[n] = _mm512_add_epi32(sums[n], _mm512_set1_epi32(correction));
        }
        const __m512 both_scales = _mm512_mul_ps(scale[n], _mm512_set1_ps(x.scale));
        total[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[n]), both_scales, total[n]);
        if constexpr (Form::OFFSET) {
            total[n] = _mm512_fmadd_ps(offset[n], _mm512_set1_ps(x.sum), total[n]);
        }
    }
}

// Of a tile: as many sums as registers hold beside the rest.
template <class Form>
constexpr int tile_rows() {
    return Form::PLANES == 1 ? 4 : 2;
}

// ROWS rows from `row` on, one panel, all inputs. FETCH asks for the weights that come next, in this panel and after
// it: the hardware's own prefetching stops at the end of a page, which a panel soon reaches.
template <class Form, int ROWS, bool FETCH>
void multiply_tile(const Product& p, int64_t panel, int64_t row) {
    constexpr int QUADS = Form::QUADS, BYTES = QUADS * 16 * Form::BITS, ROW_BYTES = QUADS * 4 * Form::PLANES;
    using S = typename Form::Scale;
    const int64_t blocks = p.x.num_blocks, groups = p.w.num_inputs / p.w.group;
    const int64_t blocks_in_group = blocks / groups;
    const auto* codes = static_cast<const uint8_t*>(p.w.codes) + panel * blocks * BYTES;
    const S* scales = static_cast<const S*>(p.w.scale) + panel * groups * PANEL;
    const S* offsets = static_cast<const S*>(p.w.offset) + (Form::OFFSET ? panel * groups * PANEL : 0);
    const auto first_code = int32_t(p.w.codebook[0]);
    const int8_t* bytes[ROWS];
    const BlockSums* x[ROWS];
    for (int t = 0; t < ROWS; ++t) {
        bytes[t] = p.x.bytes + (row + t) * blocks * ROW_BYTES;
        x[t] = p.x.blocks + (row + t) * blocks;
    }

    __m512 total[ROWS][2] = {};
    for (int64_t g = 0; g < groups; ++g) {
        __m512 scale[2], offset[2] = {};
        load_scales<S, FETCH>(scales, g, groups, scale);
        if constexpr (Form::OFFSET) {
            load_scales<S, FETCH>(offsets, g, groups, offset);
        }
        for (int64_t b = 0; b < blocks_in_group; ++b, codes += BYTES) {
            __m512i sums[ROWS][2];
            block_sums<Form::BITS, QUADS, Form::PLANES, ROWS>(codes, bytes, sums);
            for (int t = 0; t < ROWS; ++t) {
                add_block<Form>(*x[t], first_code, scale, offset, sums[t], total[t]);
                bytes[t] += ROW_BYTES;
                ++x[t];
            }
            if constexpr (FETCH) {
                fetch<BYTES>(codes + FETCH_BYTES);
            }
        }
    }
    for (int t = 0; t < ROWS; ++t) {
        p.write(row + t, panel, total[t]);
    }
}

// The rows that fill no tile.
template <class Form, bool FETCH>
void multiply_rest(const Product& p, int64_t panel, int64_t row, int64_t end) {
    if constexpr (tile_rows<Form>() > 2) {
        switch (end - row) {
            case 3: return multiply_tile<Form, 3, FETCH>(p, panel, row);
            case 2: return multiply_tile<Form, 2, FETCH>(p, panel, row);
        }
    }
    multiply_tile<Form, 1, FETCH>(p, panel, row);
}

template <class Form>
void multiply_rows(const Product& p, int64_t panel, int64_t row, int64_t end) {
    constexpr int TILE = tile_rows<Form>();
    if (row + TILE > end) {
        return multiply_rest<Form, true>(p, panel, row, end);
    }
    multiply_tile<Form, TILE, true>(p, panel, row);
    for (row += TILE; row + TILE <= end; row += TILE) {
        multiply_tile<Form, TILE, false>(p, panel, row);
    }
    if (row < end) {
        multiply_rest<Form, false>(p, panel, row, end);
    }
}

template <class S, int BITS_, bool OFFSET_, int QUADS_, int PLANES_>
struct FormOf {
    using Scale = S;
    static constexpr int BITS = BITS_, QUADS = QUADS_, PLANES = PLANES_;
    static constexpr bool OFFSET = OFFSET_;
};

// Calls f(FormOf<…>{}) for the weight's form.
template <class S, int QUADS, int PLANES, class F>
void with_coded_form(const Weight& w, F f) {
    if (w.kind == QUADS8) {
        f(FormOf<S, 8, false, QUADS, PLANES>{});
    } else if (w.offset) {
        f(FormOf<S, 4, true, QUADS, PLANES>{});
    } else {
        f(FormOf<S, 4, false, QUADS, PLANES>{});
    }
}

template <class S, int QUADS, class F>
void with_scaled_form(const Weight& w, F f) {
    switch (w.planes) {
        case 1: return with_coded_form<S, QUADS, 1>(w, f);
        case 2: return with_coded_form<S, QUADS, 2>(w, f);
        default: return with_coded_form<S, QUADS, 3>(w, f);
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

}  // namespace

void integer_matmul(const Weight& w, const float* x, int64_t num_rows, int64_t stride_x, float* out,
                    int64_t stride_out) {
    const int most_bits = w.kind == QUADS8 ? 19 : 21;  // 32 products with codes of 8 or 4 bits fit 32 bits
    const auto rows = quantize_rows(x, stride_x, num_rows, w.num_inputs, w.quad_block(), w.planes, most_bits);
    const Product p{w, rows, out, stride_out};
    const int64_t most_rows = ROW_BLOCK_BYTES / (w.planes * w.num_inputs);
    const int64_t row_block = std::max<int64_t>(1, most_rows / MOST_TILE_ROWS) * MOST_TILE_ROWS;
    const int64_t row_blocks = (num_rows + row_block - 1) / row_block;
    const int64_t panel_products = PANEL * w.num_inputs * std::min(num_rows, row_block);
    const int64_t grain = std::clamp<int64_t>(TASK_PRODUCTS / panel_products, 1, 8);  // panels of a task
    const int64_t tasks = (w.num_panels() + grain - 1) / grain;
    with_form(w, [&](auto form) {
        using Form = decltype(form);
        parallel_for(row_blocks * tasks, [&](int64_t task) {
            const int64_t row = task / tasks * row_block, first = task % tasks * grain;
            for (int64_t panel = first; panel < std::min(w.num_panels(), first + grain); ++panel) {
                multiply_rows<Form>(p, panel, row, std::min(num_rows, row + row_block));
            }
        });
    });
}

}  // namespace perseid

#endif
