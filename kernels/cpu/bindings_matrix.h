// Registers packed matrices and the products with them.
#pragma once
#include <nanobind/nanobind.h>

namespace hybrid {

void bind_matrix(nanobind::module_& m);

}  // namespace hybrid
