// out[t] += Σ_j w_j · (x[t] @ A[p_j]ᵀ) @ B[p_j] over the pages p_j of row t's segment (equation in segments.py).
#include "lora.h"

#include <algorithm>

#include "low_rank.h"
#include "ops.h"

namespace perseid {
namespace {

constexpr int64_t ROW_BLOCK = 16;  // rows of a chain; four rows of a page's A stay in the first cache for them

}  // namespace

void add_segments(const RowSegments& segments, int64_t num_slices, LowRank& sums) {
    for (int64_t s = 0; s < segments.count; ++s) {
        for (int64_t first = segments.indptr[s]; first < segments.indptr[s + 1]; first += ROW_BLOCK) {
            const int64_t count = std::min<int64_t>(ROW_BLOCK, segments.indptr[s + 1] - first);
            for (int64_t slice = 0; slice < num_slices; ++slice) {
                sums.begin_chain(slice);
                for (int64_t j = segments.page_indptr[s]; j < segments.page_indptr[s + 1]; ++j) {
                    sums.add(segments.pages[j], segments.rows + first, count, segments.weights + j, 0);
                }
            }
        }
    }
}

PERSEID_OP void perseid_add_lora(const float* x, int64_t stride_x, int64_t num_inputs, const float* a, const float* b,
                                 const int32_t* live, const int64_t* slice_ends, int64_t num_slices,
                                 const int32_t* rows, const int32_t* indptr, const int32_t* pages,
                                 const float* weights, const int32_t* page_indptr, int64_t num_segments, float* out,
                                 int64_t stride_out) {
    static thread_local LowRank sums;  // the caller's, reused by every linear of every step
    sums.begin({x, stride_x, num_inputs, a, b, live, slice_ends, num_slices, out, stride_out});
    add_segments({num_segments, rows, indptr, pages, weights, page_indptr}, num_slices, sums);
    sums.run();
}

}  // namespace perseid
