// How Python hands memory over: as an address, checked for null and for the alignment of its elements.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace hybrid {

using Address = uintptr_t;
using Unlocked = nanobind::call_guard<nanobind::gil_scoped_release>;

// The address as a pointer; std::invalid_argument names the operation and the argument.
template <class T>
T* pointer(Address address, const char* operation, const char* argument) {
  const std::string where = std::string(operation) + ": the address of `" + argument + "` is ";
  if (address == 0) throw std::invalid_argument(where + "null");
  if constexpr (!std::is_void_v<T>) {
    if (address % alignof(T) != 0) throw std::invalid_argument(where + "not aligned to its elements");
  }
  return reinterpret_cast<T*>(address);
}

// The same where null means that there is none.
template <class T>
T* optional_pointer(Address address, const char* operation, const char* argument) {
  return address == 0 ? nullptr : pointer<T>(address, operation, argument);
}

}  // namespace hybrid
