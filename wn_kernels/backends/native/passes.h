// Prepared passes, as backends/triton/passes.py describes them: tensors to allocate, kernels to
// launch on them, and operations of PyTorch's between the launches.
//
// A kernel is launched by the driver itself, or through Triton's own launcher where the driver needs
// more than addresses and numbers; the arguments of both are prepared (backends/triton/compiled.py). A
// launch goes through Python's `Launcher` where its kernel is not compiled yet, and where something
// observes launches.

#pragma once

#include <atomic>
#include <list>
#include <memory>

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/variable.h>

#include "call.h"
#include "operations.h"
#include "driver.h"

namespace wn_kernels {

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

// Values that threads add and look for without a lock. None is ever removed or changed.
template <typename Value>
class Published {
  struct Link {
    Value value;
    Link* next;
    size_t count;  // of this one and those behind it
  };

 public:
  Published() = default;
  Published(const Published&) = delete;
  Published& operator=(const Published&) = delete;
  ~Published() {
    for (Link* link = first_; link;) {
      Link* next = link->next;
      delete link;
      link = next;
    }
  }

  // The last added value that fits; null where none does.
  template <typename Fits>
  const Value* find(const Fits& fits) const {
    for (const Link* link = first_.load(std::memory_order_acquire); link; link = link->next)
      if (fits(link->value)) return &link->value;
    return nullptr;
  }

  size_t size() const {
    const Link* first = first_.load(std::memory_order_acquire);
    return first ? first->count : 0;
  }

  template <typename... Fields>
  const Value* add(Fields&&... fields) {
    auto* link = new Link{Value{std::forward<Fields>(fields)...}, first_.load(), 1};
    do {
      link->count = link->next ? link->next->count + 1 : 1;
    } while (!first_.compare_exchange_weak(link->next, link, std::memory_order_release));
    return &link->value;
  }

 private:
  std::atomic<Link*> first_{nullptr};
};

// Whether something observes launches, which then have to go through Python one by one.
class Observation {
 public:
  // The attributes that tell: see `SIGNS` in backends/triton/compiled.py.
  explicit Observation(const py::handle& signs) {
    for (const auto& each : signs) {
      const auto sign = py::reinterpret_borrow<py::tuple>(each);
      signs_.push_back(
          {references_.keep(sign[0]), references_.keep(sign[1]), references_.keep(sign[2])});
    }
  }

  // Called with the GIL.
  bool operator()() const {
    for (const auto& sign : signs_) {
      const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(sign.owner, sign.name));
      if (!value) throw py::error_already_set();
      if (value.ptr() != sign.usual && !value.is_none()) return true;
      if (PyList_CheckExact(value.ptr()) && PyList_GET_SIZE(value.ptr())) return true;
    }
    return false;
  }

