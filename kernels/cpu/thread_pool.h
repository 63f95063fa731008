// Persistent workers that share an atomic counter of work units.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace hybrid {

// Consecutive ranges of units, the g-th for group g: range g ends where range g + 1 begins, the first begins at 0.
struct UnitRanges {
  static constexpr int kMost = 64;

  // Appends a range. Throws std::logic_error if there are kMost already.
  void add(int64_t num_units);
  int64_t total() const { return count == 0 ? 0 : ends[count - 1]; }
  // The range a unit is in, and the unit's place there.
  int find(int64_t unit, int64_t& place) const;

  int count = 0;
  int64_t ends[kMost];
};

class ThreadPool {
 public:
  static constexpr int kMostGroups = UnitRanges::kMost;

  // One worker is the calling thread; num_threads - 1 are started and pinned to `cpus` (all but
  // the first entry; empty = no pinning). `groups` says which group each worker belongs to, those of one NUMA node
  // forming one: numbers from 0 without gaps, the first worker's is 0; empty = one group. Throws
  // std::invalid_argument for a count out of range, a CPU this process may not use, or other groups.
  ThreadPool(int num_threads, const std::vector<int>& cpus, const std::vector<int>& groups = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Of all calls of the operation moe: their wall time, and the experts whose weights they read, once a call each.
  std::atomic<int64_t> moe_ns{0}, moe_experts{0};

  int num_threads() const;
  int num_groups() const;
  int group_of(int worker) const;

  // Calls fn(context, unit, worker) for every unit in [0, num_units), each once, in any order and
  // on any worker, and returns when all are done. `worker` is in [0, num_threads). If a unit throws,
  // the units not yet begun are dropped and the first exception is thrown here. A second thread's
  // call waits for the first. Throws std::logic_error from inside a unit of any pool, and
  // std::runtime_error in a process forked after the pool was made.
  void run(int64_t num_units, void (*fn)(void* context, int64_t unit, int worker), void* context);

  // As run, where the units of range g are done by workers of group g alone; those of a range that has no group
  // by anyone.
  void run_divided(const UnitRanges& ranges, void (*fn)(void* context, int64_t unit, int worker), void* context);

  // Ranges that give every group units in proportion to its workers.
  UnitRanges split(int64_t num_units) const;

  template <class F>
  void parallel_for(int64_t num_units, F&& body) {
    run(num_units, &call<std::remove_reference_t<F>>, &body);
  }

  template <class F>
  void parallel_for_divided(const UnitRanges& ranges, F&& body) {
    run_divided(ranges, &call<std::remove_reference_t<F>>, &body);
  }

 private:
  template <class F>
  static void call(void* context, int64_t unit, int worker) {
    (*static_cast<F*>(context))(unit, worker);
  }

  void check_caller() const;
  void finish(bool alone);
  void stop();

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hybrid
