// Threads that run one function at a time, and meet at barriers inside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lowbit {

class ThreadPool;

// Functions of the OpenMP runtime that another library of this process runs on, looked up by its ABI names:
// GOMP_parallel (libgomp, and libomp and libiomp5 besides their own names), omp_get_num_threads, omp_get_thread_num.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
    int (*count)() = nullptr;
    int (*index)() = nullptr;
};

// What the function of a thread sees while it runs. The thread that called is the first worker.
class Worker {
 public:
    int index() const { return index_; }
    int count() const { return count_; }
    // This thread as if it were the only one, for what it does inside a share.
    Worker alone() const { return Worker(pool_, index_, 1); }

    // Nobody goes on before everyone is here.
    void barrier();

    // Calls body(first, last) on shares of [0, total), `grain` items at a time, taken by whoever is free: cores differ
    // in speed and are shared with others. What an item computes must not depend on who computes it. `counter` is one
    // of kCounters, used by one loop between two barriers.
    template <class Body>
    void share(int counter, std::int64_t total, std::int64_t grain, Body&& body);

    // The same where items lie side by side in memory and are read once: each worker begins with a long run of its own,
    // from own_begin(total) to own_end(total), and only what is left is taken by whoever is free.
    template <class Body>
    void share_in_runs(int counter, std::int64_t total, std::int64_t grain, Body&& body);
    std::int64_t own_begin(std::int64_t total) const { return run_of(total) * index_; }
    std::int64_t own_end(std::int64_t total) const { return run_of(total) * (index_ + 1); }

    // From here on the shares of this run are handed out no more, to anyone: threads pass their barriers and end. What was
    // not computed holds what it held before.
    void cancel();
    bool cancelled() const;

 private:
    friend class ThreadPool;
    std::int64_t run_of(std::int64_t total) const { return total * 3 / 4 / count_; }
    Worker(ThreadPool& pool, int index, int count) : pool_(pool), index_(index), count_(count) {}
    ThreadPool& pool_;
    int index_;
    int count_;
    bool sense_ = false;
};

class ThreadPool {
 public:
    static constexpr int kCounters = 4;

    explicit ThreadPool(int threads);
    // A pool without threads of its own, which borrows those of OpenMP: between two parallel loops of the other library
    // these spin, and two sets of threads would take the processors from each other.
    ThreadPool(int threads, const OpenMp& borrowed);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // Runs job(worker) on every thread, the caller among them, and returns when all are done. One caller at a time;
    // others wait. The job must not throw. In a child of fork(), which has none of its parent's threads, new ones are made.
    template <class Job>
    void run(const Job& job) {
        run_erased([](const void* j, Worker& m) { (*static_cast<const Job*>(j))(m); }, &job);
    }

 private:
    friend class Worker;
    // What cannot be freed in a child of fork(): threads that are not there, and locks that they may hold.
    struct Threads {
        std::vector<std::thread> workers;
        std::mutex callers;
        std::mutex sleeping;
        std::condition_variable wake;
    };

    void start();
    void stop();
    void renew_after_fork();
    using Function = void (*)(const void*, Worker&);

    void run_erased(Function function, const void* job);
    void run_borrowed();
    void work(int index);
    void reset_counters();

    struct alignas(64) Counter {
        std::atomic<std::int64_t> next{0};
    };

    const int threads_;
    const OpenMp borrowed_;
    std::unique_ptr<Threads> crew_;
    std::atomic<std::int64_t> process_;  // whose threads these are; negative while these are made
    Function function_ = nullptr;
    const void* job_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<std::uint64_t> generation_{0};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<bool> sense_{false};
    alignas(64) std::atomic<int> asleep_{0};
    alignas(64) std::atomic<bool> cancelled_{false};
    Counter counters_[kCounters];
};

inline void Worker::cancel() { pool_.cancelled_.store(true, std::memory_order_relaxed); }
inline bool Worker::cancelled() const { return pool_.cancelled_.load(std::memory_order_relaxed); }

template <class Body>
void Worker::share(int counter, std::int64_t total, std::int64_t grain, Body&& body) {
    if (count_ == 1) {
        if (total > 0 && !cancelled()) body(std::int64_t{0}, total);
        return;
    }
    auto& next = pool_.counters_[counter].next;
    for (;;) {
        const std::int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
        if (first >= total || cancelled()) return;
        const std::int64_t last = first + grain < total ? first + grain : total;
        body(first, last);
    }
}

template <class Body>
void Worker::share_in_runs(int counter, std::int64_t total, std::int64_t grain, Body&& body) {
    if (count_ > 1 && own_end(total) > own_begin(total) && !cancelled()) body(own_begin(total), own_end(total));
    const std::int64_t shared = count_ > 1 ? run_of(total) * count_ : 0;
    share(counter, total - shared, grain, [&](std::int64_t begin, std::int64_t end) { body(shared + begin, shared + end); });
}

}  // namespace lowbit
