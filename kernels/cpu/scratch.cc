#include "scratch.h"

#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <new>

namespace hybrid {
namespace {

constexpr int kLevels = 2;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallestChunk = size_t{1} << 20;

std::atomic<size_t> g_total_bytes{0};

}  // namespace

Scratch& Scratch::of_this_thread(int level) {
  thread_local Scratch scratch[kLevels];
  return scratch[level];
}

Scratch& Scratch::fresh(int level) {
  Scratch& scratch = of_this_thread(level);
  if (scratch.chunks_.size() > 1) {
    size_t bytes = 0;
    for (const Chunk& chunk : scratch.chunks_) bytes += chunk.bytes;
    scratch.clear();
    scratch.add_chunk(bytes);
  }
  scratch.used_ = 0;
  return scratch;
}

size_t Scratch::total_bytes() { return g_total_bytes.load(std::memory_order_relaxed); }

void Scratch::release() {
  for (int level = 0; level < kLevels; ++level) of_this_thread(level).clear();
}

void Scratch::fill(uint8_t byte) {
  for (int level = 0; level < kLevels; ++level) {
    for (const Chunk& chunk : of_this_thread(level).chunks_) memset(chunk.data, byte, chunk.bytes);
  }
}

Scratch::~Scratch() { clear(); }

void* Scratch::take_bytes(size_t bytes) {
  const size_t rounded = (bytes / 64 + 1) * 64;  // never nothing
  if (chunks_.empty() || chunks_.back().bytes - used_ < rounded) add_chunk(rounded);
  uint8_t* start = chunks_.back().data + used_;
  used_ += rounded;
  return start;
}

void Scratch::add_chunk(size_t bytes) {
  const size_t granularity = bytes < kHugePage ? kSmallestChunk : kHugePage;
  const size_t rounded = (bytes + granularity - 1) / granularity * granularity;
  chunks_.reserve(chunks_.size() + 1);
  void* data = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  if (rounded >= kHugePage) madvise(data, rounded, MADV_HUGEPAGE);
  chunks_.push_back({static_cast<uint8_t*>(data), rounded});
  used_ = 0;
  g_total_bytes.fetch_add(rounded, std::memory_order_relaxed);
}

void Scratch::clear() {
  for (const Chunk& chunk : chunks_) {
    munmap(chunk.data, chunk.bytes);
    g_total_bytes.fetch_sub(chunk.bytes, std::memory_order_relaxed);
  }
  chunks_.clear();
  used_ = 0;
}

}  // namespace hybrid
