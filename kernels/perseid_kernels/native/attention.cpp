// Causal attention over the paged cache (equation in attention.py).
//
// A task is a block of query rows of one sequence and one key/value head. Keys come in tiles at fixed positions; each
// row keeps its own running maximum and sums over them, keys in ascending order, and looks at no key after its own.
// So a row's result is the same in a decode, in any prefill chunk, and beside any neighbours.
#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace perseid {
namespace {

constexpr int64_t TILE = 64;       // keys of a tile, a multiple of LANES
constexpr int64_t QUERY_ROWS = 16;  // query rows of a task

struct Attention {
    const float* q;
    int64_t stride_q;
    const float* k_cache;  // [NB][BS][Hkv][D]
    const float* v_cache;
    const int32_t* query_start;
    const int32_t* context_len;
    const int32_t* block_table;
    int64_t stride_table;
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    float* out;
    int64_t stride_out;

    int64_t group() const { return num_heads / num_kv_heads; }
};

struct Task {
    int64_t sequence, first_row, end_row, kv_head;
};

// One query vector's running softmax: maximum, Σ e^(s − maximum), Σ e^(s − maximum) · v.
struct Running {
    float maximum;
    float total;
    float* sum;  // [D]
};

struct Tile {
    const float* keys[TILE];
    const float* values[TILE];
};

void find_tile(const Attention& a, const Task& task, int64_t first, int64_t count, Tile& tile) {
    const int32_t* table = a.block_table + task.sequence * a.stride_table;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = table[(first + i) / a.block_size] * a.block_size + (first + i) % a.block_size;
        const int64_t at = (slot * a.num_kv_heads + task.kv_head) * a.head_dim;
        tile.keys[i] = a.k_cache + at;
        tile.values[i] = a.v_cache + at;
    }
    for (int64_t i = count; i % LANES != 0; ++i) {  // a dot takes eight keys: repeat one, and leave its lanes out below
        tile.keys[i] = tile.keys[count - 1];
    }
}

// sum = fade · sum + Σ_i p[i] · v_i, four vectors of the head at a time so that the sums stay in registers.
void add_values(const float* p, const Tile& tile, int64_t count, float fade, float* sum, int64_t head_dim) {
    const V factor = set1(fade);
    int64_t d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) {
        V total[4];
        for (int j = 0; j < 4; ++j) {
            total[j] = mul(load(sum + d + j * LANES), factor);
        }
        for (int64_t i = 0; i < count; ++i) {
            const V weight = set1(p[i]);
            for (int j = 0; j < 4; ++j) {
                total[j] = fma(weight, load(tile.values[i] + d + j * LANES), total[j]);
            }
        }
        for (int j = 0; j < 4; ++j) {
            store(sum + d + j * LANES, total[j]);
        }
    }
    for (; d < head_dim; d += LANES) {
        V total = mul(load(sum + d), factor);
        for (int64_t i = 0; i < count; ++i) {
            total = fma(set1(p[i]), load(tile.values[i] + d), total);
        }
        store(sum + d, total);
    }
}

// Takes the tile's first `count` keys into the row's softmax.
void attend_tile(const Attention& a, const float* q, const Tile& tile, int64_t count, Running& row) {
    alignas(32) float p[TILE];
    float maximum = row.maximum;
    for (int64_t i = 0; i < count; i += LANES) {
        store(p + i, mul(dot8(tile.keys + i, q, a.head_dim), set1(a.scale)));
        for (int64_t j = i; j < std::min<int64_t>(i + LANES, count); ++j) {
            maximum = p[j] > maximum ? p[j] : maximum;
        }
    }
    const float fade = lane(exp(set1(row.maximum - maximum)), 0);
    float total = row.total * fade;
    for (int64_t i = 0; i < count; i += LANES) {
        store(p + i, exp(sub(load(p + i), set1(maximum))));
        for (int64_t j = i; j < std::min<int64_t>(i + LANES, count); ++j) {
            total += p[j];
        }
    }
    add_values(p, tile, count, fade, row.sum, a.head_dim);
    row.maximum = maximum;
    row.total = total;
}

void attend(const Attention& a, const Task& task) {
    static thread_local std::vector<float> sums;
    const int64_t rows = task.end_row - task.first_row, group = a.group();
    sums.assign(rows * group * a.head_dim, 0.0f);
    std::vector<Running> running;
    for (int64_t i = 0; i < rows * group; ++i) {
        running.push_back({std::numeric_limits<float>::lowest(), 0.0f, sums.data() + i * a.head_dim});
    }
    const int64_t end_of_sequence = a.query_start[task.sequence + 1];
    const int64_t context = a.context_len[task.sequence];
    const auto keys_of = [&](int64_t row) { return context - (end_of_sequence - 1 - row); };  // position + 1
    for (int64_t first = 0; first < keys_of(task.end_row - 1); first += TILE) {
        Tile tile;
        find_tile(a, task, first, std::min(TILE, context - first), tile);
        for (int64_t t = 0; t < rows; ++t) {
            const int64_t count = std::min(TILE, keys_of(task.first_row + t) - first);
            for (int64_t h = 0; h < group && count > 0; ++h) {
                const float* q = a.q + (task.first_row + t) * a.stride_q + (task.kv_head * group + h) * a.head_dim;
                attend_tile(a, q, tile, count, running[t * group + h]);
            }
        }
    }
    for (int64_t i = 0; i < rows * group; ++i) {
        float* to = a.out + (task.first_row + i / group) * a.stride_out + (task.kv_head * group + i % group) * a.head_dim;
        const V total = set1(running[i].total);
        for (int64_t d = 0; d < a.head_dim; d += LANES) {
            store(to + d, div(load(running[i].sum + d), total));
        }
    }
}

}  // namespace

// head_dim must be a multiple of LANES.
extern "C" __attribute__((visibility("default"))) void perseid_attention(
    const float* q, int64_t stride_q, const float* k_cache, const float* v_cache, const int32_t* query_start,
    const int32_t* context_len, const int32_t* block_table, int64_t stride_table, int64_t num_sequences,
    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size, float scale, float* out,
    int64_t stride_out) {
    const Attention a{q,         stride_q,     k_cache,  v_cache,    query_start, context_len, block_table, stride_table,
                      num_heads, num_kv_heads, head_dim, block_size, scale,       out,         stride_out};
    std::vector<Task> tasks;
    for (int64_t s = 0; s < num_sequences; ++s) {
        for (int64_t row = query_start[s]; row < query_start[s + 1]; row += QUERY_ROWS) {
            const int64_t end = std::min<int64_t>(row + QUERY_ROWS, query_start[s + 1]);
            for (int64_t head = 0; head < num_kv_heads; ++head) {
                tasks.push_back({s, row, end, head});
            }
        }
    }
    parallel_for(tasks.size(), [&](int64_t i) { attend(a, tasks[i]); });
}

}  // namespace perseid
