// Causal attention over the paged cache (equation in attention.py).
//
// A task is a block of query rows of one sequence and one key/value head. Keys come in tiles at fixed positions; each
// query keeps its own running maximum and sums over them, in an order that the positions alone decide, and takes no key
// after its own. So a row's result is the same in a decode, in any prefill chunk, and beside any neighbours.
//
// A row of a tree takes the prefix and then its ancestors, in the tiles of a sequence that had them as its last tokens:
// its result is that of a decode after them. Tiles within the prefix are the same for all rows of the tree and shared.
#include <algorithm>
#include <bitset>
#include <limits>
#include <vector>

#include "ops.h"
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
    const uint64_t* ancestors;  // or null: no sequence is a tree
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    float scale;
    float* out;
    int64_t stride_out;

    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t num_rows(int64_t sequence) const { return query_start[sequence + 1] - query_start[sequence]; }
    bool is_tree(int64_t sequence) const { return ancestors && ancestors[query_start[sequence]] != 0; }
};

int64_t count_bits(uint64_t bits) { return int64_t(std::bitset<64>(bits).count()); }

struct Task {
    int64_t sequence, first_row, end_row, kv_head;
};

// One query's running softmax: maximum, Σ e^(s − maximum), Σ e^(s − maximum) · v.
struct Query {
    const float* q;
    int64_t num_keys;  // its own position + 1
    float maximum;
    V total;     // lane i sums the keys at positions ≡ i mod LANES
    float* sum;  // [D]
    float* p;    // [TILE], the tile's e^(s − maximum)
    float fade;  // what the sums before the tile are multiplied with

    int64_t keys_from(int64_t first) const { return std::min(TILE, num_keys - first); }
};

struct Tile {
    const float* keys[TILE];
    const float* values[TILE];
};

// Keys `i` to `end` of a tile: those that the cache holds from place `first` of the sequence on.
void find_keys(const Attention& a, const Task& task, int64_t first, int64_t i, int64_t end, Tile& tile) {
    const int32_t* block = a.block_table + task.sequence * a.stride_table + first / a.block_size;
    const int64_t stride = a.num_kv_heads * a.head_dim;
    for (int64_t within = first % a.block_size; i < end; within = 0, ++block) {
        int64_t at = ((*block * a.block_size + within) * a.num_kv_heads + task.kv_head) * a.head_dim;
        for (const int64_t stop = std::min(end, i + a.block_size - within); i < stop; ++i, at += stride) {
            tile.keys[i] = a.k_cache + at;
            tile.values[i] = a.v_cache + at;
        }
    }
}

// Dots come in LANES: repeats a key, whose lanes are left out below.
void fill_lanes(int64_t count, Tile& tile) {
    for (int64_t i = count; i % LANES != 0; ++i) {
        tile.keys[i] = tile.keys[count - 1];
    }
}

// The softmax of the tile's first `count` keys.
void score(const Attention& a, const Tile& tile, int64_t count, Query& query) {
    const V least = set1(std::numeric_limits<float>::lowest());
    V most = set1(query.maximum);
    for (int64_t i = 0; i < count; i += LANES) {
        const V scores = mul(dot_lanes(tile.keys + i, query.q, a.head_dim), set1(a.scale));
        const V seen = first_lanes(scores, int(std::min<int64_t>(LANES, count - i)), least);
        store(query.p + i, seen);
        most = max(seen, most);
    }
    const float maximum = largest(most);
    query.fade = lane(exp(set1(query.maximum - maximum)), 0);
    query.total = mul(query.total, set1(query.fade));
    for (int64_t i = 0; i < count; i += LANES) {
        const V p = exp(sub(load(query.p + i), set1(maximum)));
        const V seen = first_lanes(p, int(std::min<int64_t>(LANES, count - i)), zero());
        store(query.p + i, seen);
        query.total = add(query.total, seen);
    }
    query.maximum = maximum;
}

// sum = fade · sum + Σ_i p[i] · v_i over keys [first, count) of QUERIES queries, for `width` columns of the head from d
// on: VECTORS whole vectors, or less than one.
template <int QUERIES, int VECTORS>
void add_columns(const Tile& tile, int64_t first, int64_t count, Query* queries, int64_t d, int64_t width) {
    V total[QUERIES][VECTORS];
    for (int n = 0; n < QUERIES; ++n) {
        for (int j = 0; j < VECTORS; ++j) {
            const V sum = read(queries[n].sum + d + j * LANES, width);
            total[n][j] = first == 0 ? mul(sum, set1(queries[n].fade)) : sum;
        }
    }
    for (int64_t i = first; i < count; ++i) {
        V value[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            value[j] = read(tile.values[i] + d + j * LANES, width);
        }
        for (int n = 0; n < QUERIES; ++n) {
            for (int j = 0; j < VECTORS; ++j) {
                total[n][j] = fma(set1(queries[n].p[i]), value[j], total[n][j]);
            }
        }
    }
    for (int n = 0; n < QUERIES; ++n) {
        for (int j = 0; j < VECTORS; ++j) {
            write(queries[n].sum + d + j * LANES, total[n][j], width);
        }
    }
}

