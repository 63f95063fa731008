// A sequence of operations kept to run again without Python between them: what a captured graph is on a GPU.
//
// While a thread records, every operation it calls runs and is kept with its arguments: addresses, shapes,
// weights and pool. A run repeats them in order on the memory as it is then, so inputs go to the addresses
// they were recorded with. The caller keeps pool, weights and memory alive, and records nothing
// that is not an operation of this module.
#pragma once
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace hybrid {

class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording();  // stops, where the calling thread records into this
  // Keeps the operations of the calling thread until `stop`. Throws std::logic_error if it records already.
  void start();
  // Throws std::logic_error if the calling thread does not record into this.
  void stop();
  // Throws what an operation throws; those after it do not run. Throws std::logic_error while recording.
  void run() const;
  size_t size() const { return operations_.size(); }

  // That of the calling thread, or null.
  static Recording* current();
  void add(std::function<void()> operation) { operations_.push_back(std::move(operation)); }

 private:
  std::vector<std::function<void()>> operations_;
};

// Runs an operation, and keeps it where the thread records.
template <class F>
void run_operation(F&& operation) {
  operation();
  if (Recording* recording = Recording::current()) recording->add(std::forward<F>(operation));
}

}  // namespace hybrid
