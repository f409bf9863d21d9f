// Asking Medusa heads in one call (equation in the package's draft_heads.py): the products are the library's own, and
// what lies between them looks at one row of one head at a time. Whatever else is asked changes no row's numbers.
#include "draft_heads.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "low_rank.h"
#include "ops.h"
#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t LOGIT_ROWS = 64;  // heads × rows whose logits are held at a time: they stay in the second cache
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Activations, kept from call to call. They grow to the largest question's size.
struct Buffers {
    std::vector<float> x, blocks, logits;
    LowRank sums;
};

float* room(std::vector<float>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) {
        buffer.resize(size);
    }
    return buffer.data();
}

// out = x + SiLU(block + bias)
void residual_row(const float* x, const float* block, const float* bias, int64_t width, float* out) {
    for_vectors(width, [&](int64_t n, int64_t count) {
        V value = read(block + n, count);
        if (bias) {
            value = add(value, read(bias + n, count));
        }
        const V silu = div(value, add(set1(1.0f), exp(sub(zero(), value))));
        write(out + n, add(read(x + n, count), silu), count);
    });
}

// The K largest of a row so far, in order; of equal ones the first. NaN counts as the least.
class Largest {
  public:
    Largest(int64_t count, float* values, int64_t* places) : count_(count), values_(values), places_(places) {}

    void scan(const float* row, int64_t width) {
        for (int64_t n = 0; n < count_; ++n) {
            insert(n, n, std::isnan(row[n]) ? NEVER : row[n]);
        }
        int64_t n = count_;
        for (; n + LANES <= width; n += LANES) {
            if (greater_lanes(load(row + n), set1(values_[count_ - 1]))) {
                offer(row, n, n + LANES);
            }
        }
        offer(row, n, width);
    }

  private:
    void offer(const float* row, int64_t n, int64_t end) {
        for (; n < end; ++n) {
            if (row[n] > values_[count_ - 1]) {
                insert(count_ - 1, n, row[n]);
            }
        }
    }

    // Into its place among the first `held`, of which the others move on.
    void insert(int64_t held, int64_t place, float value) {
        int64_t rank = held;
        for (; rank > 0 && values_[rank - 1] < value; --rank) {
            values_[rank] = values_[rank - 1];
            places_[rank] = places_[rank - 1];
        }
        values_[rank] = value;
        places_[rank] = place;
    }

    const int64_t count_;
    float* values_;
    int64_t* places_;
};

// Σ e^(row − most). NaN where the row has one, and where it has +∞.
float sum_of_shares(const float* row, int64_t width, float most) {
    V total = zero();
    for_vectors(width, [&](int64_t n, int64_t count) {
        const V shares = exp(sub(read(row + n, count), set1(most)));
        total = add(total, first_lanes(shares, int(count), zero()));
    });
    return sum(total);
}

class Question {
  public:
    Question(const DraftHeads& heads, const DraftRows& rows, Buffers& buffers)
        : h_(heads), r_(rows), buffers_(buffers), width_(heads.num_heads * heads.hidden_size) {
        x_ = room(buffers.x, rows.num_rows * width_);
        blocks_ = room(buffers.blocks, rows.num_rows * width_);
    }

    void run() {
        first_layer();
        for (int64_t layer = 0; layer + 1 < h_.num_layers; ++layer) {
            further_layer(h_.further + layer * h_.num_heads);
        }
        const int64_t at_once = std::max<int64_t>(1, LOGIT_ROWS / h_.num_heads);
        for (int64_t first = 0; first < r_.num_rows; first += at_once) {
            choose(first, std::min(at_once, r_.num_rows - first));
        }
    }

  private:
    void first_layer() {
        const int64_t size = h_.hidden_size;
        perseid_matmul(h_.first.weight, r_.hidden, r_.num_rows, size, blocks_, width_);
        if (r_.segments.count > 0) {
            buffers_.sums.begin(
                {r_.hidden, size, size, r_.a, r_.b, r_.live, r_.slice_ends, r_.num_slices, blocks_, width_});
            add_segments(r_.segments, h_.num_heads, buffers_.sums);  // no more slices than there are heads
            buffers_.sums.run();
        }
        for_row_heads([&](int64_t row, int64_t head) {
            const float* bias = h_.first.bias ? h_.first.bias + head * size : nullptr;
            const int64_t at = row * width_ + head * size;
            residual_row(r_.hidden + row * size, blocks_ + at, bias, size, x_ + at);
        });
    }

    void further_layer(const DraftBlock* of_heads) {
        const int64_t size = h_.hidden_size;
        for (int64_t head = 0; head < h_.num_heads; ++head) {
            perseid_matmul(of_heads[head].weight, x_ + head * size, r_.num_rows, width_, blocks_ + head * size, width_);
        }
        for_row_heads([&](int64_t row, int64_t head) {
            const int64_t at = row * width_ + head * size;
            residual_row(x_ + at, blocks_ + at, of_heads[head].bias, size, x_ + at);
        });
    }

    // Logits and candidates of some rows.
    void choose(int64_t first, int64_t count) {
        const int64_t size = h_.hidden_size, heads = h_.num_heads, vocab = h_.vocab_size, k = h_.num_candidates;
        float* logits = room(buffers_.logits, count * heads * vocab);
        const float* x = x_ + first * width_;
        if (h_.num_lm_heads == 1) {
            perseid_matmul(h_.lm_heads[0], x, count * heads, size, logits, vocab);
        } else {
            for (int64_t head = 0; head < heads; ++head) {
                perseid_matmul(h_.lm_heads[head], x + head * size, count, width_, logits + head * vocab, heads * vocab);
            }
        }
        for_rows(count * heads, vocab, [&](int64_t i) {
            const int64_t to = (first * heads + i) * k;
            choose_row(logits + i * vocab, r_.probabilities + to, r_.token_ids + to);
        });
    }

    void choose_row(const float* logits, float* probabilities, int64_t* token_ids) const {
        Largest(h_.num_candidates, probabilities, token_ids).scan(logits, h_.vocab_size);
        const float most = probabilities[0], total = sum_of_shares(logits, h_.vocab_size, most);
        for (int64_t rank = 0; rank < h_.num_candidates; ++rank) {
            const float share = std::exp(probabilities[rank] - most) / total;
            probabilities[rank] = std::isfinite(share) ? share : 0.0f;
            if (h_.vocabulary) {
                token_ids[rank] = h_.vocabulary[token_ids[rank]];
            }
        }
    }

    template <class F>
    void for_row_heads(F f) const {
        for_rows(r_.num_rows * h_.num_heads, h_.hidden_size, [&](int64_t i) { f(i / h_.num_heads, i % h_.num_heads); });
    }

    const DraftHeads& h_;
    const DraftRows& r_;
    Buffers& buffers_;
    const int64_t width_;  // of all heads' hidden states, side by side
    float *x_, *blocks_;
};

}  // namespace

PERSEID_OP void perseid_draft(const DraftHeads* heads, const DraftRows* rows) {
    static thread_local Buffers buffers;
    Question(*heads, *rows, buffers).run();
}

}  // namespace perseid
