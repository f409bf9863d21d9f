#include "quantize.h"

#include "simd.h"

#ifdef PERSEID_VNNI

#include <algorithm>
#include <limits>
#include <vector>

#include "threads.h"

namespace perseid {
namespace {

constexpr float ROOM = 128.0f / 127.0f;   // up to 127 / 128 of the range the high byte is a signed byte
constexpr float SMALLEST = 1e-30f;        // below it a block counts as zeros: 1 / scale would overflow

inline float power_of_two(uint32_t biased_exponent) {
    const uint32_t bits = biased_exponent << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The scale of a block whose largest magnitude is `largest`, and its inverse. What is no number goes into the scale,
// and from there into every output.
inline void choose_scale(float largest, int64_t planes, int bits, float& scale, float& inverse) {
    scale = inverse = 0.0f;
    if (!(largest <= std::numeric_limits<float>::max())) {
        scale = largest;
    } else if (largest >= SMALLEST && planes == 1) {
        scale = largest / 127.0f;
        inverse = 127.0f / largest;
    } else if (largest >= SMALLEST) {
        uint32_t pattern;
        const float roomy = std::min(largest * ROOM, std::numeric_limits<float>::max());
        std::memcpy(&pattern, &roomy, sizeof pattern);
        const uint32_t exponent = (pattern >> 23) - uint32_t(bits - 1);
        scale = power_of_two(exponent);
        inverse = power_of_two(254 - exponent);
    }
}

inline __m512i round_shift(__m512i q, int bits) {
    return _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(1 << (bits - 1))), bits);
}

// Sixteen inputs' integers: their bytes are stored, `plane` apart; the integers are returned.
template <int PLANES>
inline __m512i split(__m512 x, __m512 inverse, int8_t* bytes, int64_t plane) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    __m512i rest = q;
    for (int p = 0; p < PLANES; ++p) {
        const int bits = PLANE_BITS * (PLANES - 1 - p);
        const __m512i upper = bits ? round_shift(rest, bits) : rest;
        rest = _mm512_sub_epi32(rest, _mm512_slli_epi32(upper, bits));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + p * plane), _mm512_cvtepi32_epi8(upper));
    }
    return q;
}

// VECTORS · 16 inputs. The largest magnitude is found among the bit patterns: NaN's lies above infinity's.
template <int VECTORS, int PLANES>
inline void quantize_block(const float* x, int bits, int8_t* bytes, BlockSums& block) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < VECTORS; ++i) {
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + 16 * i), magnitude));
    }
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
    float inverse;
    choose_scale(largest, PLANES, bits, block.scale, inverse);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < VECTORS; ++i) {
        const __m512 values = _mm512_loadu_ps(x + 16 * i);
        total = _mm512_add_epi32(total, split<PLANES>(values, _mm512_set1_ps(inverse), bytes + 16 * i, 16 * VECTORS));
    }
    block.total = _mm512_reduce_add_epi32(total);
    block.sum = block.scale * float(block.total);
}

template <int VECTORS, int PLANES>
void quantize_row(const float* x, int64_t num_blocks, int bits, int8_t* bytes, BlockSums* blocks) {
    for (int64_t b = 0; b < num_blocks; ++b) {
        quantize_block<VECTORS, PLANES>(x + b * 16 * VECTORS, bits, bytes + b * PLANES * 16 * VECTORS, blocks[b]);
    }
}

using QuantizeRow = void (*)(const float*, int64_t, int, int8_t*, BlockSums*);

template <int VECTORS>
QuantizeRow quantize_of(int64_t planes) {
    return planes == 1 ? quantize_row<VECTORS, 1> : planes == 2 ? quantize_row<VECTORS, 2> : quantize_row<VECTORS, 3>;
}

}  // namespace

QuantizedRows quantize_rows(const float* x, int64_t stride_x, int64_t num_rows, int64_t num_inputs, int64_t block,
                            int64_t planes, int most_bits) {
    static thread_local std::vector<int8_t> bytes;
    static thread_local std::vector<BlockSums> sums;
    const int64_t num_blocks = num_inputs / block;
    bytes.resize(std::max<size_t>(bytes.size(), num_rows * num_inputs * planes));
    sums.resize(std::max<size_t>(sums.size(), num_rows * num_blocks));
    int8_t* to = bytes.data();
    BlockSums* to_sums = sums.data();
    const QuantizeRow quantize = block == 32 ? quantize_of<2>(planes) : quantize_of<1>(planes);
    const int bits = std::min(int(PLANE_BITS * planes), most_bits);
    for_rows(num_rows, num_inputs, [&](int64_t t) {
        quantize(x + t * stride_x, num_blocks, bits, to + t * num_inputs * planes, to_sums + t * num_blocks);
    });
    return {to, to_sums, num_blocks};
}

}  // namespace perseid

#endif
