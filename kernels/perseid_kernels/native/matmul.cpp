// out[t, o] = Σ_i x[t, i] · W[o, i], added over i in ascending order by fma, whatever the number of rows.
//
// Few rows: weights are decoded in registers and used at once (the product waits for memory). Many rows: a chunk of
// a panel is decoded into a buffer in the first cache and multiplied with a tile of rows at a time.
#include <algorithm>
#include <vector>

#include "integer_matmul.h"
#include "ops.h"
#include "threads.h"
#include "weight.h"

namespace perseid {
namespace {

constexpr int64_t FEW_ROWS = 4;
#ifdef PERSEID_AVX512
constexpr int64_t ROW_TILE = 12;     // 24 accumulators, 2 weights, 1 input: 27 of 32 registers
#else
constexpr int64_t ROW_TILE = 6;      // 12 accumulators, 2 weights, 1 input: 15 of 16 registers
#endif
constexpr int64_t CHUNK = 4096 / PANEL;  // inputs decoded at a time: a 16 kB buffer
constexpr int64_t ROW_BLOCK = 192;   // rows that stay in the second cache while a panel's chunks pass
constexpr int64_t FETCH_STEP = 16;   // inputs whose weights are asked for at once
constexpr int64_t EMBED_ROWS = 8;    // of a task

struct Product {
    const Weight& w;
    const float* x;
    int64_t num_rows, stride_x;
    float* out;
    int64_t stride_out;

    void write(int64_t row, int64_t panel, V low, V high) const {
        float* to = out + row * stride_out + panel * PANEL;
        const int64_t left = w.num_outputs - panel * PANEL;
        if (left >= PANEL) {
            store(to, low);
            store(to + LANES, high);
        } else {
            store_some(to, low, std::min<int64_t>(left, LANES));
            store_some(to + LANES, high, std::max<int64_t>(left - LANES, 0));
        }
    }
};

// PANELS · ROWS · 2 sums in registers; two panels at once for a single row, to have enough independent sums.
template <class Reader, int PANELS, int ROWS>
void few_rows(const Product& p, int64_t panel, int64_t row) {
    Reader readers[2] = {Reader(p.w, panel), Reader(p.w, panel + PANELS - 1)};
    V low[PANELS][ROWS], high[PANELS][ROWS];
    for (int i = 0; i < PANELS; ++i) {
        for (int t = 0; t < ROWS; ++t) {
            low[i][t] = high[i][t] = zero();
        }
    }
    const float* x = p.x + row * p.stride_x;
    for (int64_t k = 0; k < p.w.num_inputs;) {
        for (int i = 0; i < PANELS; ++i) {
            if (k % p.w.group == 0) {
                readers[i].begin_group(k / p.w.group);
            }
            fetch<FETCH_STEP * Reader::BYTES>(static_cast<const char*>(readers[i].at(k)) + FETCH_BYTES);
        }
        for (const int64_t end = std::min(k + FETCH_STEP, (k / p.w.group + 1) * p.w.group); k < end; ++k) {
            for (int i = 0; i < PANELS; ++i) {
                V a, b;
                readers[i].read(k, a, b);
                for (int t = 0; t < ROWS; ++t) {
                    const V value = set1(x[t * p.stride_x + k]);
                    low[i][t] = fma(value, a, low[i][t]);
                    high[i][t] = fma(value, b, high[i][t]);
                }
            }
        }
    }
    for (int i = 0; i < PANELS; ++i) {
        for (int t = 0; t < ROWS; ++t) {
            p.write(row + t, panel + i, low[i][t], high[i][t]);
        }
    }
}

// sums[t] += Σ_k x[t, k] · buffer[k] for ROWS rows.
template <int ROWS>
void multiply_tile(const float* x, int64_t stride_x, const float* buffer, int64_t count, float* sums) {
    V low[ROWS], high[ROWS];
    for (int t = 0; t < ROWS; ++t) {
        low[t] = load(sums + t * PANEL);
        high[t] = load(sums + t * PANEL + LANES);
    }
    for (int64_t k = 0; k < count; ++k) {
        const V a = load(buffer + k * PANEL);
        const V b = load(buffer + k * PANEL + LANES);
        for (int t = 0; t < ROWS; ++t) {
            const V value = set1(x[t * stride_x + k]);
            low[t] = fma(value, a, low[t]);
            high[t] = fma(value, b, high[t]);
        }
    }
    for (int t = 0; t < ROWS; ++t) {
        store(sums + t * PANEL, low[t]);
        store(sums + t * PANEL + LANES, high[t]);
    }
}

// All rows, in tiles of ROWS and then one of what is left.
template <int ROWS = ROW_TILE>
void multiply_rows(const float* x, int64_t stride_x, int64_t rows, const float* buffer, int64_t count, float* sums) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * stride_x, sums += ROWS * PANEL) {
        multiply_tile<ROWS>(x, stride_x, buffer, count, sums);
    }
    if constexpr (ROWS > 1) {
        multiply_rows<ROWS - 1>(x, stride_x, rows, buffer, count, sums);
    }
}

// buffer[k − start] = the panel's weights of input k.
template <class Reader>
void decode(Reader& reader, int64_t group, int64_t start, int64_t count, float* buffer) {
    for (int64_t k = start; k < start + count;) {
        reader.begin_group(k / group);
        for (const int64_t end = std::min(start + count, (k / group + 1) * group); k < end; ++k) {
            V low, high;
            reader.read(k, low, high);
            store(buffer + (k - start) * PANEL, low);
            store(buffer + (k - start) * PANEL + LANES, high);
        }
    }
}

