// Persistent workers that share an atomic counter of work units.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace hybrid {

class ThreadPool {
 public:
  // One worker is the calling thread; num_threads - 1 are started and pinned to `cpus` (all but
  // the first entry; empty = no pinning).
  ThreadPool(int num_threads, const std::vector<int>& cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls fn(context, unit, worker) for every unit in [0, num_units), each once, in any order and
  // on any worker, and returns when all are done. `worker` is in [0, num_threads).
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
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hybrid
