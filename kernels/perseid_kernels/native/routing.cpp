// Which columns a row uses, by its gates (equation in the package's routing.py). A row's logits are dot products in a
// fixed order, and all that follows reads one row: neighbours do not matter.
//
// One loop over tiles of rows decides; the chosen pages' products are then summed as those of named adapters.
#include "routing.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t ROW_TILE = 4;     // rows of a task: a gate is loaded once for all of them
constexpr int64_t CHAIN_ROWS = 64;  // rows of a chain: enough that several share a page of it in the first cache
constexpr float SMALLEST = -87.0f;  // e^x is nothing below

struct Choice {
    int32_t column;
    float weight;
};

// What the gates of a linear decide for some rows. Kept from linear to linear for its memory.
class Router {
  public:
    void decide(const Adapted& linear, const Gates& gates, const Routed& routed);
    void collect(LowRank& sums);

  private:
    // The candidates of one decision, with their logits and then e^((l − largest) / T); one for each thread.
    struct Candidates {
        std::vector<int32_t> columns;
        std::vector<float> values, shares;
        std::vector<char> kept;
    };

    void find_gates();
    void tile(int64_t first, int64_t count);
    void logits(int64_t first, int64_t count);
    void choose(int64_t r, int64_t g, Candidates& candidates);
    void keep_largest(int64_t k, Candidates& candidates) const;
    void add_pages(int64_t first, int64_t end, int64_t g, LowRank& sums);

    float* logits_of(int64_t r) { return logits_.data() + r * int64_t(rows_.size()); }

    Adapted linear_{};
    Gates gates_{};
    Routed routed_{};
    int64_t most_ = 0;                // choices of a decision
    std::vector<int64_t> slices_;     // the gated projections
    std::vector<const float*> rows_;  // their gates, the last one repeated up to a multiple of four
    std::vector<float> logits_;       // [R][rows_]
    std::vector<Choice> choices_;     // [R][slices_][most_], columns ascending
    std::vector<int32_t> counts_;     // [R][slices_]
    std::vector<int32_t> starts_;     // [C + 1], of each column's rows in a chain
    std::vector<int32_t> chain_rows_;
    std::vector<float> chain_weights_;
};

void Router::decide(const Adapted& linear, const Gates& gates, const Routed& routed) {
    linear_ = linear;
    gates_ = gates;
    routed_ = routed;
    find_gates();
    most_ = std::min(routed.max_k, routed.num_columns);
    const size_t decisions = routed.num_rows * slices_.size();
    logits_.resize(std::max(logits_.size(), routed.num_rows * rows_.size()));
    choices_.resize(std::max(choices_.size(), decisions * most_));
    counts_.resize(std::max(counts_.size(), decisions));
    parallel_for((routed.num_rows + ROW_TILE - 1) / ROW_TILE, [&](int64_t i) {
        tile(i * ROW_TILE, std::min(ROW_TILE, routed.num_rows - i * ROW_TILE));
    });
}

void Router::find_gates() {
    slices_.clear();
    rows_.clear();
    for (int64_t s = 0; s < linear_.num_slices; ++s) {
        if (gates_.gated >> s & 1) {
            slices_.push_back(s);
            for (int64_t c = 0; c < routed_.num_columns; ++c) {
                rows_.push_back(gates_.weight + (s * routed_.num_columns + c) * linear_.num_inputs);
            }
        }
    }
    while (rows_.size() % 4) {
        rows_.push_back(rows_.back());
    }
}

void Router::tile(int64_t first, int64_t count) {
    static thread_local Candidates candidates;
    logits(first, count);
    for (int64_t r = first; r < first + count; ++r) {
        for (int64_t g = 0; g < int64_t(slices_.size()); ++g) {
            choose(r, g, candidates);
        }
    }
}

void Router::logits(int64_t first, int64_t count) {
    in_tiles<DOT_TILE>(count, [&](int64_t i, auto tile) {
        constexpr int TILE = decltype(tile)::value;
        const float* x[TILE];
        for (int t = 0; t < TILE; ++t) {
            x[t] = linear_.x + routed_.rows[first + i + t] * linear_.stride_x;
        }
        for (size_t gate = 0; gate < rows_.size(); gate += 4) {
            float* out[TILE];
            for (int t = 0; t < TILE; ++t) {
                out[t] = logits_of(first + i + t) + gate;
            }
            dot4<TILE>(rows_.data() + gate, x, linear_.num_inputs, out);
        }
    });
}

