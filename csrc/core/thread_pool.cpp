#include "core/thread_pool.h"

#include <chrono>
#include <stdexcept>

#ifdef __linux__
#include <sched.h>
#endif

#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace lowbit {

namespace {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Between two tokens a worker spins, as waking it costs as much as a layer; after that it sleeps, so that an idle
// program takes no processor from others. At a barrier it yields after a while: its partner may not be running.
constexpr auto kSpin = std::chrono::microseconds(300);
constexpr int kSpinsBeforeYield = 2000;

// Puts the calling thread on the `index`-th of the processors that it may use, and lets it go where it likes from there. A
// new thread begins on the processor of the one that made it, and as both spin, the system may leave them there for a tenth
// of a second.
void move_to_processor(int index) {
#ifdef __linux__
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all) != 0) return;
    const int count = CPU_COUNT(&all), mine = sched_getcpu();
    if (count < 2 || mine < 0) return;
    int place = 0;  // of the maker's processor among them
    for (int cpu = 0; cpu < mine; ++cpu) place += CPU_ISSET(cpu, &all) ? 1 : 0;
    int left = (place + index) % count;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &all) || left-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (sched_setaffinity(0, sizeof one, &one) == 0) sched_setaffinity(0, sizeof all, &all);
        return;
    }
#else
    static_cast<void>(index);
#endif
}

std::int64_t this_process() {
#ifdef _WIN32
    return 1;  // does not fork
#else
    return getpid();
#endif
}

template <class Done>
void spin_until(const Done& done) {
    for (int i = 0; !done(); ++i) {
        if (i < kSpinsBeforeYield) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace

ThreadPool::ThreadPool(int threads) : ThreadPool(threads, OpenMp{}) { start(); }

ThreadPool::ThreadPool(int threads, const OpenMp& borrowed)
    : threads_(threads < 1 ? 1 : threads), borrowed_(borrowed), crew_(std::make_unique<Threads>()), process_(this_process()) {}

ThreadPool::~ThreadPool() {
    if (process_.load() != this_process()) {
        static_cast<void>(crew_.release());
    } else {
        stop();
    }
}

void ThreadPool::start() {
    try {
        for (int i = 1; i < threads_; ++i) crew_->workers.emplace_back([this, i] { work(i); });
    } catch (...) {
        stop();
        throw std::runtime_error("the system does not give so many threads; ask for fewer");
    }
}

void ThreadPool::stop() {
    if (crew_->workers.empty()) return;
    {
        std::lock_guard lock(crew_->sleeping);
        stop_ = true;
        generation_.fetch_add(1);
    }
    crew_->wake.notify_all();
    for (auto& worker : crew_->workers) worker.join();
    crew_->workers.clear();
    stop_ = false;
    generation_.store(0);
}

void ThreadPool::renew_after_fork() {
    const std::int64_t now = this_process();
    std::int64_t before = process_.load(std::memory_order_acquire);
    if (before == now) return;
    // One of the child's threads makes the new ones, which -now says, others wait for it. The negative number of another
    // process is that of a parent whose thread was at this when it forked.
    if (before == -now || !process_.compare_exchange_strong(before, -now)) {
        spin_until([&] { return process_.load(std::memory_order_acquire) != -now; });
        return renew_after_fork();
    }
    static_cast<void>(crew_.release());
    crew_ = std::make_unique<Threads>();
    generation_.store(0);
    asleep_.store(0);
    running_.store(0);
    try {
        if (borrowed_.parallel == nullptr) start();
    } catch (...) {
        process_.store(before);
        throw;
    }
    process_.store(now, std::memory_order_release);
}

void ThreadPool::reset_counters() {
    for (auto& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
}

void ThreadPool::run_erased(Function function, const void* job) {
    renew_after_fork();
    std::lock_guard one(crew_->callers);
    cancelled_.store(false, std::memory_order_relaxed);
    Worker self(*this, 0, threads_);
    if (threads_ == 1) {
        function(job, self);
        return;
    }
    function_ = function;
    job_ = job;
    reset_counters();
    arrived_.store(0, std::memory_order_relaxed);
    sense_.store(false, std::memory_order_relaxed);
    if (borrowed_.parallel != nullptr) return run_borrowed();
    running_.store(threads_ - 1, std::memory_order_relaxed);
    generation_.fetch_add(1);  // sequentially consistent, as is asleep_: one of the two sides sees the other
    if (asleep_.load() > 0) {
        std::lock_guard lock(crew_->sleeping);
        crew_->wake.notify_all();
    }
    function(job, self);
    spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
}

// There may be fewer threads than asked for, as inside a parallel loop of the caller.
void ThreadPool::run_borrowed() {
    borrowed_.parallel(
        [](void* p) {
            ThreadPool& pool = *static_cast<ThreadPool*>(p);
            Worker self(pool, pool.borrowed_.index(), pool.borrowed_.count());
            pool.function_(pool.job_, self);
        },
        this, static_cast<unsigned>(threads_), 0);
}

void ThreadPool::work(int index) {
    move_to_processor(index);
    std::uint64_t seen = 0;
    for (;;) {
        const auto start = std::chrono::steady_clock::now();
        while (generation_.load(std::memory_order_acquire) == seen) {
            pause();
            if (std::chrono::steady_clock::now() - start < kSpin) continue;
            std::unique_lock lock(crew_->sleeping);
            asleep_.fetch_add(1);
            crew_->wake.wait(lock, [&] { return generation_.load() != seen; });
            asleep_.fetch_sub(1);
        }
        seen = generation_.load(std::memory_order_acquire);
        if (stop_) return;
        Worker self(*this, index, threads_);
        function_(job_, self);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

void Worker::barrier() {
    if (count_ == 1) return;
    sense_ = !sense_;
    if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        pool_.arrived_.store(0, std::memory_order_relaxed);
        pool_.reset_counters();  // everyone has left the loops that used them
        pool_.sense_.store(sense_, std::memory_order_release);
    } else {
        spin_until([this] { return pool_.sense_.load(std::memory_order_acquire) == sense_; });
    }
}

}  // namespace lowbit
