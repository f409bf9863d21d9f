// Workers spin for a moment between loops, as a forward pass is hundreds of short loops in a row; then they sleep.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace perseid {
namespace {

constexpr int SPINS = 4000;  // tens of microseconds: longer than the Python between two ops of a layer

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

class Pool {
  public:
    explicit Pool(int num_threads) {
        for (int i = 1; i < num_threads; ++i) {
            workers_.emplace_back([this] { work(); });
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) {
            worker.join();
        }
    }

    int num_threads() const { return int(workers_.size()) + 1; }

    void run(int64_t count, const std::function<void(int64_t)>& task) {
        task_ = &task;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(int(workers_.size()), std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);  // a worker about to sleep sees the new round
            round_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_acquire) > 0) {
            wake_.notify_all();
        }
        take_tasks();
        for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; ++spin) {
            spin < SPINS ? relax() : std::this_thread::yield();
        }
    }

  private:
    void take_tasks() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
            (*task_)(i);
        }
    }

    void work() {
        for (uint64_t seen = 0;;) {
            if (!wait_for_round(seen)) {
                return;
            }
            ++seen;
            take_tasks();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    // False when the pool stops.
    bool wait_for_round(uint64_t seen) {
        for (int spin = 0; spin < SPINS; ++spin) {
            if (round_.load(std::memory_order_acquire) != seen) {
                return true;
            }
            relax();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return stopping_ || round_.load(std::memory_order_acquire) != seen; });
        sleeping_.fetch_sub(1);
        return !stopping_;
    }

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
    std::atomic<int> sleeping_{0};
    std::atomic<uint64_t> round_{0};  // loops started; a worker joins each exactly once
    std::atomic<int64_t> next_{0};
    std::atomic<int> busy_{0};
    const std::function<void(int64_t)>* task_ = nullptr;
    int64_t count_ = 0;
};

int wanted_threads = 1;
std::mutex pool_mutex;  // one loop at a time
std::unique_ptr<Pool> pool;

}  // namespace

void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (count <= 1 || wanted_threads == 1) {
        for (int64_t i = 0; i < count; ++i) {
            task(i);
        }
        return;
    }
    if (!pool || pool->num_threads() != wanted_threads) {
        pool = std::make_unique<Pool>(wanted_threads);
    }
    pool->run(count, task);
}

void set_num_threads(int count) {
    std::lock_guard<std::mutex> lock(pool_mutex);
    wanted_threads = count < 1 ? 1 : count;
}

}  // namespace perseid
