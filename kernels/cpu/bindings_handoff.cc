#include "bindings_handoff.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings_address.h"
#include "handoff.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

Address add_job(Handoff& handoff, int32_t layer, const PackedMatrix& gate, const PackedMatrix& up,
                const PackedMatrix& down, int64_t max_tokens, int64_t k, Address num_tokens, Address x,
                Address topk_ids, Address topk_weights, Address out) {
  constexpr const char* kName = "Handoff.add";
  const Handoff::Buffers buffers{.num_tokens = pointer<const int32_t>(num_tokens, kName, "num_tokens"),
                                 .x = pointer<const uint16_t>(x, kName, "x"),
                                 .topk_ids = pointer<const int32_t>(topk_ids, kName, "topk_ids"),
                                 .topk_weights = pointer<const float>(topk_weights, kName, "topk_weights"),
                                 .out = pointer<float>(out, kName, "out"),
                                 .max_tokens = max_tokens,
                                 .k = k};
  return reinterpret_cast<Address>(handoff.add(layer, gate, up, down, buffers));
}

std::vector<std::tuple<int32_t, int64_t, int64_t>> take_recorded(Handoff& handoff) {
  std::vector<std::tuple<int32_t, int64_t, int64_t>> found;
  for (const auto& done : handoff.take_recorded()) found.emplace_back(done.layer, done.begin_ns, done.end_ns);
  return found;
}

void* job_at(Address job) { return pointer<void>(job, "Handoff", "job"); }

}  // namespace

void bind_handoff(nb::module_& m) {
  nb::class_<Handoff>(m, "Handoff", "MoE layers handed to the CPU by callbacks that hold no Python; see handoff.h.")
      .def(nb::init<ThreadPool&, int, double>(), "pool"_a, "cpu"_a = -1, "limit_s"_a = 60.0, nb::keep_alive<1, 2>())
      .def("add", &add_job, "layer"_a, "gate"_a, "up"_a, "down"_a, "max_tokens"_a, "k"_a, "num_tokens"_a, "x"_a,
           "topk_ids"_a, "topk_weights"_a, "out"_a, nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           "The address of a job for a layer over the buffers at these addresses, which the caller keeps.")
      .def("check", &Handoff::check, "Raises RuntimeError, with the layer, if a job has failed.")
      .def_prop_ro("busy_s", &Handoff::busy_s)
      .def_prop_ro("num_done", &Handoff::num_done)
      .def("record", &Handoff::record, "on"_a, "Whether jobs are noted for `take_recorded`.")
      .def("take_recorded", &take_recorded, "(layer, begin_ns, end_ns) of jobs done since the last call, by the monotonic clock.")
      .def_static("submit", [](Address job) { Handoff::submit(job_at(job)); }, "job"_a, Unlocked())
      .def_static("wait", [](Address job) { Handoff::wait(job_at(job)); }, "job"_a, Unlocked())
      .def_prop_ro_static("submit_address", [](nb::handle) { return reinterpret_cast<Address>(&Handoff::submit); },
                          "void (*)(void* job), for a driver's host callback.")
      .def_prop_ro_static("wait_address", [](nb::handle) { return reinterpret_cast<Address>(&Handoff::wait); });
}

}  // namespace hybrid
