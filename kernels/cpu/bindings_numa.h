#pragma once
#include <nanobind/nanobind.h>

namespace hybrid {

void bind_numa(nanobind::module_& m);

}  // namespace hybrid
