// Eight float lanes. AVX2 + FMA + F16C where the compiler targets them, plain loops elsewhere (which compilers
// turn into NEON). Both forms do the same operations in the same order, and `fma` rounds once in both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PERSEID_AVX2 1
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define PERSEID_VNNI 1  // products of bytes: the integer product (integer_matmul.cpp) is there
#endif

namespace perseid {

constexpr int LANES = 8;

struct Half {  // IEEE binary16
    uint16_t bits;
};

struct BFloat {  // the upper half of a float32
    uint16_t bits;
};

#ifdef PERSEID_AVX2

using V = __m256;   // eight floats
using VI = __m256i;  // eight int32

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

// The low and the high nibbles of eight bytes.
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

// Lane i is the sum of rows[i]: ((0+1)+(2+3)) + ((4+5)+(6+7)) for each.
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

inline V sum_each(const V rows[LANES]) {
    PERSEID_LANES(((rows[i].f[0] + rows[i].f[1]) + (rows[i].f[2] + rows[i].f[3])) +
                  ((rows[i].f[4] + rows[i].f[5]) + (rows[i].f[6] + rows[i].f[7])));
}

#undef PERSEID_LANES

#endif

inline float to_float(float a) { return a; }

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

inline float lane(V a, int i) {
    float values[LANES];
    store(values, a);
    return values[i];
}

inline float sum(V a) {
    float f[LANES];
    store(f, a);
    return ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
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

// Eight dot products of length n with the same x, each summed in the same order: lane by lane, then `sum_each`.
inline V dot8(const float* const rows[LANES], const float* x, int64_t n) {
    V total[LANES] = {zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        const V value = load(x + k);
        for (int i = 0; i < LANES; ++i) {
            total[i] = fma(load(rows[i] + k), value, total[i]);
        }
    }
    if (k < n) {
        const V value = load_some(x + k, n - k);
        for (int i = 0; i < LANES; ++i) {
            total[i] = fma(load_some(rows[i] + k, n - k), value, total[i]);
        }
    }
    return sum_each(total);
}

}  // namespace perseid
