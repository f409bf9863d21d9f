// The low-rank sums of one linear: which rows use which page of which projection with which weight, then two loops.
#pragma once

#include <cstdint>
#include <vector>

namespace perseid {

constexpr int64_t PAGE_RANK = 16;

struct Adapted {  // a linear's inputs and outputs, and the adapters' pages for it
    const float* x;
    int64_t stride_x, num_inputs;
    const float* a;       // [P][num_slices · PAGE_RANK][num_inputs]
    const float* b;       // [P][PAGE_RANK][num_outputs]
    const int32_t* live;  // [P][num_slices], rows of A that are not zero
    const int64_t* slice_ends;
    int64_t num_slices;
    float* out;
    int64_t stride_out;

    int64_t num_outputs() const { return slice_ends[num_slices - 1]; }
    int64_t rank(int64_t page, int64_t slice) const { return live[page * num_slices + slice]; }
};

// out[t] += w_t · (x[t] @ Aᵀ) @ B, page by page. Rows are collected first, as chains: the pages of one projection in the
// order in which their products are added. No row may be in two chains of a projection. Each number is summed in the
// order of the inputs, of the row's own pages and of the ranks: neighbours do not matter.
//
// Kept from linear to linear for its memory.
class LowRank {
  public:
    void begin(const Adapted& linear);
    void begin_chain(int64_t slice);

    // The chain's next page, for these rows with weights[i · stride]. Nothing if the page leaves the projection alone.
    void add(int64_t page, const int32_t* rows, int64_t count, const float* weights, int64_t stride);

    // All chains' sums.
    void run();

  private:
    struct Product {  // one page's, for the entries from `first` on
        int64_t page, slice, first, count;
    };
    struct Chain {
        int64_t slice, first, end;  // products
    };
    struct Expand {  // outputs [first, end) of a chain
        const Chain* chain;
        int64_t first, end;
    };

    void find_expands();
    void shrink(const Product& product);
    void expand(const Expand& part) const;

    Adapted linear_{};
    std::vector<Product> products_;
    std::vector<Chain> chains_;
    std::vector<Expand> expands_;
    std::vector<int32_t> rows_;  // of each entry
    std::vector<float> weights_;
    std::vector<float> z_;  // [entries][PAGE_RANK]
};

}  // namespace perseid
