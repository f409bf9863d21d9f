// Workers spin for a moment between loops, as a forward pass is hundreds of short loops in a row; then they sleep.
#include "threads.h"

#include <algorithm>
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
constexpr int64_t MOST_TASKS = int64_t(1) << 20;  // of one round
constexpr int MOST_SHARES = 64;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Round, end and next task of a share in one word, so that whoever takes a task knows which round it belongs to.
class Ticket {
  public:
    uint64_t word;  // round: 22 bits, end: 21, task: 21

    static Ticket first(uint64_t round, int64_t task, int64_t end) {
        return {round << 42 | uint64_t(end) << 21 | uint64_t(task)};
    }
    uint64_t round() const { return word >> 42; }
    int64_t end() const { return word >> 21 & MASK; }
    int64_t task() const { return word & MASK; }

  private:
    static constexpr uint64_t MASK = (uint64_t(1) << 21) - 1;
};

// Each thread has a share of neighbouring tasks, as it finds their data where it has just been, and then takes from
// the others' shares. The caller waits for tasks that a worker has taken, never for a worker: one that sleeps, or has no
// core to run on, costs nothing. It comes late, finds no task and waits for the next round.
class Pool {
  public:
    explicit Pool(int num_threads) : num_shares_(std::min(num_threads, MOST_SHARES)) {
        for (int i = 1; i < num_threads; ++i) {
            workers_.emplace_back([this, i] { work(i); });
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
        done_.store(0, std::memory_order_relaxed);
        ++round_;
        for (int64_t i = 0; i < num_shares_; ++i) {
            const Ticket ticket = Ticket::first(round_, count * i / num_shares_, count * (i + 1) / num_shares_);
            shares_[i].next.store(ticket.word, std::memory_order_seq_cst);
        }
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }  // whoever is about to sleep is asleep, or sees the round
            wake_.notify_all();
        }
        take_tasks(0);
        for (int spin = 0; done_.load(std::memory_order_acquire) < count; ++spin) {
            spin < SPINS ? relax() : std::this_thread::yield();
        }
    }

  private:
    struct alignas(64) Share {  // on a cache line of its own
        std::atomic<uint64_t> next{0};  // a Ticket
    };

    // Runs tasks until there are none left: those of the thread's own share, then those of the shares after it.
    void take_tasks(int thread) {
        for (int i = 0; i < num_shares_; ++i) {
            take_share(shares_[(thread + i) % num_shares_].next);
        }
    }

    void take_share(std::atomic<uint64_t>& next) {
        uint64_t word = next.load(std::memory_order_acquire);
        while (Ticket{word}.task() < Ticket{word}.end()) {
            if (next.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) {
                (*task_)(Ticket{word}.task());
                done_.fetch_add(1, std::memory_order_release);
                word = next.load(std::memory_order_acquire);
            }
        }
    }

    bool has_tasks() const {
        for (int i = 0; i < num_shares_; ++i) {
            const Ticket ticket{shares_[i].next.load(std::memory_order_seq_cst)};  // in one order with `sleeping_`
            if (ticket.task() < ticket.end()) {
                return true;
            }
        }
        return false;
    }

    void work(int thread) {
        while (wait_for_tasks()) {
            take_tasks(thread);
        }
    }

    // False when the pool stops.
    bool wait_for_tasks() {
        for (int spin = 0; spin < SPINS; ++spin) {
            if (has_tasks()) {
                return true;
            }
            relax();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return stopping_ || has_tasks(); });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        return !stopping_;
    }

    const int num_shares_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
    uint64_t round_ = 0;
    std::atomic<int> sleeping_{0};
    Share shares_[MOST_SHARES];
    std::atomic<int64_t> done_{0};  // tasks of this round that are finished
    const std::function<void(int64_t)>* task_ = nullptr;
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
    for (int64_t first = 0; first < count; first += MOST_TASKS) {
        const auto shifted = [&](int64_t i) { task(first + i); };
        pool->run(std::min(MOST_TASKS, count - first), shifted);
    }
}

void set_num_threads(int count) {
    std::lock_guard<std::mutex> lock(pool_mutex);
    wanted_threads = count < 1 ? 1 : count;
}

}  // namespace perseid