 private:
  struct Sign {
    PyObject *owner, *name, *usual;
  };
  References references_;
  std::vector<Sign> signs_;
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
    if (const py::object kernel = compiled.attr("kernel"); !kernel.is_none() && Driver::find())
      kernel_.emplace(kernel);
  }

  // What the driver launches; null where Triton's launcher has to.
  const Kernel* kernel() const { return kernel_ ? &*kernel_ : nullptr; }

  // The current stream of a device, which is the kernel's.
  void* stream(const c10::Device& device) const {
    if (device.is_cuda()) {
      const c10::impl::VirtualGuardImpl guard(device.type());
      if (guard.getStream(device).id() == 0) return nullptr;  // the default stream
    }
    const py::gil_scoped_acquire gil;
    return PyLong_AsVoidPtr(checked(PyObject_CallOneArg(current_stream_, device_)).ptr());
  }

  int device() const {
    const py::gil_scoped_acquire gil;
    return static_cast<int>(PyLong_AsLong(device_));
  }

  // Launches by Triton on tensors at these addresses, on the current stream of their device.
  void operator()(const uint64_t* addresses, size_t count) const {
    const auto stream = checked(PyObject_CallOneArg(current_stream_, device_));
    std::vector<PyObject*> arguments = head_;
    arguments[stream_] = stream.ptr();
    py::object numbers = py::reinterpret_steal<py::object>(
        PyTuple_New(count + (is_nested_ ? constants_.size() : 0)));
    if (!numbers) throw py::error_already_set();
    size_t i = 0;
    for (; i < count; ++i)
      PyTuple_SET_ITEM(
          numbers.ptr(), i, checked(PyLong_FromUnsignedLongLong(addresses[i])).release().ptr());
    if (is_nested_) {
      for (PyObject* o : constants_) PyTuple_SET_ITEM(numbers.ptr(), i++, Py_NewRef(o));
      arguments.push_back(numbers.ptr());
    } else {
      for (size_t j = 0; j < count; ++j) arguments.push_back(PyTuple_GET_ITEM(numbers.ptr(), j));
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
  std::optional<Kernel> kernel_;
};

// A launch of a pass, or an operation of PyTorch's.
struct Step {
  // A kernel that was compiled for addresses some of which, by their bits, are no multiples of 16
  // bytes.
  struct Found {
    uint64_t unaligned;
    std::unique_ptr<Compiled> compiled;
  };

  std::optional<Operation> operation;  // nothing else is there where it is
  PyObject* launcher;
  PyObject* compiled;  // the launcher's dictionary of compiled kernels
  bool is_empty;       // whether its grid has no block
  std::vector<int> tensors;
  Published<Found> found;

  // The kernel that was compiled for such addresses; null where none was.
  const Compiled* find(uint64_t unaligned) {
    const auto fits = [&](const Found& each) { return each.unaligned == unaligned; };
    if (const Found* each = found.find(fits)) return each->compiled.get();
    const py::gil_scoped_acquire gil;
    const py::int_ key(unaligned);
    PyObject* value = item(compiled, key.ptr());
    if (!value) return nullptr;
    return found.add(unaligned, std::make_unique<Compiled>(value))->compiled.get();
  }
};

class Pass {
 public:
  explicit Pass(const py::object& pass) {
    for (const auto& each : pass.attr("layouts")) {
      auto& here = layouts_.emplace_back();
      if (each.is_none()) continue;
      const auto layout = py::reinterpret_borrow<py::tuple>(each);
      here = {layout[0].cast<Sizes>(), layout[1].cast<Sizes>(), layout[2].cast<at::ScalarType>()};
    }
    arguments_ = pass.attr("arguments").cast<size_t>();
    for (const auto& each : pass.attr("spare"))
      layouts_[each.cast<size_t>() - arguments_]->is_spare = true;
    for (const auto& each : pass.attr("steps")) {
      const auto step = py::reinterpret_borrow<py::tuple>(each);
      auto& here = steps_.emplace_back();
      if ((here.operation = Operation::of(step))) continue;
      const py::object launcher = step[0];
      here.launcher = references_.keep(launcher);
      here.compiled = references_.keep(launcher.attr("compiled"));
      here.is_empty = launcher.attr("is_empty").cast<bool>();
      here.tensors = step[1].cast<std::vector<int>>();
      TORCH_CHECK(here.tensors.size() <= most_tensors, "a kernel has too many tensors");
    }
    for (const auto& each : pass.attr("results"))
      results_.push_back(each.is_none() ? -1 : each.cast<int>());
  }

  // The results for these arguments, the first of which is defined; those that are spare only where
  // they are wanted. Called without the GIL.
  Tensors operator()(Tensors tensors, bool is_observed, bool wants_spare = true) {
    const auto device = tensors[0].device();
    const c10::DeviceGuard guard(device);
    for (const auto& layout : layouts_)  // the result of an operation has none
      tensors.push_back(
          layout && (wants_spare || !layout->is_spare) ? allocated(*layout, tensors[0]) : Tensor());
    std::optional<void*> stream;
    for (auto& step : steps_) {
      if (step.operation) {
        (*step.operation)(tensors);
        continue;
      }
      if (step.is_empty && !is_observed) continue;
      const size_t count = step.tensors.size();
      uint64_t addresses[most_tensors], unaligned = 0;
      for (size_t i = 0; i < count; ++i) {
        const Tensor& t = tensors[step.tensors[i]];
        addresses[i] = t.defined() ? reinterpret_cast<uintptr_t>(t.data_ptr()) : 0;
        if (addresses[i] & 15) unaligned |= uint64_t{1} << i;
      }
      const Compiled* compiled = is_observed ? nullptr : step.find(unaligned);
      if (compiled && compiled->kernel()) {
        if (!stream) {
          Driver::find()->ensure_context(device.has_index() ? device.index() : compiled->device());
          stream = compiled->stream(device);
        }
        (*compiled->kernel())(addresses, count, *stream);
        continue;
      }
      const py::gil_scoped_acquire gil;
      if (compiled) {
        (*compiled)(addresses, count);
        continue;
      }
      py::tuple arguments(count);
      for (size_t i = 0; i < count; ++i) {
        Tensor& t = tensors[step.tensors[i]];
        if (!t.defined()) t = allocated(*layouts_[step.tensors[i] - arguments_], tensors[0]);
        arguments[i] = py::cast(t);
      }
      py::handle(step.launcher)(*arguments);
    }
    Tensors out;
    for (const int i : results_) out.push_back(i < 0 ? Tensor() : tensors[i]);
    return out;
  }

 private:
  static constexpr size_t most_tensors = 32;

  struct Layout {
    Sizes sizes, strides;
    at::ScalarType dtype;
    bool is_spare = false;
  };

  // Memory of that layout beside another tensor's.
  static Tensor allocated(const Layout& layout, const Tensor& beside) {
    return at::empty_strided(
        layout.sizes, layout.strides, beside.options().dtype(layout.dtype));
  }

  References references_;
  size_t arguments_;
  std::vector<std::optional<Layout>> layouts_;
  std::list<Step> steps_;
  std::vector<int> results_;
};

// The pass that Python prepared; null where it prepared none.
inline std::shared_ptr<Pass> as_pass(const py::object& prepared) {
  return prepared.is_none() ? nullptr : std::make_shared<Pass>(prepared);
}

}  // namespace wn_kernels
