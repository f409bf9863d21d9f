// A packed weight: panels of 2 · LANES outputs, in each panel the inputs one after the other.
//
//     W[o, i] = code(o, i) · scale(o, g) + offset(o, g)        g = i / group
//
// The codes of an input lie together: LANES bytes in 4 bits (the low nibbles are the panel's first LANES outputs, the
// high ones the others), PANEL bytes in 8 bits. So the lanes of a vector are outputs, every output's sum runs over the
// inputs in ascending order, and no result depends on how many rows share the product.
//
// The kinds QUADS4 and QUADS8 are for the integer product (integer_matmul.cpp), which takes four inputs at a time: in
// blocks of 32 inputs (16 where the group is no multiple of 32), 128 bytes are the panel's 32 outputs × 4 inputs. In 4
// bits the low nibbles are the block's first half, the high ones its second. Codes are stored without sign: codebook[0]
// is their smallest value, codebook[0] + stored their own.
#pragma once

#include <cstdint>

#include "simd.h"

namespace perseid {

constexpr int PANEL = 2 * LANES;

// How far ahead weights are asked for: the hardware's own prefetching stops at the end of a page.
constexpr int64_t FETCH_BYTES = 4096;

enum Kind : int32_t { AFFINE4 = 0, CODEBOOK4 = 1, INT8 = 2, DENSE = 3, QUADS4 = 4, QUADS8 = 5 };
enum Type : int32_t { F32 = 0, F16 = 1, BF16 = 2 };

struct Weight {  // the same fields as `pack._Weight` in Python
    int32_t kind;
    int32_t type;  // of scale and offset; of the values where dense
    int64_t num_outputs, num_inputs, group;
    int64_t planes;  // QUADS4, QUADS8: bytes of an activation, 1 to MOST_PLANES (quantize.h)
    const void* codes;
    const void* scale;   // [panels][groups][outputs of a panel]
    const void* offset;  // the same, or null
    float codebook[16];  // AFFINE4, QUADS4: codebook[i] = codebook[0] + i, and codebook[0] = 0 where there is an offset

    int64_t num_panels() const { return (num_outputs + PANEL - 1) / PANEL; }
    bool is_quads() const { return kind == QUADS4 || kind == QUADS8; }
    int64_t quad_block() const { return group % 32 == 0 ? 32 : 16; }
};

// The readers below decode a panel: `begin_group(g)`, then `read(k, low, high)` for each input of it; `at(k)` is where
// input k lies, in BYTES. They round as the canonical form's definition does (product, then sum), so the decoded weights
// are its values bit by bit.

template <class S>
struct ScaleReader {
    const S* scale;
    const S* offset;
    V scale_low, scale_high, offset_low, offset_high;

    ScaleReader(const Weight& w, int64_t panel) {
        const int64_t first = panel * (w.num_inputs / w.group) * PANEL;
        scale = static_cast<const S*>(w.scale) + first;
        offset = w.offset ? static_cast<const S*>(w.offset) + first : nullptr;
        scale_low = scale_high = offset_low = offset_high = zero();
    }
    template <bool OFFSET>
    void begin(int64_t g) {
        scale_low = load(scale + g * PANEL);
        scale_high = load(scale + g * PANEL + LANES);
        if (OFFSET) {
            offset_low = load(offset + g * PANEL);
            offset_high = load(offset + g * PANEL + LANES);
        }
    }
};

// Codes that are numbers need no table: codebook[q] = codebook[0] + q.
template <class S, bool OFFSET>
struct Affine4Reader : ScaleReader<S> {
    static constexpr int BYTES = LANES;
    const uint8_t* codes;
    V first;

