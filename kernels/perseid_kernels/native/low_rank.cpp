// Shrink fills z = w · A x for each page and row that uses it, expand adds Bᵀ z to the outputs.
#include "low_rank.h"

#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t COLUMN_BLOCK = 256;  // outputs of an expand task: a page's B for them stays in the first cache

// out += Bᵀ z for LANES · VECTORS outputs of some rows; the page's B is loaded once for all of them.
template <int ROWS, int VECTORS>
void expand_tile(const float* z, int64_t rank, const float* b, int64_t stride, float* const to[ROWS], int64_t count) {
    V totals[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < VECTORS; ++v) {
            totals[i][v] = read(to[i] + v * LANES, count);
        }
    }
    for (int64_t r = 0; r < rank; ++r) {
        V part[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            part[v] = read(b + r * stride + v * LANES, count);
        }
        for (int i = 0; i < ROWS; ++i) {
            const V value = set1(z[i * PAGE_RANK + r]);
            for (int v = 0; v < VECTORS; ++v) {
                totals[i][v] = fma(value, part[v], totals[i][v]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < VECTORS; ++v) {
            write(to[i] + v * LANES, totals[i][v], count);
        }
    }
}

template <int ROWS>
void expand_rows(const float* z, int64_t rank, const float* b, int64_t stride, float* const out[ROWS], int64_t width) {
    float* to[ROWS];
    std::copy_n(out, ROWS, to);
    const auto advance = [&](int64_t by) {
        b += by;
        for (float*& row : to) {
            row += by;
        }
    };
    int64_t left = width;
    for (; left >= 2 * LANES; left -= 2 * LANES) {
        expand_tile<ROWS, 2>(z, rank, b, stride, to, LANES);
        advance(2 * LANES);
    }
    for (; left > 0; left -= LANES) {
        expand_tile<ROWS, 1>(z, rank, b, stride, to, std::min<int64_t>(LANES, left));
        advance(LANES);
    }
}

}  // namespace

void LowRank::begin(const Adapted& linear) {
    linear_ = linear;
    products_.clear();
    chains_.clear();
    rows_.clear();
    weights_.clear();
}

void LowRank::begin_chain(int64_t slice) {
    chains_.push_back({slice, int64_t(products_.size()), int64_t(products_.size())});
}

void LowRank::add(int64_t page, const int32_t* rows, int64_t count, const float* weights, int64_t stride) {
    Chain& chain = chains_.back();
    if (count == 0 || linear_.rank(page, chain.slice) == 0) {
        return;
    }
    products_.push_back({page, chain.slice, int64_t(rows_.size()), count});
    chain.end = int64_t(products_.size());
    rows_.insert(rows_.end(), rows, rows + count);
    for (int64_t i = 0; i < count; ++i) {
        weights_.push_back(weights[i * stride]);
    }
}

void LowRank::run() {
    z_.resize(std::max(z_.size(), rows_.size() * PAGE_RANK));
    find_expands();
    parallel_for(products_.size(), [&](int64_t i) { shrink(products_[i]); });
    parallel_for(expands_.size(), [&](int64_t i) { expand(expands_[i]); });
}

// Nothing for a projection that the rows' adapters leave alone.
void LowRank::find_expands() {
    expands_.clear();
    for (const Chain& chain : chains_) {
        const int64_t end = chain.end > chain.first ? linear_.slice_ends[chain.slice] : 0;
        for (int64_t n = chain.slice ? linear_.slice_ends[chain.slice - 1] : 0; n < end; n += COLUMN_BLOCK) {
            expands_.push_back({&chain, n, std::min(end, n + COLUMN_BLOCK)});
        }
    }
}

// For the rows of A that are in use, rounded up to four.
void LowRank::shrink(const Product& product) {
    const int64_t columns = linear_.num_slices * PAGE_RANK;
    const float* a = linear_.a + (product.page * columns + product.slice * PAGE_RANK) * linear_.num_inputs;
    for (int64_t row = 0; row < linear_.rank(product.page, product.slice); row += 4) {
        const float* const rows[4] = {a + row * linear_.num_inputs, a + (row + 1) * linear_.num_inputs,
                                      a + (row + 2) * linear_.num_inputs, a + (row + 3) * linear_.num_inputs};
        in_tiles<DOT_TILE>(product.count, [&](int64_t i, auto tile) {
            constexpr int TILE = decltype(tile)::value;
            const float* x[TILE];
            float* z[TILE];
            for (int t = 0; t < TILE; ++t) {
                x[t] = linear_.x + rows_[product.first + i + t] * linear_.stride_x;
                z[t] = z_.data() + (product.first + i + t) * PAGE_RANK + row;
            }
            dot4<TILE>(rows, x, linear_.num_inputs, z);
            for (int t = 0; t < TILE; ++t) {
                for (int r = 0; r < 4; ++r) {
                    z[t][r] *= weights_[product.first + i + t];
                }
            }
        });
    }
}

void LowRank::expand(const Expand& part) const {
    for (int64_t p = part.chain->first; p < part.chain->end; ++p) {
        const Product& product = products_[p];
        const int64_t stride = linear_.num_outputs();
        const float* b = linear_.b + product.page * PAGE_RANK * stride + part.first;
        in_tiles<4>(product.count, [&](int64_t i, auto tile) {
            constexpr int TILE = decltype(tile)::value;
            float* to[TILE];
            for (int t = 0; t < TILE; ++t) {
                to[t] = linear_.out + rows_[product.first + i + t] * linear_.stride_out + part.first;
            }
            const float* z = z_.data() + (product.first + i) * PAGE_RANK;
            const int64_t rank = linear_.rank(product.page, product.slice);
            expand_rows<TILE>(z, rank, b, stride, to, part.end - part.first);
        });
    }
}

}  // namespace perseid
