#include "arrays.hpp"
#include "sparsam/float_mode.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/threads.hpp"

namespace sparsam {
namespace {

#define SPARSAM_TEXT(x) #x
#define SPARSAM_TEXT_OF(x) SPARSAM_TEXT(x)
#if defined(__clang__)
constexpr const char* kCompiler =
    "clang " SPARSAM_TEXT_OF(__clang_major__) "." SPARSAM_TEXT_OF(__clang_minor__);
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " SPARSAM_TEXT_OF(__GNUC__) "." SPARSAM_TEXT_OF(__GNUC_MINOR__);
#else
constexpr const char* kCompiler = "unknown compiler";
#endif

// Python runs signal handlers only in its main thread, which is the main thread of the process unless Python
// is embedded; so other threads need not wait for the GIL.
void check_signals() {
  if (!is_main_thread()) return;
  const py::gil_scoped_acquire acquired;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::uint64_t standard_floats() {
  const std::uint64_t before = float_mode();
  set_float_mode(standard_float_mode());
  return before;
}

}  // namespace

void register_runtime(py::module_& m) {
  m.attr("__version__") = SPARSAM_VERSION;
  m.attr("compiler") = kCompiler;
  m.def("active_isa", &active_isa);
  m.def("compiled_isas", &compiled_isas);
  m.def("available_isas", &available_isas);
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("int8_isas", &int8_isas);
  m.def("use_int8_isa", &use_int8_isa, py::arg("name"));
  m.def("use_quads", &use_quads, py::arg("wanted"));
  m.def("num_threads", &num_threads);
  m.def("default_num_threads", &default_num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("adopt_runtime", &adopt_runtime, py::arg("library"));
  m.def("threading_runtime", &threading_runtime);
  m.def("standard_floats", &standard_floats);
  m.def("set_float_mode", &set_float_mode, py::arg("mode"));
  kernels();  // chosen now, so that a forked child never finds the choice incomplete
  set_interrupt_check(&check_signals);
}

}  // namespace sparsam