    Affine4Reader(const Weight& w, int64_t panel)
        : ScaleReader<S>(w, panel),
          codes(static_cast<const uint8_t*>(w.codes) + panel * w.num_inputs * LANES),
          first(set1(w.codebook[0])) {}
    const void* at(int64_t k) const { return codes + k * LANES; }
    void begin_group(int64_t g) { this->template begin<OFFSET>(g); }
    void read(int64_t k, V& low, V& high) const {
        VI a, b;
        nibbles(codes + k * LANES, a, b);
        if (OFFSET) {  // packing takes this form for codebook[0] = 0 only
            low = add(mul(to_float(a), this->scale_low), this->offset_low);
            high = add(mul(to_float(b), this->scale_high), this->offset_high);
        } else {
            low = mul(add(to_float(a), first), this->scale_low);
            high = mul(add(to_float(b), first), this->scale_high);
        }
    }
};

template <class S, bool OFFSET>
struct Codebook4Reader : ScaleReader<S> {
    static constexpr int BYTES = LANES;
    const uint8_t* codes;
    Table table;

    Codebook4Reader(const Weight& w, int64_t panel)
        : ScaleReader<S>(w, panel),
          codes(static_cast<const uint8_t*>(w.codes) + panel * w.num_inputs * LANES),
          table(w.codebook) {}
    const void* at(int64_t k) const { return codes + k * LANES; }
    void begin_group(int64_t g) { this->template begin<OFFSET>(g); }
    void read(int64_t k, V& low, V& high) const {
        VI a, b;
        nibbles(codes + k * LANES, a, b);
        if (OFFSET) {
            low = add(mul(table[a], this->scale_low), this->offset_low);
            high = add(mul(table[b], this->scale_high), this->offset_high);
        } else {
            low = mul(table[a], this->scale_low);
            high = mul(table[b], this->scale_high);
        }
    }
};

template <class S>
struct Int8Reader : ScaleReader<S> {
    static constexpr int BYTES = PANEL;
    const int8_t* codes;

    Int8Reader(const Weight& w, int64_t panel)
        : ScaleReader<S>(w, panel), codes(static_cast<const int8_t*>(w.codes) + panel * w.num_inputs * PANEL) {}
    const void* at(int64_t k) const { return codes + k * PANEL; }
    void begin_group(int64_t g) { this->template begin<false>(g); }
    void read(int64_t k, V& low, V& high) const {
        low = mul(load(codes + k * PANEL), this->scale_low);
        high = mul(load(codes + k * PANEL + LANES), this->scale_high);
    }
};

template <class T>
struct DenseReader {
    static constexpr int BYTES = PANEL * sizeof(T);
    const T* values;

    DenseReader(const Weight& w, int64_t panel)
        : values(static_cast<const T*>(w.codes) + panel * w.num_inputs * PANEL) {}
    const void* at(int64_t k) const { return values + k * PANEL; }
    void begin_group(int64_t) {}
    void read(int64_t k, V& low, V& high) const {
        low = load(values + k * PANEL);
        high = load(values + k * PANEL + LANES);
    }
};

template <class R>
struct ReaderType {
    using Reader = R;
};

// Calls f(ReaderType<the weight's reader>{}).
template <class S, class F>
void with_scaled_reader(const Weight& w, F f) {
    if (w.kind == INT8) {
        f(ReaderType<Int8Reader<S>>{});
    } else if (w.kind == AFFINE4) {
        w.offset ? f(ReaderType<Affine4Reader<S, true>>{}) : f(ReaderType<Affine4Reader<S, false>>{});
    } else {
        w.offset ? f(ReaderType<Codebook4Reader<S, true>>{}) : f(ReaderType<Codebook4Reader<S, false>>{});
    }
}

template <class F>
void with_reader(const Weight& w, F f) {
    if (w.kind != DENSE) {
        w.type == F16 ? with_scaled_reader<Half>(w, f) : with_scaled_reader<float>(w, f);
    } else if (w.type == F16) {
        f(ReaderType<DenseReader<Half>>{});
    } else if (w.type == BF16) {
        f(ReaderType<DenseReader<BFloat>>{});
    } else {
        f(ReaderType<DenseReader<float>>{});
    }
}

}  // namespace perseid
