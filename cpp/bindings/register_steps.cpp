#include "arrays.hpp"
#include "packed.hpp"
#include "sparsam/steps.hpp"

#include <optional>
#include <tuple>

namespace sparsam {
namespace {

// The items of a step's tuple, one after the other.
class StepReader {
 public:
  StepReader(const py::tuple& items, std::size_t number) : items_(items), number_(number) {
    name_ = items.empty() ? std::string() : next<std::string>();
  }

  const std::string& name() const { return name_; }

  template <class T>
  T next() {
    if (at_ >= items_.size()) refuse(std::to_string(items_.size()) + " items");
    try {
      return items_[at_++].cast<T>();
    } catch (const py::cast_error&) {
      refuse(py::repr(items_[at_ - 1]).cast<std::string>() + " at place " + std::to_string(at_ - 1));
    }
  }
  std::size_t buffer() {
    const auto i = next<std::ptrdiff_t>();
    if (i < 0) refuse("buffer " + std::to_string(i));
    return static_cast<std::size_t>(i);
  }
  std::size_t or_none() {
    const auto i = next<std::ptrdiff_t>();
    if (i < -1) refuse("index " + std::to_string(i));
    return i < 0 ? kNowhere : static_cast<std::size_t>(i);
  }
  void end() const {
    if (at_ != items_.size()) refuse(std::to_string(items_.size()) + " items");
  }
  [[noreturn]] void refuse(const std::string& got) const {
    throw py::value_error(expected("step " + std::to_string(number_) + " ('" + name_ + "')", got,
                                   "what _core.pyi says of steps", "pass such a tuple"));
  }

 private:
  const py::tuple& items_;
  std::size_t number_, at_ = 0;
  std::string name_{};
};

void read_norm(StepReader& items, bool adds, Step& s) {
  s.from[0] = items.buffer();
  if (adds) {
    s.from[1] = items.buffer();
    s.sum = items.or_none();
  }
  s.to = items.buffer();
  s.weight = items.or_none();
  if (s.kind == StepKind::layer_norm) s.bias = items.or_none();
  s.eps = items.next<float>();
}

Step read_step(const py::tuple& tuple, std::size_t number) {
  StepReader items(tuple, number);
  const std::string& name = items.name();
  Step s{StepKind::add};
  if (name == "linear") {
    s.kind = StepKind::linear;
    const auto* const weight = items.next<const PackedMatrix*>();
    if (weight == nullptr) items.refuse("None as the weight");
    s.form = form_for(*weight, items.next<std::string>());
    s.from[0] = items.buffer();
    s.to = items.buffer();
    s.bias = items.or_none();
    s.activation = items.next<std::string>();
  } else if (name == "attention") {
    s.kind = StepKind::attention;
    for (std::size_t& buffer : s.from) buffer = items.buffer();
    s.to = items.buffer();
    s.heads = items.next<std::size_t>();
    s.scale = items.next<float>();
    s.masked = items.next<std::size_t>() != 0;
  } else if (name == "rotary") {
    s.kind = StepKind::rotary;
    for (std::size_t& buffer : s.from) buffer = items.buffer();
    s.to = items.buffer();
    s.heads = items.next<std::size_t>();
  } else if (name == "add") {
    s.from[0] = items.buffer();
    s.from[1] = items.buffer();
    s.to = items.buffer();
  } else if (name == "layer_norm" || name == "add_layer_norm") {
    s.kind = StepKind::layer_norm;
    read_norm(items, name == "add_layer_norm", s);
  } else if (name == "rms_norm" || name == "add_rms_norm") {
    s.kind = StepKind::rms_norm;
    read_norm(items, name == "add_rms_norm", s);
  } else if (name == "activate" || name == "gate") {
    s.kind = name == "gate" ? StepKind::gate : StepKind::activate;
    s.from[0] = items.buffer();
    if (s.kind == StepKind::gate) s.from[1] = items.buffer();
    s.to = items.buffer();
    s.activation = items.next<std::string>();
  } else {
    items.refuse("that name");
  }
  items.end();
  return s;
}

Steps make_steps(std::vector<std::size_t> widths, const std::vector<py::tuple>& tuples) {
  std::vector<Step> steps;
  for (const py::tuple& tuple : tuples) steps.push_back(read_step(tuple, steps.size()));
  return Steps(std::move(widths), std::move(steps));
}

using MaskAt = std::tuple<std::uintptr_t, bool, std::array<std::size_t, 3>>;

// Addresses, for which the caller vouches.
void run_steps(const Steps& steps, std::size_t sequences, std::size_t positions,
               const std::vector<std::pair<std::size_t, std::uintptr_t>>& given,
               const std::vector<std::uintptr_t>& tensors, const std::optional<MaskAt>& mask,
               std::uintptr_t scratch, std::size_t floats) {
  StepsCall call{sequences, positions, {}, {}, {}, reinterpret_cast<float*>(scratch), floats};
  for (const auto& [buffer, at] : given) call.given.emplace_back(buffer, reinterpret_cast<float*>(at));
  for (const std::uintptr_t at : tensors) call.tensors.push_back(reinterpret_cast<const float*>(at));
  if (mask) {
    const auto& [at, bytes, strides] = *mask;
    call.mask = {bytes ? reinterpret_cast<const std::uint8_t*>(at) : nullptr,
                 bytes ? nullptr : reinterpret_cast<const float*>(at), strides[0], strides[1], strides[2]};
  }
  const Released released;
  steps.run(call);
}

}  // namespace

void register_steps(py::module_& m) {
  py::class_<Steps>(m, "Steps")
      .def(py::init(&make_steps), py::arg("widths"), py::arg("steps"))
      .def("scratch", &Steps::scratch, py::arg("sequences"), py::arg("positions"))
      .def("run", &run_steps, py::arg("sequences"), py::arg("positions"), py::arg("given"),
           py::arg("tensors"), py::arg("mask"), py::arg("scratch"), py::arg("floats"));
}

}  // namespace sparsam