// Row r's choice for the gated projection g.
void Router::choose(int64_t r, int64_t g, Candidates& candidates) {
    const int64_t columns = routed_.num_columns;
    const float* products = logits_of(r) + g * columns;
    const float* bias = gates_.bias + slices_[g] * columns;
    candidates.columns.clear();
    candidates.values.clear();
    for (int64_t c = 0; c < columns; ++c) {
        if (routed_.allowed[r * columns + c]) {
            candidates.columns.push_back(int32_t(c));
            candidates.values.push_back((routed_.absolute[c] ? std::fabs(products[c]) : products[c]) + bias[c]);
        }
    }
    const int64_t count = candidates.columns.size();
    keep_largest(routed_.k[r], candidates);

    const float largest = *std::max_element(candidates.values.begin(), candidates.values.end());
    const float temperature = routed_.temperature[r];
    candidates.shares.resize(count);
    for (float& value : candidates.values) {
        value = (value - largest) / temperature;
    }
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = std::min<int64_t>(LANES, count - i);
        write(&candidates.shares[i], exp(read(&candidates.values[i], some)), some);
    }
    float total = 0, kept = 0, mean = 0;
    for (int64_t i = 0; i < count; ++i) {
        float& share = candidates.shares[i];
        share = candidates.values[i] < SMALLEST ? 0.0f : share;
        total += share;
        mean += share * candidates.values[i];
        kept += candidates.kept[i] ? share : 0.0f;
    }
    const int64_t decision = r * int64_t(slices_.size()) + g;
    Choice* choices = choices_.data() + decision * most_;
    float* tally = routed_.tally + r * (columns + 1);
    int32_t chosen = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (candidates.kept[i]) {
            choices[chosen] = {candidates.columns[i], candidates.shares[i] / kept};
            tally[choices[chosen].column] += choices[chosen].weight;
            ++chosen;
        }
    }
    counts_[decision] = chosen;
    tally[columns] += std::log(total) - mean / total;
}

// Marks the k largest; of equal ones the first.
void Router::keep_largest(int64_t k, Candidates& candidates) const {
    const int64_t count = candidates.values.size();
    candidates.kept.assign(count, k >= count);
    for (int64_t taken = 0; taken < k && k < count; ++taken) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; ++i) {
            if (!candidates.kept[i] && (best < 0 || candidates.values[i] > candidates.values[best])) {
                best = i;
            }
        }
        candidates.kept[best] = 1;
    }
}

void Router::collect(LowRank& sums) {
    for (int64_t first = 0; first < routed_.num_rows; first += CHAIN_ROWS) {
        for (int64_t g = 0; g < int64_t(slices_.size()); ++g) {
            sums.begin_chain(slices_[g]);
            add_pages(first, std::min(first + CHAIN_ROWS, routed_.num_rows), g, sums);
        }
    }
}

// Rows [first, end) sorted by column, for one gated projection; then each column's pages for its rows.
void Router::add_pages(int64_t first, int64_t end, int64_t g, LowRank& sums) {
    const auto each_choice = [&](auto visit) {
        for (int64_t r = first; r < end; ++r) {
            const int64_t decision = r * int64_t(slices_.size()) + g;
            for (int64_t i = 0; i < counts_[decision]; ++i) {
                visit(routed_.rows[r], choices_[decision * most_ + i]);
            }
        }
    };
    starts_.assign(routed_.num_columns + 2, 0);
    each_choice([&](int32_t, const Choice& choice) { ++starts_[choice.column + 2]; });
    for (int64_t c = 0; c < routed_.num_columns; ++c) {
        starts_[c + 2] += starts_[c + 1];
    }
    chain_rows_.resize(starts_.back());
    chain_weights_.resize(starts_.back());
    each_choice([&](int32_t row, const Choice& choice) {  // starts_[c + 1] moves on to column c's end
        const int32_t place = starts_[choice.column + 1]++;
        chain_rows_[place] = row;
        chain_weights_[place] = choice.weight;
    });
    for (int64_t c = 0; c < routed_.num_columns; ++c) {
        const int32_t start = starts_[c], count = starts_[c + 1] - start;
        for (int64_t j = routed_.page_indptr[c]; j < routed_.page_indptr[c + 1]; ++j) {
            sums.add(routed_.pages[j], chain_rows_.data() + start, count, chain_weights_.data() + start, 1);
        }
    }
}

}  // namespace

void route(const Adapted& linear, const Gates& gates, const Routed& routed, LowRank& sums) {
    static thread_local Router router;
    router.decide(linear, gates, routed);
    router.collect(sums);
}

PERSEID_OP void perseid_add_routed(const float* x, int64_t stride_x, int64_t num_inputs, const float* a, const float* b,
                                   const int32_t* live, const int64_t* slice_ends, int64_t num_slices,
                                   const Gates* gates, const Routed* routed, float* out, int64_t stride_out) {
    static thread_local LowRank sums;
    const Adapted linear{x, stride_x, num_inputs, a, b, live, slice_ends, num_slices, out, stride_out};
    sums.begin(linear);
    route(linear, *gates, *routed, sums);
    sums.run();
}

}  // namespace perseid
