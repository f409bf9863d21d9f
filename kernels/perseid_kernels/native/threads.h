// A pool of threads for loops of independent tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace perseid {

// Calls task(0) … task(count − 1), each once, on all threads of the pool; returns when all are done. One caller at a
// time; tasks must not call it. A single task, or a pool of one, runs on the caller alone.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

// The number of threads, the caller's included. Takes effect at the next parallel_for.
void set_num_threads(int count);

}  // namespace perseid
