#include "thread_pool.h"

#include <emmintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
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

void check_groups(int num_threads, const std::vector<int>& groups) {
  if (groups.empty()) return;
  const auto bad = [&](const std::string& problem) {
    throw std::invalid_argument("ThreadPool: `groups` " + problem);
  };
  if (groups.size() != static_cast<size_t>(num_threads)) bad("must be empty or have one entry for each thread");
  if (groups[0] != 0) bad("must begin with 0, the group of the calling thread");
  const int most = *std::max_element(groups.begin(), groups.end());
  if (most >= ThreadPool::kMostGroups) bad("must be below " + std::to_string(ThreadPool::kMostGroups));
  for (int g = 0; g <= most; ++g)
    if (!contains(groups, g)) bad("must be numbered without gaps: no worker is in group " + std::to_string(g));
}

// Keeps the calling thread on some CPUs while a job is divided by nodes: as a worker it belongs to their node.
// It mostly stays there afterwards, so that this costs one look at the current CPU.
class Homecoming {
 public:
  explicit Homecoming(const std::vector<int>& home) {
    if (home.empty() || contains(home, sched_getcpu())) return;
    moved_ = pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0 && pin_thread(pthread_self(), home);
  }
  ~Homecoming() {
    if (moved_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
  }
  Homecoming(const Homecoming&) = delete;
  Homecoming& operator=(const Homecoming&) = delete;

 private:
  bool moved_ = false;
  cpu_set_t before_;
};

// Allowed CPUs of the node that a CPU is on.
std::vector<int> node_cpus(int cpu) {
  for (const Node& node : numa_nodes("", allowed_cpus()))
    if (contains(node.cpus, cpu)) return node.cpus;
  return {};
}

}  // namespace

void UnitRanges::add(int64_t num_units) {
  if (count == kMost) throw std::logic_error("a job is divided into at most " + std::to_string(kMost) + " ranges");
  ends[count] = total() + num_units;
  ++count;
}

int UnitRanges::find(int64_t unit, int64_t& place) const {
  int range = 0;
  while (unit >= ends[range]) ++range;
  place = range == 0 ? unit : unit - ends[range - 1];
  return range;
}

// One job runs at a time. The caller publishes it by setting `open`; a worker joins by counting
// itself into `active` and then looking at `open`, the caller ends the job by clearing `open` and then waiting
// for `active` to be 0. Both pairs are sequentially consistent, so either the worker sees the job
// closed and leaves, or the caller sees the worker and waits: the job's fields never change under a
// worker, and a worker that slept through a job is not waited for.
//
// A job's units are in ranges, each with a counter of its own: one for all, or one for each group. Where they are divided,
// the caller must not end the job before another group has come for its range: it waits until `open_ranges`, which whoever
// finds a range exhausted first brings down by one, is 0.
struct ThreadPool::State {
  struct alignas(64) Range {
    Atomic<int64_t> next{0};
    int64_t end = 0;
    Atomic<bool> exhausted{false};
  };

  std::vector<std::thread> workers;
  std::mutex one_caller;
  uint64_t forks = count_forks();
  bool spin = true;
  std::vector<int> groups;  // of each worker
  int num_groups = 1;
  std::vector<int> home;    // CPUs of group 0's node, where workers are pinned and there are several groups

  // The job; written while !open and active == 0.
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  bool divided = false;
  int num_ranges = 0;

  Range ranges[kMostGroups];
  alignas(64) Word open_ranges{0};
  Atomic<bool> caller_awaits_ranges{false};
  alignas(64) Word epoch{0};  // counts jobs; idle workers wait for it to change
  Atomic<uint32_t> sleepers{0};
  Atomic<bool> stop{false};
  alignas(64) Word active{0};
  Atomic<bool> open{false};
  Atomic<bool> caller_sleeps{false};

  std::mutex failure_lock;
  std::exception_ptr failure;

  void set_ranges(const int64_t* ends, int count) {
    int64_t start = 0;
    uint32_t open_count = 0;
    for (int r = 0; r < count; ++r) {
      ranges[r].next.store(start, std::memory_order_relaxed);
      ranges[r].end = ends[r];
      ranges[r].exhausted.store(ends[r] <= start, std::memory_order_relaxed);
      if (ends[r] > start) ++open_count;
      start = std::max(start, ends[r]);
    }
    num_ranges = count;
    open_ranges.store(open_count);
  }

  void work(int worker) noexcept {
    t_running_pool = this;
    const int own = divided ? groups[static_cast<size_t>(worker)] : 0;
    if (own < num_ranges) work_on(ranges[own], worker);
    for (int r = divided ? num_groups : 1; r < num_ranges; ++r) work_on(ranges[r], worker);
    t_running_pool = nullptr;
  }

