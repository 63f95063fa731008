// Memory an operation needs while it runs. It belongs to the calling thread, grows to the largest
// use seen and stays, so that a step allocates nothing once its shapes have occurred.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hybrid {

class Scratch {
 public:
  // The calling thread's memory, everything taken before given up. One operation uses it at a time;
  // one that calls another takes a memory of its own, level 1.
  static Scratch& fresh(int level = 0);

  // `count` uninitialised objects, aligned to 64 bytes, valid until the next fresh() of the level.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

  static size_t total_bytes();  // held by all threads

  // On the calling thread's memory: gives it back, or overwrites it (tests poison it with NaN).
  static void release();
  static void fill(uint8_t byte);

  ~Scratch();

 private:
  static Scratch& of_this_thread(int level);
  struct Chunk {
    uint8_t* data;
    size_t bytes;
  };
  void* take_bytes(size_t bytes);
  void add_chunk(size_t bytes);
  void clear();

  std::vector<Chunk> chunks_;
  size_t used_ = 0;  // of the last chunk
};

}  // namespace hybrid
