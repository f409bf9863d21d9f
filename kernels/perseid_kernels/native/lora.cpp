// out[t] += Σ_j w_j · (x[t] @ A[p_j]ᵀ) @ B[p_j] over the pages p_j of row t's segment (equation in segments.py).
//
// Two loops: shrink fills z [rows, pages · C], expand adds to the outputs. Each number is summed in the order of the
// inputs, of the row's own page list and of the ranks: neighbours and segment lengths do not matter.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t PAGE_RANK = 16;
constexpr int64_t ROW_BLOCK = 16;      // rows of a task; four rows of a page's A stay in the first cache for them
constexpr int64_t COLUMN_BLOCK = 256;  // outputs of an expand task

struct RowBlock {
    const int32_t* rows;
    int64_t count;
    const int32_t* pages;
    const float* weights;
    int64_t num_pages;
    float* z;  // [count][num_pages][C]
};

// Segments cut into blocks of rows. `z` is grown to hold every block's.
void find_blocks(const int32_t* rows, const int32_t* indptr, const int32_t* pages, const float* weights,
                 const int32_t* page_indptr, int64_t num_segments, int64_t columns, std::vector<float>& z,
                 std::vector<RowBlock>& blocks) {
    blocks.clear();
    int64_t used = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
        const int64_t num_pages = page_indptr[s + 1] - page_indptr[s];
        for (int64_t first = indptr[s]; first < indptr[s + 1] && num_pages > 0; first += ROW_BLOCK) {
            const int64_t count = std::min<int64_t>(ROW_BLOCK, indptr[s + 1] - first);
            blocks.push_back({rows + first, count, pages + page_indptr[s], weights + page_indptr[s], num_pages, nullptr});
            used += count * num_pages * columns;
        }
    }
    z.resize(std::max<size_t>(z.size(), used));
    float* next = z.data();
    for (RowBlock& block : blocks) {
        block.z = next;
        next += block.count * block.num_pages * columns;
    }
}

struct Lora {
    const float* x;
    int64_t stride_x;
    const float* a;       // [P][C][K]
    const float* b;       // [P][PAGE_RANK][N]
    const int32_t* live;  // [P][slices], rows of A that are not zero
    int64_t num_inputs, num_outputs, num_slices, columns;
    float* out;
    int64_t stride_out;

    int64_t rank(const RowBlock& block, int64_t j, int64_t slice) const {
        return live[block.pages[j] * num_slices + slice];
    }

    // z = weight · A x for the rows of one projection that are in use, rounded up to four.
    void shrink(const RowBlock& block, int64_t j, int64_t slice) const {
        for (int64_t row = 0; row < rank(block, j, slice); row += 4) {
            shrink_rows(block, j, slice * PAGE_RANK + row);
        }
    }

    void shrink_rows(const RowBlock& block, int64_t j, int64_t column) const {
        const float* rows[4];
        for (int i = 0; i < 4; ++i) {
            rows[i] = a + (block.pages[j] * columns + column + i) * num_inputs;
        }
        for (int64_t t = 0; t < block.count; ++t) {
            float* to = block.z + (t * block.num_pages + j) * columns + column;
            dot4(rows, x + block.rows[t] * stride_x, num_inputs, to);
            for (int i = 0; i < 4; ++i) {
                to[i] *= block.weights[j];
            }
        }
    }

    // out += Bᵀ z for outputs [first, end) of one projection; `slice` picks its part of z.
    void expand(const RowBlock& block, int64_t slice, int64_t first, int64_t end) const {
        for (int64_t t = 0; t < block.count; ++t) {
            float* to = out + block.rows[t] * stride_out;
            for (int64_t j = 0; j < block.num_pages; ++j) {
                const float* z = block.z + (t * block.num_pages + j) * columns + slice * PAGE_RANK;
                add_page(z, rank(block, j, slice), b + block.pages[j] * PAGE_RANK * num_outputs, first, end, to);
            }
        }
    }

    void add_page(const float* z, int64_t rank, const float* page, int64_t first, int64_t end, float* to) const {
        if (rank == 0) {
            return;
        }
        int64_t n = first;
        for (; n + 2 * LANES <= end; n += 2 * LANES) {
            V low = load(to + n), high = load(to + n + LANES);
            for (int64_t r = 0; r < rank; ++r) {
                const V value = set1(z[r]);
                low = fma(value, load(page + r * num_outputs + n), low);
                high = fma(value, load(page + r * num_outputs + n + LANES), high);
            }
            store(to + n, low);
            store(to + n + LANES, high);
        }
        for (; n < end; n += LANES) {
            const int64_t count = std::min<int64_t>(LANES, end - n);
            V total = load_some(to + n, count);
            for (int64_t r = 0; r < rank; ++r) {
                total = fma(set1(z[r]), load_some(page + r * num_outputs + n, count), total);
            }
            store_some(to + n, total, count);
        }
    }
};

struct Shrink {  // one page's rows of one projection, for a block of rows
    const RowBlock* block;
    int64_t page, slice;
};

struct Expand {  // outputs [first, end) of one projection, for a block of rows
    const RowBlock* block;
    int64_t slice, first, end;
};

// What there is to do: nothing for a projection that the rows' adapters leave alone.
struct Work {
    std::vector<Shrink> shrinks;
    std::vector<Expand> expands;

    void find(const Lora& lora, const std::vector<RowBlock>& blocks, const int64_t* slice_ends) {
        shrinks.clear();
        expands.clear();
        for (const RowBlock& block : blocks) {
            for (int64_t slice = 0; slice < lora.num_slices; ++slice) {
                const size_t before = shrinks.size();
                for (int64_t j = 0; j < block.num_pages; ++j) {
                    if (lora.rank(block, j, slice) > 0) {
                        shrinks.push_back({&block, j, slice});
                    }
                }
                const int64_t end = shrinks.size() > before ? slice_ends[slice] : 0;
                for (int64_t n = slice ? slice_ends[slice - 1] : 0; n < end; n += COLUMN_BLOCK) {
                    expands.push_back({&block, slice, n, std::min(end, n + COLUMN_BLOCK)});
                }
            }
        }
    }
};

}  // namespace

PERSEID_OP void perseid_add_lora(
    const float* x, int64_t stride_x, int64_t num_inputs, const float* a, const float* b, const int32_t* live,
    const int64_t* slice_ends, int64_t num_slices, const int32_t* rows, const int32_t* indptr, const int32_t* pages, const float* weights,
    const int32_t* page_indptr, int64_t num_segments, float* out, int64_t stride_out) {
    static thread_local std::vector<float> z;  // the caller's, reused by every linear of every step
    static thread_local std::vector<RowBlock> blocks;
    static thread_local Work work;
    const int64_t columns = PAGE_RANK * num_slices;
    find_blocks(rows, indptr, pages, weights, page_indptr, num_segments, columns, z, blocks);
    const Lora lora{x,       stride_x, a,   b,         live, num_inputs, slice_ends[num_slices - 1], num_slices,
                    columns, out,      stride_out};
    work.find(lora, blocks, slice_ends);
    const auto& shrinks = work.shrinks;
    const auto& expands = work.expands;
    parallel_for(shrinks.size(), [&](int64_t i) { lora.shrink(*shrinks[i].block, shrinks[i].page, shrinks[i].slice); });
    parallel_for(expands.size(), [&](int64_t i) {
        lora.expand(*expands[i].block, expands[i].slice, expands[i].first, expands[i].end);
    });
}

}  // namespace perseid