  void work_on(Range& range, int worker) noexcept {
    for (;;) {
      const int64_t unit = range.next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= range.end) break;
      try {
        fn(context, unit, worker);
      } catch (...) {
        for (int r = 0; r < num_ranges; ++r) ranges[r].next.store(ranges[r].end, std::memory_order_relaxed);
        const std::lock_guard<std::mutex> lock(failure_lock);
        if (!failure) failure = std::current_exception();
      }
    }
    if (!divided || range.exhausted.exchange(true)) return;
    if (open_ranges.fetch_sub(1) == 1 && caller_awaits_ranges.load()) futex_wake_all(open_ranges);
  }

  void wait_for_ranges() {
    if (spin_until(spin, [&] { return open_ranges.load() == 0; })) return;
    caller_awaits_ranges.store(true);
    for (uint32_t n = open_ranges.load(); n != 0; n = open_ranges.load()) futex_wait(open_ranges, n);
    caller_awaits_ranges.store(false);
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

ThreadPool::ThreadPool(int num_threads, const std::vector<int>& cpus, const std::vector<int>& groups) {
  check_cpus(num_threads, cpus);
  check_groups(num_threads, groups);
  state_ = std::make_unique<State>();
  State* state = state_.get();
  state->groups = groups.empty() ? std::vector<int>(static_cast<size_t>(num_threads), 0) : groups;
  state->num_groups = 1 + *std::max_element(state->groups.begin(), state->groups.end());
  if (state->num_groups > 1 && !cpus.empty()) state->home = node_cpus(cpus[0]);
  // Spinning where threads share a CPU would take it from whom they wait for.
  state->spin = static_cast<size_t>(num_threads) <= allowed_cpus().size();
  // Signals are the host program's business, not the workers'.
  sigset_t all, before;
  sigfillset(&all);
  // But for faults of their own, which a host program may want to report.
  for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 1; i < num_threads; ++i) {
      const int cpu = cpus.empty() ? -1 : cpus[static_cast<size_t>(i)];
      state->workers.emplace_back([state, i] {
        pthread_setname_np(pthread_self(), ("hybrid-cpu-" + std::to_string(i)).substr(0, 15).c_str());
        state->worker_loop(i);
      });
      if (cpu >= 0 && !pin_thread(state->workers.back().native_handle(), {cpu})) {
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

int ThreadPool::num_groups() const { return state_->num_groups; }

int ThreadPool::group_of(int worker) const { return state_->groups[static_cast<size_t>(worker)]; }

UnitRanges ThreadPool::split(int64_t num_units) const {
  UnitRanges ranges;
  for (int g = 0; g < num_groups(); ++g) {
    const auto workers = std::count_if(state_->groups.begin(), state_->groups.end(), [g](int of) { return of <= g; });
    ranges.add(num_units * workers / num_threads() - ranges.total());
  }
  return ranges;
}

void ThreadPool::check_caller() const {
  if (state_->forks != count_forks()) {
    throw std::runtime_error(
        "ThreadPool: this process was forked after the pool was made, and threads do not survive a fork; "
        "make a new pool in the child, or start it with the multiprocessing method \"spawn\"");
  }
  if (t_running_pool != nullptr) throw std::logic_error("ThreadPool: run() was called from inside a unit of work");
}

// Runs the job that is set; `alone`: on the calling thread.
void ThreadPool::finish(bool alone) {
  State& s = *state_;
  if (!alone && !s.workers.empty()) {
    s.open.store(true);
    s.announce();
    s.work(0);
    if (s.divided) s.wait_for_ranges();
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

void ThreadPool::run(int64_t num_units, void (*fn)(void*, int64_t, int), void* context) {
  State& s = *state_;
  check_caller();
  if (num_units <= 0) return;
  const std::lock_guard<std::mutex> lock(s.one_caller);
  s.fn = fn;
  s.context = context;
  s.divided = false;
  s.set_ranges(&num_units, 1);
  finish(num_units == 1);
}

void ThreadPool::run_divided(const UnitRanges& ranges, void (*fn)(void*, int64_t, int), void* context) {
  State& s = *state_;
  check_caller();
  if (ranges.total() <= 0) return;
  const Homecoming home(s.home);
  const std::lock_guard<std::mutex> lock(s.one_caller);
  s.fn = fn;
  s.context = context;
  s.divided = true;
  s.set_ranges(ranges.ends, ranges.count);
  finish(false);
}

}  // namespace hybrid
