#include "recording.h"

#include <stdexcept>

namespace hybrid {
namespace {

thread_local Recording* t_current = nullptr;

}  // namespace

Recording* Recording::current() { return t_current; }

Recording::~Recording() {
  if (t_current == this) t_current = nullptr;
}

void Recording::start() {
  if (t_current != nullptr) throw std::logic_error("Recording: start() was called on a thread that records already");
  t_current = this;
}

void Recording::stop() {
  if (t_current != this) throw std::logic_error("Recording: stop() was called on a thread that does not record into it");
  t_current = nullptr;
}

void Recording::run() const {
  if (t_current != nullptr) throw std::logic_error("Recording: run() was called on a thread that records");
  for (const std::function<void()>& operation : operations_) operation();
}

}  // namespace hybrid
