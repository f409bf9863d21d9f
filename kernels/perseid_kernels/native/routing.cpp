// Which columns a row uses, by its gates (equation in the package's routing.py). A row's logits are dot products in a
// fixed order, and all that follows reads one row: neighbours do not matter.
//
// One loop over tiles of rows decides; the chosen pages' products are then summed as those of named adapters.
#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops.h"
#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t ROW_TILE = 4;     // rows of a task: a gate is loaded once for all of them
constexpr int64_t CHAIN_ROWS = 64;  // rows of a chain: enough that several share a page of it in the first cache
constexpr float LEAST = -87.0f;     // of what `exp` takes
constexpr float NO_SHARE = 2e-38f;  // e^LEAST, about: what has no more has nothing
constexpr float MOST = std::numeric_limits<float>::max();
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Whatever x and the gates hold, columns are chosen: NaN counts as the least.
float finite(float logit) { return std::isnan(logit) ? -MOST : std::clamp(logit, -MOST, MOST); }

struct Choice {
    int32_t column;
    float weight;
};

// One decision's logits, padded to whole vectors: NEVER where a column may not be chosen. Memory of one thread.
class Decision {
  public:
    void begin(int64_t columns) { logits_.assign((columns + LANES - 1) / LANES * LANES, NEVER); }
    float* logits() { return logits_.data(); }

    // Writes the k largest (of equal ones the first) with softmax(l / T) over them; returns how many.
    int32_t choose(int64_t k, float temperature, Choice* choices);

    // Of softmax(l / T) over all columns, in nats. Call it after `choose`.
    float entropy() const { return std::log(total_) - mean_ / total_; }

  private:
    int32_t take_largest(int64_t k, Choice* choices);
    void find_shares(float temperature);

    std::vector<float> logits_, left_, shares_;
    float largest_ = 0, total_ = 0, mean_ = 0;  // of the logits; of shares; of shares · exponents
};

int32_t Decision::choose(int64_t k, float temperature, Choice* choices) {
    const int32_t count = take_largest(k, choices);
    find_shares(temperature);
    float kept = 0;
    for (int32_t i = 0; i < count; ++i) {
        kept += shares_[choices[i].column];
    }
    for (int32_t i = 0; i < count; ++i) {
        const float share = shares_[choices[i].column];
        choices[i].weight = share > NO_SHARE ? share / kept : 0;
    }
    return count;
}

int32_t Decision::take_largest(int64_t k, Choice* choices) {
    left_ = logits_;
    const int64_t size = left_.size();
    for (int32_t count = 0; count < k; ++count) {
        V most = load(left_.data());
        for (int64_t i = LANES; i < size; i += LANES) {
            most = max(load(&left_[i]), most);
        }
        const float value = largest(most);
        largest_ = count == 0 ? value : largest_;
        uint32_t lanes = 0;
        int64_t first = 0;
        for (; first < size && !lanes; first += LANES) {
            lanes = equal_lanes(load(&left_[first]), set1(value));
        }
        if (value == NEVER) {  // no column is left
            return count;
        }
        const int32_t column = int32_t(first - LANES) + __builtin_ctz(lanes);
        left_[column] = NEVER;
        choices[count].column = column;
    }
    return int32_t(k);
}

// e^((l − largest) / T) of every column.
void Decision::find_shares(float temperature) {
    shares_.resize(logits_.size());
    V total = zero(), mean = zero();
    for (size_t i = 0; i < logits_.size(); i += LANES) {
        const V exponent = max(div(sub(load(&logits_[i]), set1(largest_)), set1(temperature)), set1(LEAST));
        const V share = exp(exponent);
        store(&shares_[i], share);
        total = add(total, share);
        mean = fma(share, exponent, mean);
    }
    total_ = sum(total);
    mean_ = sum(mean);
}

// What the gates of a linear decide for some rows. Kept from linear to linear for its memory.
class Router {
  public:
    void decide(const Adapted& linear, const Gates& gates, const Routed& routed);
    void collect(LowRank& sums);

  private:
    void find_gates();
    void tile(int64_t first, int64_t count);
    void logits(int64_t first, int64_t count);
    void choose(int64_t r, int64_t g);
    void add_pages(int64_t first, int64_t end, int64_t g, LowRank& sums);

    float* logits_of(int64_t r) { return logits_.data() + r * int64_t(rows_.size()); }

    Adapted linear_{};
    Gates gates_{};
    Routed routed_{};
    int64_t most_ = 0;                // choices of a decision
    std::vector<int64_t> slices_;     // the gated projections
    std::vector<const float*> rows_;  // their gates, the last one repeated up to a multiple of four
    std::vector<float> logits_;       // [R][rows_]
    std::vector<Choice> choices_;     // [R][slices_][most_], the largest first
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
    logits(first, count);
    for (int64_t r = first; r < first + count; ++r) {
        for (int64_t g = 0; g < int64_t(slices_.size()); ++g) {
            choose(r, g);
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
void Router::choose(int64_t r, int64_t g) {
    static thread_local Decision decision;
    const int64_t columns = routed_.num_columns, index = r * int64_t(slices_.size()) + g;
    const float* products = logits_of(r) + g * columns;
    const float* bias = gates_.bias + slices_[g] * columns;
    const int32_t* allowed = routed_.allowed + r * columns;
    decision.begin(columns);
    for (int64_t c = 0; c < columns; ++c) {
        const float product = routed_.absolute[c] ? std::fabs(products[c]) : products[c];
        decision.logits()[c] = allowed[c] ? finite(product + bias[c]) : NEVER;
    }
    Choice* choices = choices_.data() + index * most_;
    counts_[index] = decision.choose(std::min<int64_t>(routed_.k[r], most_), routed_.temperature[r], choices);
    float* tally = routed_.tally + r * (columns + 1);
    for (int32_t i = 0; i < counts_[index]; ++i) {
        tally[choices[i].column] += choices[i].weight;
    }
    tally[columns] += decision.entropy();
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
