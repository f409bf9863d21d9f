// Rows of activations as 16-bit integers with a scale for every block of inputs, for the integer product.
//
//     x[t, i] ≈ scale(t, b) · q[t, i]        q = 256 · high + low, both signed bytes
//
// The scale is the power of two that lets the block's largest magnitude just fit, so nothing but q is rounded, and the
// error is at most 2^-15 of that magnitude: a float16 would round it by 2^-11, a bfloat16 by 2^-8. Each row is quantised
// by itself: it becomes the same integers in any batch.
#pragma once

#include <cstdint>

namespace perseid {

struct BlockSums {  // of one block of one row
    float scale;    // NaN or infinite where an input is, so that the outputs are too
    float sum;      // scale · Σ q
    int32_t total;  // Σ q
    int32_t unused;
};

struct QuantizedRows {
    const int8_t* bytes;      // [T][blocks][2][block]: the high bytes of a block, then the low ones
    const BlockSums* blocks;  // [T][blocks]
    int64_t num_blocks;
};

// Into the caller's scratch memory, which the next call on the same thread reuses. `block` is 16 or 32.
QuantizedRows quantize_rows(const float* x, int64_t stride_x, int64_t num_rows, int64_t num_inputs, int64_t block);

}  // namespace perseid
