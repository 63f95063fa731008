// Atomics that sometimes yield or sleep before and after an access, so that threads meet in orders
// which need a thread to be stopped between two instructions.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

namespace hybrid {

inline void pause_sometimes() {
  static thread_local uint32_t random =
      static_cast<uint32_t>(std::hash<std::thread::id>{}(std::this_thread::get_id())) | 1;
  random = random * 1664525u + 1013904223u;
  if (random >> 28 == 0) sched_yield();
  if (random >> 24 == 17) usleep(30);
}

template <class T>
class Atomic {
 public:
  Atomic(T value) : value_(value) {}
  T load(std::memory_order order = std::memory_order_seq_cst) const {
    return paused([&] { return value_.load(order); });
  }
  void store(T value, std::memory_order order = std::memory_order_seq_cst) {
    paused([&] { return value_.store(value, order), 0; });
  }
  T exchange(T value, std::memory_order order = std::memory_order_seq_cst) {
    return paused([&] { return value_.exchange(value, order); });
  }
  T fetch_add(T n, std::memory_order order = std::memory_order_seq_cst) {
    return paused([&] { return value_.fetch_add(n, order); });
  }
  T fetch_sub(T n, std::memory_order order = std::memory_order_seq_cst) {
    return paused([&] { return value_.fetch_sub(n, order); });
  }

 private:
  template <class Access>
  static auto paused(Access access) {
    pause_sometimes();
    const auto result = access();
    pause_sometimes();
    return result;
  }

  std::atomic<T> value_;  // the first member: its address is also that of the futex word
};

}  // namespace hybrid
