// Python entry points of handoff.h.
#pragma once
#include <nanobind/nanobind.h>

namespace hybrid {

void bind_handoff(nanobind::module_& m);

}  // namespace hybrid
