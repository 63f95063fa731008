#include "thread_pool.h"

#include <emmintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "topology.h"

#ifdef HYBRID_ATOMICS  // a test's header whose Atomic pauses around every access, to meet rare interleavings
#include HYBRID_ATOMICS
#else
namespace hybrid {
template <class T>
using Atomic = std::atomic<T>;
}
#endif

namespace hybrid {
namespace {

using Word = Atomic<uint32_t>;

void futex_wait(Word& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(Word& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

constexpr auto kSpin = std::chrono::microseconds(50);

// True as soon as done() holds, false if it does not within kSpin.
template <class Done>
bool spin_until(bool spin, Done done) {
  if (done()) return true;
  if (!spin) return false;
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

// The pool whose unit this thread is working on.
thread_local const void* t_running_pool = nullptr;

// Counts forks: the threads of a pool do not exist in a child process.
std::atomic<uint64_t> g_forks{0};

uint64_t count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return g_forks.load(std::memory_order_relaxed);
}

void check_cpus(int num_threads, const std::vector<int>& cpus) {
  constexpr int kMostThreads = 1024;
  if (num_threads < 1 || num_threads > kMostThreads) {
    throw std::invalid_argument("ThreadPool: num_threads must be between 1 and " + std::to_string(kMostThreads) +
                                ", found " + std::to_string(num_threads));
  }
  if (cpus.empty()) return;
  if (cpus.size() != static_cast<size_t>(num_threads)) {
    throw std::invalid_argument("ThreadPool: `cpus` must be empty or name one CPU for each thread: expected " +
                                std::to_string(num_threads) + ", found " + std::to_string(cpus.size()));
  }
  const std::vector<int> allowed = allowed_cpus();
  for (const int cpu : cpus) {
    if (!contains(allowed, cpu)) {
      throw std::invalid_argument("ThreadPool: CPU " + std::to_string(cpu) +
                                  " is not one this process may run on (see sched_getaffinity)");
    }
  }
}

}  // namespace

// One job runs at a time. The caller publishes it by setting `open`; a worker joins by counting
// itself into `active` and then looking at `open`, the caller ends the job by clearing `open` and then waiting
// for `active` to be 0. Both pairs are sequentially consistent, so either the worker sees the job
// closed and leaves, or the caller sees the worker and waits: the job's fields never change under a
// worker, and a worker that slept through a job is not waited for.
struct ThreadPool::State {
  std::vector<std::thread> workers;
  std::mutex one_caller;
  uint64_t forks = count_forks();
  bool spin = true;

  // The job; written while !open and active == 0.
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int64_t num_units = 0;

  alignas(64) Atomic<int64_t> next_unit{0};
  alignas(64) Word epoch{0};  // counts jobs; idle workers wait for it to change
  Atomic<uint32_t> sleepers{0};
  Atomic<bool> stop{false};
  alignas(64) Word active{0};
  Atomic<bool> open{false};
  Atomic<bool> caller_sleeps{false};

  std::mutex failure_lock;
  std::exception_ptr failure;

  void work(int worker) noexcept {
    t_running_pool = this;
    for (;;) {
      const int64_t unit = next_unit.fetch_add(1, std::memory_order_relaxed);
      if (unit >= num_units) break;
      try {
        fn(context, unit, worker);
      } catch (...) {
        next_unit.store(num_units, std::memory_order_relaxed);
        const std::lock_guard<std::mutex> lock(failure_lock);
        if (!failure) failure = std::current_exception();
      }
    }
    t_running_pool = nullptr;
  }

  void leave() {
    if (active.fetch_sub(1) == 1 && caller_sleeps.load()) futex_wake_all(active);
  }

  void worker_loop(int worker) {
    uint32_t seen = 0;
    for (;;) {
      wait_for_job(seen);
      // `seen` before `stop`: the other way round, the epoch that tells of the stop could be taken for the
      // job's, and the worker would wait for one more for ever.
      seen = epoch.load();
      if (stop.load()) return;
      active.fetch_add(1);
      if (open.load()) work(worker);
      leave();
    }
  }

  void wait_for_job(uint32_t seen) {
    if (spin_until(spin, [&] { return epoch.load(std::memory_order_relaxed) != seen; })) return;
    sleepers.fetch_add(1);
    while (epoch.load() == seen) futex_wait(epoch, seen);
    sleepers.fetch_sub(1);
  }

  void announce() {
    epoch.fetch_add(1);
    if (sleepers.load() != 0) futex_wake_all(epoch);
  }

  void wait_for_workers() {
    if (spin_until(spin, [&] { return active.load() == 0; })) return;
    caller_sleeps.store(true);
    for (uint32_t n = active.load(); n != 0; n = active.load()) futex_wait(active, n);
    caller_sleeps.store(false);
  }
};

ThreadPool::ThreadPool(int num_threads, const std::vector<int>& cpus) {
  check_cpus(num_threads, cpus);
  state_ = std::make_unique<State>();
  State* state = state_.get();
  // Spinning where threads share a CPU would take it from whom they wait for.
  state->spin = static_cast<size_t>(num_threads) <= allowed_cpus().size();
  // Signals are the host program's business, not the workers'.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 1; i < num_threads; ++i) {
      const int cpu = cpus.empty() ? -1 : cpus[static_cast<size_t>(i)];
      state->workers.emplace_back([state, i] {
        pthread_setname_np(pthread_self(), ("hybrid-cpu-" + std::to_string(i)).substr(0, 15).c_str());
        state->worker_loop(i);
      });
      if (cpu >= 0 && !pin_thread(state->workers.back().native_handle(), cpu)) {
        throw std::runtime_error("ThreadPool: the system refuses to bind a thread to CPU " + std::to_string(cpu));
      }
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  State& s = *state_;
  if (s.forks != count_forks()) {
    for (std::thread& worker : s.workers) worker.detach();
    return;
  }
  s.stop.store(true);
  s.announce();
  for (std::thread& worker : s.workers) worker.join();
}

int ThreadPool::num_threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::run(int64_t num_units, void (*fn)(void*, int64_t, int), void* context) {
  State& s = *state_;
  if (s.forks != count_forks()) {
    throw std::runtime_error(
        "ThreadPool: this process was forked after the pool was made, and threads do not survive a fork; "
        "make a new pool in the child, or start it with the multiprocessing method \"spawn\"");
  }
  if (t_running_pool != nullptr) throw std::logic_error("ThreadPool: run() was called from inside a unit of work");
  if (num_units <= 0) return;
  const std::lock_guard<std::mutex> lock(s.one_caller);
  s.fn = fn;
  s.context = context;
  s.num_units = num_units;
  s.next_unit.store(0, std::memory_order_relaxed);
  if (num_units > 1 && !s.workers.empty()) {
    s.open.store(true);
    s.announce();
    s.work(0);
    s.open.store(false);
    s.wait_for_workers();
  } else {
    s.work(0);
  }
  if (s.failure) {
    std::exception_ptr failure;
    std::swap(failure, s.failure);
    std::rethrow_exception(failure);
  }
}

}  // namespace hybrid