// Four vectors of the head at a time, so that the sums stay in registers.
template <int QUERIES>
void add_values(const Tile& tile, int64_t first, int64_t count, Query* queries, int64_t head_dim) {
    int64_t d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) {
        add_columns<QUERIES, 4>(tile, first, count, queries, d, LANES);
    }
    for (; d < head_dim; d += LANES) {
        add_columns<QUERIES, 1>(tile, first, count, queries, d, std::min<int64_t>(LANES, head_dim - d));
    }
}

// Two queries share the loads of the values; the second sees as many keys, or one more.
void attend_tile(const Attention& a, const Tile& tile, int64_t first, Query* queries, int64_t num_queries) {
    int64_t i = 0;
    for (; i < num_queries && queries[i].num_keys <= first; ++i) {  // these see none of the tile
    }
    for (int64_t n = i; n < num_queries; ++n) {
        score(a, tile, queries[n].keys_from(first), queries[n]);
    }
    for (; i + 2 <= num_queries; i += 2) {
        const int64_t count = queries[i].keys_from(first);
        add_values<2>(tile, 0, count, &queries[i], a.head_dim);
        if (const int64_t more = queries[i + 1].keys_from(first); more > count) {
            add_values<1>(tile, count, more, &queries[i + 1], a.head_dim);
        }
    }
    if (i < num_queries) {
        add_values<1>(tile, 0, queries[i].keys_from(first), &queries[i], a.head_dim);
    }
}

// Keys [first, end) in tiles, for queries that take the same ones as far as they see.
void attend_together(const Attention& a, const Task& task, int64_t end, std::vector<Query>& queries) {
    for (int64_t first = 0; first < end; first += TILE) {
        Tile tile;
        const int64_t count = std::min(TILE, end - first);
        find_keys(a, task, first, 0, count, tile);
        fill_lanes(count, tile);
        attend_tile(a, tile, first, queries.data(), int64_t(queries.size()));
    }
}

// What is left of one tree row's keys after whole tiles of the prefix: its rest, then the row's ancestors.
void attend_branch(const Attention& a, const Task& task, int64_t prefix, uint64_t ancestors, Query* queries) {
    int64_t at = prefix;  // where the cache holds the ancestor that bit 0 stands for
    for (int64_t first = prefix / TILE * TILE; first < queries[0].num_keys; first += TILE) {
        Tile tile;
        const int64_t count = queries[0].keys_from(first);
        int64_t i = std::clamp<int64_t>(prefix - first, 0, count);
        find_keys(a, task, first, 0, i, tile);
        for (; i < count; ++at, ancestors >>= 1) {
            if (ancestors & 1) {
                find_keys(a, task, at, i, i + 1, tile);
                ++i;
            }
        }
        fill_lanes(count, tile);
        attend_tile(a, tile, first, queries, a.group());
    }
}

void attend(const Attention& a, const Task& task) {
    static thread_local std::vector<float> scratch;
    static thread_local std::vector<Query> queries;
    const int64_t rows = task.end_row - task.first_row, group = a.group();
    scratch.assign(rows * group * (a.head_dim + TILE), 0.0f);
    queries.clear();
    const int64_t prefix = a.context_len[task.sequence] - a.num_rows(task.sequence);
    const bool is_tree = a.is_tree(task.sequence);
    for (int64_t i = 0; i < rows * group; ++i) {
        const int64_t row = task.first_row + i / group;
        const int64_t new_keys = is_tree ? count_bits(a.ancestors[row]) : row - a.query_start[task.sequence] + 1;
        const float* q = a.q + row * a.stride_q + (task.kv_head * group + i % group) * a.head_dim;
        float* sum = scratch.data() + i * (a.head_dim + TILE);
        queries.push_back({q, prefix + new_keys, std::numeric_limits<float>::lowest(), zero(), sum, sum + a.head_dim,
                           0.0f});
    }
    attend_together(a, task, is_tree ? prefix / TILE * TILE : queries.back().num_keys, queries);
    for (int64_t i = 0; is_tree && i < rows; ++i) {
        attend_branch(a, task, prefix, a.ancestors[task.first_row + i], &queries[i * group]);
    }
    for (int64_t i = 0; i < rows * group; ++i) {
        float* to = a.out + (task.first_row + i / group) * a.stride_out + (task.kv_head * group + i % group) * a.head_dim;
        const V total = set1(sum(queries[i].total));
        for (int64_t d = 0; d < a.head_dim; d += LANES) {
            const int64_t width = std::min<int64_t>(LANES, a.head_dim - d);
            write(to + d, div(read(queries[i].sum + d, width), total), width);
        }
    }
}

}  // namespace

PERSEID_OP void perseid_attention(
    const float* q, int64_t stride_q, const float* k_cache, const float* v_cache, const int32_t* query_start,
    const int32_t* context_len, const int32_t* block_table, int64_t stride_table, int64_t num_sequences,
    const uint64_t* ancestors, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
    float scale, float* out, int64_t stride_out) {
    const Attention a{q,         stride_q,     k_cache,  v_cache,    query_start, context_len, block_table, stride_table,
                      ancestors, num_heads, num_kv_heads, head_dim, block_size, scale, out, stride_out};
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
