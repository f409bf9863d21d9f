// Rows of activations as integers with a scale for every block of inputs, for the integer product.
//
//     x[t, i] ≈ scale(t, b) · q[t, i]        q = 2^14 · high + 2^7 · middle + low, three signed bytes
//
// The scale is the power of two that lets the block's largest magnitude just fit, so nothing but q is rounded. The
// error is at most 2^-21 of that magnitude beside 4-bit codes and 2^-19 beside 8-bit ones, whose sums must fit 32 bits
// too: less than what float32 loses in adding up a row. Each row is quantised by itself: it becomes the same integers
// in any batch.
//
// With fewer bytes it is faster and no longer exact: two hold 2^-15 of the largest magnitude; one holds 1/254 of it,
// with the scale that lets it fit to the last bit, as llama.cpp's Q8_0 does.
#pragma once

#include <cstdint>

namespace perseid {

constexpr int MOST_PLANES = 3;  // bytes of an integer
constexpr int PLANE_BITS = 7;   // between one byte and the next

struct BlockSums {  // of one block of one row
    float scale;    // NaN or infinite where an input is, so that the outputs are too
    float sum;      // scale · Σ q
    int32_t total;  // Σ q
    int32_t unused;
};

struct QuantizedRows {
    const int8_t* bytes;      // [T][blocks][planes][block]: the high bytes of a block, then the next
    const BlockSums* blocks;  // [T][blocks]
    int64_t num_blocks;
};

// Into the caller's scratch memory, which the next call on the same thread reuses. `block` is 16 or 32. `most_bits`
// bounds |q| < 2^most_bits beside what the bytes hold.
QuantizedRows quantize_rows(const float* x, int64_t stride_x, int64_t num_rows, int64_t num_inputs, int64_t block,
                            int64_t planes, int most_bits);

}  // namespace perseid
