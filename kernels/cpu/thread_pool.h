// Persistent workers that share an atomic counter of work units.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace hybrid {

class ThreadPool {
 public:
  // One worker is the calling thread; num_threads - 1 are started and pinned to `cpus` (all but
  // the first entry; empty = no pinning). Throws std::invalid_argument for a count out of range or a
  // CPU this process may not use.
  ThreadPool(int num_threads, const std::vector<int>& cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls fn(context, unit, worker) for every unit in [0, num_units), each once, in any order and
  // on any worker, and returns when all are done. `worker` is in [0, num_threads). If a unit throws,
  // the units not yet begun are dropped and the first exception is thrown here. A second thread's
  // call waits for the first. Throws std::logic_error from inside a unit of any pool, and
  // std::runtime_error in a process forked after the pool was made.
  void run(int64_t num_units, void (*fn)(void* context, int64_t unit, int worker), void* context);

  template <class F>
  void parallel_for(int64_t num_units, F&& body) {
    run(num_units,
        [](void* context, int64_t unit, int worker) {
          (*static_cast<std::remove_reference_t<F>*>(context))(unit, worker);
        },
        &body);
  }

 private:
  void stop();

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hybrid
