// Prepared passes, as backends/triton/passes.py describes them: tensors to allocate, kernels to
// launch on them, and operations of PyTorch's between the launches.
//
// A kernel is launched through Triton's own launcher, whose arguments are prepared
// (backends/triton/compiled.py). A launch goes through Python's `Launcher` where its kernel is not
// compiled yet, and where something observes launches.

#pragma once

#include <list>
#include <map>
#include <memory>

#include <torch/csrc/autograd/variable.h>

#include "call.h"
#include "operations.h"

namespace wn_kernels {

using torch::autograd::variable_list;

// References to Python objects, which are dropped with the GIL held, or kept where the interpreter
// is gone.
class References {
 public:
  PyObject* keep(py::object object) {
    PyObject* kept = object.release().ptr();
    held_.push_back(kept);
    return kept;
  }
  References() = default;
  References(const References&) = delete;
  References& operator=(const References&) = delete;
  ~References() {
    if (held_.empty() || !Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    for (PyObject* o : held_) Py_DECREF(o);
  }

 private:
  std::vector<PyObject*> held_;
};

// A compiled kernel with the arguments that no call changes.
class Compiled {
 public:
  explicit Compiled(const py::handle& compiled)
      : function_(references_.keep(compiled.attr("function"))),
        current_stream_(references_.keep(compiled.attr("current_stream"))),
        device_(references_.keep(compiled.attr("device"))),
        is_nested_(compiled.attr("is_nested").cast<bool>()) {
    const auto append = [&](std::vector<PyObject*>& to, const char* name) {
      for (const auto& each : compiled.attr(name))
        to.push_back(references_.keep(py::reinterpret_borrow<py::object>(each)));
    };
    append(head_, "grid");
    stream_ = head_.size();
    head_.push_back(nullptr);
    append(head_, "fixed");
    append(constants_, "constants");
  }

  // Launches on tensors at these addresses, on the current stream of their device.
  void operator()(const std::vector<uintptr_t>& addresses) const {
    const auto stream = checked(PyObject_CallOneArg(current_stream_, device_));
    std::vector<PyObject*> arguments = head_;
    arguments[stream_] = stream.ptr();
    py::object numbers = py::reinterpret_steal<py::object>(
        PyTuple_New(addresses.size() + (is_nested_ ? constants_.size() : 0)));
    if (!numbers) throw py::error_already_set();
    size_t i = 0;
    for (const uintptr_t address : addresses)
      PyTuple_SET_ITEM(numbers.ptr(), i++, checked(PyLong_FromSize_t(address)).release().ptr());
    if (is_nested_) {
      for (PyObject* o : constants_) PyTuple_SET_ITEM(numbers.ptr(), i++, Py_NewRef(o));
      arguments.push_back(numbers.ptr());
    } else {
      for (size_t j = 0; j < addresses.size(); ++j)
        arguments.push_back(PyTuple_GET_ITEM(numbers.ptr(), j));
      arguments.insert(arguments.end(), constants_.begin(), constants_.end());
    }
    checked(PyObject_Vectorcall(function_, arguments.data(), arguments.size(), nullptr));
  }

 private:
  static py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  References references_;
  PyObject *function_, *current_stream_, *device_;
  bool is_nested_;
  std::vector<PyObject*> head_, constants_;  // in `head_` a place for the stream is left
  size_t stream_;
};

// A launch of a pass, or an operation of PyTorch's.
struct Step {
  std::optional<Operation> operation;
  py::handle launcher;
  py::handle compiled;       // the launcher's dictionary of compiled kernels
  std::vector<int> tensors;
  // Those that were launched, by the tensors whose addresses are no multiples of 16 bytes.
  std::map<uint64_t, Compiled> found;
};

class Pass {
 public:
  explicit Pass(const py::object& pass) : is_observed_(references_.keep(pass.attr("is_observed"))) {
    for (const auto& each : pass.attr("layouts")) {
      auto& here = layouts_.emplace_back();
      if (each.is_none()) continue;
      const auto layout = py::reinterpret_borrow<py::tuple>(each);
      here = {layout[0].cast<Sizes>(), layout[1].cast<Sizes>(), layout[2].cast<at::ScalarType>()};
    }
    for (const auto& each : pass.attr("steps")) {
      const auto step = py::reinterpret_borrow<py::tuple>(each);
      auto& here = steps_.emplace_back();
      if ((here.operation = Operation::of(step))) continue;
      const py::object launcher = step[0];
      here.launcher = references_.keep(launcher);
      here.compiled = references_.keep(launcher.attr("compiled"));
      here.tensors = step[1].cast<std::vector<int>>();
    }
    for (const auto& each : pass.attr("results"))
      results_.push_back(each.is_none() ? -1 : each.cast<int>());
  }

  // The results for these arguments, the first of which is defined. Called with the GIL held.
  variable_list operator()(variable_list tensors) {
    {
      py::gil_scoped_release released;
      const auto options = tensors[0].options();
      for (const auto& layout : layouts_)
        tensors.push_back(
            layout ? at::empty_strided(layout->sizes, layout->strides, options.dtype(layout->dtype))
                   : Tensor());  // the result of an operation
    }
    const c10::DeviceGuard guard(tensors[0].device());
    const bool observed = is_observed_().cast<bool>();
    for (auto& step : steps_) {
      if (step.operation)
        (*step.operation)(tensors);
      else
        launch(step, tensors, observed);
    }
    variable_list out;
    for (const int i : results_) out.push_back(i < 0 ? Tensor() : tensors[i]);
    return out;
  }

 private:
  struct Layout {
    Sizes sizes, strides;
    at::ScalarType dtype;
  };

  static void launch(Step& step, const variable_list& tensors, bool observed) {
    if (!observed) {
      std::vector<uintptr_t> addresses;
      uint64_t unaligned = 0;
      for (const int i : step.tensors) {
        addresses.push_back(reinterpret_cast<uintptr_t>(tensors[i].data_ptr()));
        if (addresses.back() & 15) unaligned |= uint64_t{1} << (addresses.size() - 1);
      }
      if (const Compiled* compiled = find(step, unaligned)) return (*compiled)(addresses);
    }
    py::tuple arguments(step.tensors.size());
    size_t place = 0;
    for (const int i : step.tensors) arguments[place++] = py::cast(tensors[i]);
    step.launcher(*arguments);
  }

  // The kernel that was compiled for such addresses; null where none was.
  static const Compiled* find(Step& step, uint64_t unaligned) {
    const auto kept = step.found.find(unaligned);
    if (kept != step.found.end()) return &kept->second;
    const py::int_ key(unaligned);
    PyObject* compiled = PyDict_GetItemWithError(step.compiled.ptr(), key.ptr());
    if (!compiled && PyErr_Occurred()) throw py::error_already_set();
    return compiled ? &step.found.try_emplace(unaligned, compiled).first->second : nullptr;
  }

  References references_;
  py::handle is_observed_;
  std::vector<std::optional<Layout>> layouts_;
  std::list<Step> steps_;
  std::vector<int> results_;
};

// The pass that Python prepared; null where it prepared none.
inline std::shared_ptr<Pass> as_pass(const py::object& prepared) {
  return prepared.is_none() ? nullptr : std::make_shared<Pass>(prepared);
}

}  // namespace wn_kernels
