// Registers the operations with the extension module.
#pragma once
#include <nanobind/nanobind.h>

namespace hybrid {

void bind_ops(nanobind::module_& m);

}  // namespace hybrid