template <class Reader>
void many_rows(const Product& p, int64_t panel) {
    alignas(64) float buffer[CHUNK * PANEL];
    alignas(64) float sums[ROW_BLOCK * PANEL];
    for (int64_t first = 0; first < p.num_rows; first += ROW_BLOCK) {
        const int64_t rows = std::min(ROW_BLOCK, p.num_rows - first);
        std::fill(sums, sums + rows * PANEL, 0.0f);
        Reader reader(p.w, panel);
        for (int64_t start = 0; start < p.w.num_inputs; start += CHUNK) {
            const int64_t count = std::min(CHUNK, p.w.num_inputs - start);
            decode(reader, p.w.group, start, count, buffer);
            multiply_rows(p.x + first * p.stride_x + start, p.stride_x, rows, buffer, count, sums);
        }
        for (int64_t t = 0; t < rows; ++t) {
            p.write(first + t, panel, load(sums + t * PANEL), load(sums + t * PANEL + LANES));
        }
    }
}

template <class Reader>
void one_row(const Product& p, int64_t first, int64_t end) {
    int64_t panel = first;
    for (; panel + 2 <= end; panel += 2) {
        few_rows<Reader, 2, 1>(p, panel, 0);
    }
    if (panel < end) {
        few_rows<Reader, 1, 1>(p, panel, 0);
    }
}

template <class Reader>
void product(const Product& p, int64_t first, int64_t end) {
    if (p.num_rows == 1) {
        return one_row<Reader>(p, first, end);
    }
    for (int64_t panel = first; panel < end; ++panel) {
        switch (p.num_rows) {
            case 2: few_rows<Reader, 1, 2>(p, panel, 0); break;
            case 3: few_rows<Reader, 1, 3>(p, panel, 0); break;
            case FEW_ROWS: few_rows<Reader, 1, FEW_ROWS>(p, panel, 0); break;
            default: many_rows<Reader>(p, panel);
        }
    }
}

// One output's row of a QUADS weight: the inputs lie four by four.
template <class S>
void embed_quads(const Weight& w, int64_t output, float* out) {
    const int64_t block = w.quad_block(), groups = w.num_inputs / w.group;
    const int64_t panel = output / PANEL, lane = output % PANEL;
    const int64_t half = w.kind == QUADS8 ? block : block / 2;  // inputs whose codes are a block's bytes (their low bits)
    const auto* codes = static_cast<const uint8_t*>(w.codes) + panel * w.num_inputs / block * half * PANEL + lane * 4;
    for (int64_t start = 0; start < w.num_inputs; start += block, codes += half * PANEL) {
        const int64_t at = (panel * groups + start / w.group) * PANEL + lane;
        const float scale = to_float(static_cast<const S*>(w.scale)[at]);
        const float offset = w.offset ? to_float(static_cast<const S*>(w.offset)[at]) : 0.0f;
        const auto value = [&](int code) { return (w.codebook[0] + float(code)) * scale + offset; };
        for (int64_t k = 0; k < half; ++k) {
            const uint8_t byte = codes[k / 4 * PANEL * 4 + k % 4];
            out[start + k] = value(w.kind == QUADS8 ? byte : byte & 15);
            if (w.kind == QUADS4) {
                out[start + half + k] = value(byte >> 4);
            }
        }
    }
}

// One output's row of a weight in panels: its panel is decoded.
template <class Reader>
void embed_panels(const Weight& w, int64_t output, float* out) {
    static thread_local std::vector<float> panel;
    panel.resize(w.num_inputs * PANEL);
    Reader reader(w, output / PANEL);
    decode(reader, w.group, 0, w.num_inputs, panel.data());
    for (int64_t k = 0; k < w.num_inputs; ++k) {
        out[k] = panel[k * PANEL + output % PANEL];
    }
}

}  // namespace

PERSEID_OP void perseid_matmul(
    const Weight* w, const float* x, int64_t num_rows, int64_t stride_x, float* out, int64_t stride_out) {
    if (num_rows == 0) {
        return;
    }
#ifdef PERSEID_VNNI
    if (w->is_quads()) {
        return integer_matmul(*w, x, num_rows, stride_x, out, stride_out);
    }
#endif
    const Product p{*w, x, num_rows, stride_x, out, stride_out};
    with_reader(*w, [&](auto type) {
        using Reader = typename decltype(type)::Reader;
        const int64_t panels = w->num_panels();
        const int64_t grain = num_rows <= FEW_ROWS ? 4 : 2;  // panels of a task: enough work to be worth taking
        parallel_for((panels + grain - 1) / grain, [&](int64_t task) {
            product<Reader>(p, task * grain, std::min(panels, (task + 1) * grain));
        });
    });
}

PERSEID_OP int64_t perseid_panel() { return PANEL; }

PERSEID_OP int64_t perseid_has_integer_matmul() {
#ifdef PERSEID_VNNI
    return 1;
#else
    return 0;
#endif
}

PERSEID_OP void perseid_embed(const Weight* w, const int64_t* ids, int64_t count, float* out) {
    const auto embed_all = [&](auto embed) {
        parallel_for((count + EMBED_ROWS - 1) / EMBED_ROWS, [&](int64_t task) {
            for (int64_t i = task * EMBED_ROWS; i < std::min(count, (task + 1) * EMBED_ROWS); ++i) {
                embed(*w, ids[i], out + i * w->num_inputs);
            }
        });
    };
    if (w->is_quads()) {
        return embed_all(w->type == F16 ? embed_quads<Half> : embed_quads<float>);
    }
    with_reader(*w, [&](auto type) { embed_all(embed_panels<typename decltype(type)::Reader>); });
}

}  // namespace perseid
