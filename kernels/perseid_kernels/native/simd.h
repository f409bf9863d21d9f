// Float lanes: sixteen with AVX-512, eight with AVX2 + FMA + F16C, and eight in plain loops elsewhere (which compilers
// turn into NEON). All forms have the same operations, and `fma` rounds once in each. A sum over lanes depends on how
// many there are; everything else is the same bits on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define PERSEID_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PERSEID_AVX2 1
#endif
#if defined(PERSEID_AVX512) || defined(PERSEID_AVX2)
#include <immintrin.h>
#endif

#if defined(PERSEID_AVX512) && defined(__AVX512VNNI__)
#define PERSEID_VNNI 1  // products of bytes: the integer product (integer_matmul.cpp) is there
#endif

namespace perseid {

#ifdef PERSEID_AVX512
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

struct Half {  // IEEE binary16
    uint16_t bits;
};

struct BFloat {  // the upper half of a float32
    uint16_t bits;
};

#if defined(PERSEID_AVX512)

using V = __m512;
using VI = __m512i;  // int32

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float a) { return _mm512_set1_ps(a); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }  // a · b + c
inline uint32_t equal_lanes(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }  // a bit each
inline uint32_t greater_lanes(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // not where either is NaN
inline V first_lanes(V a, int n, V others) { return _mm512_mask_mov_ps(others, __mmask16((1u << n) - 1), a); }  // n ≤ LANES
inline V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V to_float(VI a) { return _mm512_cvtepi32_ps(a); }
inline float to_float(Half h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h.bits))); }
inline V load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V load(const BFloat* p) {
    const VI wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V load(const int8_t* p) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// The low and the high nibbles of LANES bytes.
inline void nibbles(const uint8_t* p, VI& low, VI& high) {
    const VI bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
    high = _mm512_srli_epi32(bytes, 4);
}

// Sixteen floats in a register, read by index.
struct Table {
    V values;
    explicit Table(const float* from) : values(load(from)) {}
    V operator[](VI index) const { return _mm512_permutexvar_ps(index, values); }
};

// 2^n for whole n in [-126, 128]; 2^128 is infinity.
inline V power_of_two(V n) {
    const VI exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

// In each quarter of a register, lane i is the sum of the quarter of rows[i].
inline V sum_quarters(const V rows[4]) {
    const V a = add(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    const V b = add(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}

// sums[i] is the sum of rows[i]: within the quarters, then (0 + 2) + (1 + 3) of them.
inline void sum_each(const V rows[4], float* sums) {
    const V quarters = sum_quarters(rows);
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// The same for LANES rows, in lanes, with the same order of additions.
inline V sum_each(const V rows[LANES]) {
    const V q[4] = {sum_quarters(rows), sum_quarters(rows + 4), sum_quarters(rows + 8), sum_quarters(rows + 12)};
    const V a = add(_mm512_shuffle_f32x4(q[0], q[1], 0x44), _mm512_shuffle_f32x4(q[0], q[1], 0xee));
    const V b = add(_mm512_shuffle_f32x4(q[2], q[3], 0x44), _mm512_shuffle_f32x4(q[2], q[3], 0xee));
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

#elif defined(PERSEID_AVX2)

using V = __m256;
using VI = __m256i;  // int32

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float a) { return _mm256_set1_ps(a); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }  // a · b + c
inline uint32_t equal_lanes(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }  // a bit each
inline uint32_t greater_lanes(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }  // not where either is NaN
inline V first_lanes(V a, int n, V others) {  // n ≤ LANES
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(others, a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes)));
}
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V to_float(VI a) { return _mm256_cvtepi32_ps(a); }
inline float to_float(Half h) { return _cvtsh_ss(h.bits); }
inline V load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V load(const BFloat* p) {
    const VI wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V load(const int8_t* p) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// The low and the high nibbles of LANES bytes.
inline void nibbles(const uint8_t* p, VI& low, VI& high) {
    const VI bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    high = _mm256_srli_epi32(bytes, 4);
}

// Sixteen floats in two registers, read by index.
struct Table {
    V lower, upper;
    explicit Table(const float* values) : lower(load(values)), upper(load(values + LANES)) {}
    V operator[](VI index) const {
        const V is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index), is_upper);
    }
};

// 2^n for whole n in [-126, 128]; 2^128 is infinity.
inline V power_of_two(V n) {
    const VI exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// sums[i] is the sum of rows[i]: ((0+1)+(2+3)) + ((4+5)+(6+7)) for each.
inline void sum_each(const V rows[4], float* sums) {
    const V a = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}

// The same for LANES rows, in lanes.
inline V sum_each(const V rows[LANES]) {
    const V a = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
    const V b = _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#else

struct V {
    float f[LANES];
};
struct VI {
    int32_t i[LANES];
};

#define PERSEID_LANES(expression)          \
    V r;                                   \
    for (int i = 0; i < LANES; ++i) {      \
        r.f[i] = (expression);             \
    }                                      \
    return r

inline float to_float(Half h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000) << 16;
    const uint32_t exponent = (h.bits >> 10) & 31;
    const uint32_t fraction = h.bits & 0x3ff;
    if (exponent == 0) {  // zero or subnormal: fraction · 2^-24
        const float value = float(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float to_float(BFloat b) {
    const uint32_t bits = uint32_t(b.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline V zero() { return V{}; }
inline V set1(float a) { PERSEID_LANES(a); }
inline V load(const float* p) { PERSEID_LANES(p[i]); }
inline void store(float* p, V a) { std::memcpy(p, a.f, sizeof a.f); }
inline V add(V a, V b) { PERSEID_LANES(a.f[i] + b.f[i]); }
inline V sub(V a, V b) { PERSEID_LANES(a.f[i] - b.f[i]); }
inline V mul(V a, V b) { PERSEID_LANES(a.f[i] * b.f[i]); }
inline V div(V a, V b) { PERSEID_LANES(a.f[i] / b.f[i]); }
inline V max(V a, V b) { PERSEID_LANES(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
inline V min(V a, V b) { PERSEID_LANES(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
inline V fma(V a, V b, V c) { PERSEID_LANES(std::fma(a.f[i], b.f[i], c.f[i])); }
inline uint32_t equal_lanes(V a, V b) {
    uint32_t lanes = 0;
    for (int i = 0; i < LANES; ++i) {
        lanes |= uint32_t(a.f[i] == b.f[i]) << i;
    }
    return lanes;
}
inline uint32_t greater_lanes(V a, V b) {  // not where either is NaN
    uint32_t lanes = 0;
    for (int i = 0; i < LANES; ++i) {
        lanes |= uint32_t(a.f[i] > b.f[i]) << i;
    }
    return lanes;
}
inline V first_lanes(V a, int n, V others) { PERSEID_LANES(i < n ? a.f[i] : others.f[i]); }  // n ≤ LANES
inline V round(V a) { PERSEID_LANES(std::nearbyint(a.f[i])); }
inline V to_float(VI a) { PERSEID_LANES(float(a.i[i])); }
inline V load(const Half* p) { PERSEID_LANES(to_float(p[i])); }
inline V load(const BFloat* p) { PERSEID_LANES(to_float(p[i])); }
inline V load(const int8_t* p) { PERSEID_LANES(float(p[i])); }

inline void nibbles(const uint8_t* p, VI& low, VI& high) {
    for (int i = 0; i < LANES; ++i) {
        low.i[i] = p[i] & 15;
        high.i[i] = p[i] >> 4;
    }
}

struct Table {
    float values[2 * LANES];
    explicit Table(const float* from) { std::memcpy(values, from, sizeof values); }
    V operator[](VI index) const { PERSEID_LANES(values[index.i[i]]); }
};

inline V power_of_two(V n) { PERSEID_LANES(std::ldexp(1.0f, int(n.f[i]))); }

inline float sum_of(const V& row) {
    return ((row.f[0] + row.f[1]) + (row.f[2] + row.f[3])) + ((row.f[4] + row.f[5]) + (row.f[6] + row.f[7]));
}
inline V sum_each(const V rows[LANES]) { PERSEID_LANES(sum_of(rows[i])); }
inline void sum_each(const V rows[4], float* sums) {
    for (int i = 0; i < 4; ++i) {
        sums[i] = sum_of(rows[i]);
    }
}

#undef PERSEID_LANES

#endif

inline float to_float(float a) { return a; }

// Asks for BYTES that will soon be read. Past the end of an array it does nothing.
template <int BYTES>
inline void fetch(const void* from) {
    for (int i = 0; i < BYTES; i += 64) {
        __builtin_prefetch(static_cast<const char*>(from) + i);
    }
}

// The first n < LANES floats, zeros after them.
inline V load_some(const float* p, int64_t n) {
    float values[LANES] = {};
    std::memcpy(values, p, n * sizeof(float));
    return load(values);
}

inline void store_some(float* p, V a, int64_t n) {
    float values[LANES];
    store(values, a);
    std::memcpy(p, values, n * sizeof(float));
}

// A vector, or the first `count` of one.
inline V read(const float* p, int64_t count) { return count == LANES ? load(p) : load_some(p, count); }
inline void write(float* p, V a, int64_t count) { count == LANES ? store(p, a) : store_some(p, a, count); }

// Calls f(n, count) for the vectors of a row: LANES at a time, then the rest.
template <class F>
inline void for_vectors(int64_t width, F f) {
    int64_t n = 0;
    for (; n + LANES <= width; n += LANES) {
        f(n, int64_t(LANES));
    }
    if (n < width) {
        f(n, width - n);
    }
}

inline float lane(V a, int i) {
    float values[LANES];
    store(values, a);
    return values[i];
}

// Halves are added until one is left.
inline float sum(V a) {
    float f[LANES];
    store(f, a);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            f[i] += f[i + half];
        }
    }
    return f[0];
}

// The largest lane; not for NaN.
inline float largest(V a) {
    float f[LANES];
    store(f, a);
    float most = f[0];
    for (int i = 1; i < LANES; ++i) {
        most = f[i] > most ? f[i] : most;
    }
    return most;
}

// e^x within 2 ULP for |x| ≤ 87; e^-87 below, infinity from 88.4 on; NaN stays NaN. Cephes' expf: x = n · ln 2 + r,
// and a polynomial in r.
inline V exp(V x) {
    x = max(set1(-87.0f), x);
    x = min(set1(88.8f), x);
    const V n = round(mul(x, set1(1.44269504088896341f)));
    V r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return mul(add(fma(p, mul(r, r), r), set1(1.0f)), power_of_two(n));
}

// totals[i] = Σ lanes of rows[i] · x over n inputs, in ascending order of the vectors.
template <int ROWS>
inline void dot_totals(const float* const rows[ROWS], const float* x, int64_t n, V totals[ROWS]) {
    for (int i = 0; i < ROWS; ++i) {
        totals[i] = zero();
    }
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        const V value = load(x + k);
        for (int i = 0; i < ROWS; ++i) {
            totals[i] = fma(load(rows[i] + k), value, totals[i]);
        }
    }
    if (k < n) {
        const V value = load_some(x + k, n - k);
        for (int i = 0; i < ROWS; ++i) {
            totals[i] = fma(load_some(rows[i] + k, n - k), value, totals[i]);
        }
    }
}

// LANES dot products of length n with the same x, each summed in the same order: lane by lane, then `sum_each`.
inline V dot_lanes(const float* const rows[LANES], const float* x, int64_t n) {
    V totals[LANES];
    dot_totals<LANES>(rows, x, n, totals);
    return sum_each(totals);
}

constexpr int DOT_TILE = LANES == 16 ? 4 : 2;  // inputs whose sums with four rows fit the registers

// out[j] = four dot products with x[j], each summed as in `dot_lanes`. The rows are loaded once for all x.
template <int XS>
inline void dot4(const float* const rows[4], const float* const x[XS], int64_t n, float* const out[XS]) {
    V totals[XS][4];
    for (auto& each : totals) {
        each[0] = each[1] = each[2] = each[3] = zero();
    }
    const auto add_products = [&](int64_t k, int64_t count) {
        V values[4];
        for (int i = 0; i < 4; ++i) {
            values[i] = read(rows[i] + k, count);
        }
        for (int j = 0; j < XS; ++j) {
            const V value = read(x[j] + k, count);
            for (int i = 0; i < 4; ++i) {
                totals[j][i] = fma(values[i], value, totals[j][i]);
            }
        }
    };
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        add_products(k, LANES);
    }
    if (k < n) {
        add_products(k, n - k);
    }
    for (int j = 0; j < XS; ++j) {
        sum_each(totals[j], out[j]);
    }
}

// Calls f(first, size) for tiles of MOST, two and one that cover `count`; the size is a constant, an integral_constant.
template <int MOST, class F>
inline void in_tiles(int64_t count, F f) {
    int64_t i = 0;
    for (; i + MOST <= count; i += MOST) {
        f(i, std::integral_constant<int, MOST>{});
    }
    for (; i + 2 <= count; i += 2) {
        f(i, std::integral_constant<int, 2>{});
    }
    if (i < count) {
        f(i, std::integral_constant<int, 1>{});
    }
}

}  // namespace perseid
