// A pool of threads for loops of independent tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace perseid {

// Calls task(0) … task(count − 1), each once, on all threads of the pool; returns when all are done. One caller at a
// time; tasks must not call it. A single task, or a pool of one, runs on the caller alone.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

// The number of threads, the caller's included. Takes effect at the next parallel_for.
void set_num_threads(int count);

constexpr int64_t ROW_TASK_ELEMENTS = 4608;  // fewer are done by the caller: handing over costs more

// Calls row(0) … row(count − 1), for rows of `width` numbers that take little time each.
template <class F>
void for_rows(int64_t count, int64_t width, F row) {
    const int64_t rows = std::max<int64_t>(1, ROW_TASK_ELEMENTS / width);
    parallel_for((count + rows - 1) / rows, [&](int64_t task) {
        for (int64_t t = task * rows; t < std::min(count, (task + 1) * rows); ++t) {
            row(t);
        }
    });
}

}  // namespace perseid
