// Which calls are served, and how.
//
// The library checks the cheap properties of a call first, then looks its plan up by shapes and
// options. On a miss it calls Python once, to validate and to plan. It returns None for every call
// that it does not serve, a wrong one too, and leaves that to the rest of the package.

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include "norm.h"

namespace wn_kernels {

namespace py = pybind11;
using at::Tensor;
using Sizes = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// --- what is served ----------------------------------------------------------------------------

// Whether nobody sees through the call: no torch.func transform, forward-mode AD, trace, dispatch or
// function mode.
inline bool is_seen_by_nobody() {
  const auto& included = c10::impl::tls_local_dispatch_key_set().included_;
  return !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0) && !torch::jit::tracer::isTracing() &&
         !c10::impl::dispatch_mode_enabled() && !at::impl::torch_function_mode_enabled();
}

inline bool is_eager(at::DeviceType device) {
  return is_seen_by_nobody() && !at::autocast::is_autocast_enabled(device);
}

// Of torch's own kind, with memory to read: no transform's wrapper, no lazy negative.
inline bool is_plain(const Tensor& t, at::DeviceType device = at::kCPU) {
  return t.device().type() == device && t.layout() == at::kStrided && !t.is_nested() && t.has_storage() &&
         !t.is_neg() && !t._is_zerotensor() && !t.key_set().has_any(c10::python_ks) &&
         !t.key_set().has(c10::DispatchKey::FuncTorchBatched) &&
         !t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) &&
         !t.key_set().has(c10::DispatchKey::Functionalize);
}

inline MaybeTensor maybe(const Tensor& t) {
  return t.defined() ? MaybeTensor(t) : std::nullopt;
}

// Whether the slices along the first dimension are rows in memory.
inline bool has_rows(const Tensor& v) {
  return v.is_non_overlapping_and_dense() &&
         (v.size(0) == 1 || v.stride(0) == v.numel() / v.size(0));
}

// `t` in this dtype.
inline Tensor as(const Tensor& t, at::ScalarType dtype) {
  return !t.defined() || t.scalar_type() == dtype ? t : t.to(dtype);
}

// The input of a layer, which autocast casts as that of torch.nn's layers. float64 stays as it is.
inline Tensor as_autocast(const Tensor& x) {
  if (x.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(at::kCPU)) return x;
  return as(x, at::autocast::get_autocast_dtype(at::kCPU));
}

// In this scope, autocast does not see the operations.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// In this scope, neither autograd nor autocast sees the operations.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  WithoutAutocast no_autocast;
};

inline bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

// A layer's tensors, where they are served.
struct Operands {
  Tensor x, v, g, bias;  // the bias may be undefined

  bool needs_weight_grad() const { return v.requires_grad() || g.requires_grad(); }
  bool needs_grad() const {
    return at::GradMode::is_enabled() && ((x.defined() && x.requires_grad()) || needs_weight_grad() ||
                                          (bias.defined() && bias.requires_grad()));
  }
};

// The item of a dictionary; null if there is none.
inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// A tensor, no subclass.
inline bool is_tensor(py::handle object) { return THPVariable_CheckExact(object.ptr()); }

// g has the dtype of v. The other dtypes may differ, but float64 goes with itself alone.
inline std::optional<Operands> operands(py::handle x, py::handle v, py::handle g, py::handle bias) {
  if (!is_tensor(x) || !is_tensor(v) || !is_tensor(g) || !(bias.is_none() || is_tensor(bias)) ||
      !is_seen_by_nobody())
    return std::nullopt;
  Operands out{THPVariable_Unpack(x.ptr()), THPVariable_Unpack(v.ptr()),
               THPVariable_Unpack(g.ptr()), {}};
  if (!bias.is_none()) out.bias = THPVariable_Unpack(bias.ptr());
  const auto dtype = out.v.scalar_type();
  const auto fits = [&](const Tensor& t) {
    const auto own = t.scalar_type();
    return is_floating(own) && (own == at::kDouble) == (dtype == at::kDouble) && is_plain(t);
  };
  const bool served = fits(out.x) && fits(out.v) && fits(out.g) && out.g.scalar_type() == dtype &&
                      out.x.numel() > 0 && out.v.numel() > 0 && out.v.dim() > 0 &&
                      out.g.is_contiguous() &&
                      (!out.bias.defined() || (fits(out.bias) && out.bias.is_contiguous()));
  return served ? std::make_optional(std::move(out)) : std::nullopt;
}

// The operands of a call whose kernels Python launches: any floating-point dtypes, on one device.
// The weight alone has no x.
inline std::optional<Operands> launched_operands(
    py::handle x, py::handle v, py::handle g, py::handle bias) {
  if (!is_tensor(v) || !is_tensor(g) || !(x.is_none() || is_tensor(x)) ||
      !(bias.is_none() || is_tensor(bias)))
    return std::nullopt;
  Operands out{{}, THPVariable_Unpack(v.ptr()), THPVariable_Unpack(g.ptr()), {}};
  if (!x.is_none()) out.x = THPVariable_Unpack(x.ptr());
  if (!bias.is_none()) out.bias = THPVariable_Unpack(bias.ptr());
  const auto device = out.v.device();
  if (!is_eager(device.type())) return std::nullopt;
  const auto fits = [&](const Tensor& t) {
    return is_floating(t.scalar_type()) && t.device() == device && is_plain(t, device.type());
  };
  const bool served = fits(out.v) && fits(out.g) && out.g.is_contiguous() &&
                      (!out.x.defined() || fits(out.x)) && (!out.bias.defined() || fits(out.bias));
  return served ? std::make_optional(std::move(out)) : std::nullopt;
}

// --- functions of Python -----------------------------------------------------------------------

// These have no table of overloads, as pybind11's functions have, which takes as long as a small
// allocation.

// A capsule that owns an object.
template <typename T>
py::object in_capsule(std::unique_ptr<T> object) {
  auto capsule = py::reinterpret_steal<py::object>(
      PyCapsule_New(object.get(), nullptr, [](PyObject* self) {
        delete static_cast<T*>(PyCapsule_GetPointer(self, nullptr));
      }));
  if (!capsule) throw py::error_already_set();
  object.release();
  return capsule;
}

// Calls a method of the object that a capsule owns, with so many arguments.
template <typename T, auto method, Py_ssize_t arguments>
PyObject* called(PyObject* capsule, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == arguments, "expected ", arguments, " arguments, got ", count);
  return (static_cast<T*>(PyCapsule_GetPointer(capsule, nullptr))->*method)(given).release().ptr();
  END_HANDLE_TH_ERRORS
}

template <typename T, auto method, Py_ssize_t arguments>
PyMethodDef method_of(const char* name) {
  return {
      name, reinterpret_cast<PyCFunction>(called<T, method, arguments>), METH_FASTCALL, nullptr};
}

// The function of the object in a capsule.
inline py::object bound(PyMethodDef& method, const py::object& capsule) {
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, capsule.ptr()));
}

// --- what shapes and options decide ------------------------------------------------------------

// How a layer is computed in a direction: with a W that is formed, with a side that is scaled
// instead, as a product with the unfolded input, with a W and a product in float32 of a layer in half
// precision, or late with products of this library's own.
enum class Variant { materialize, late, unfold, widen, own };

// What torch.convolution takes after the bias.
struct Geometry {
  using Fields = std::tuple<Sizes, Sizes, Sizes, bool, Sizes, int64_t>;  // as Python gives them
  static Geometry of(const Fields& fields) {
    return std::apply([](const auto&... field) { return Geometry{field...}; }, fields);
  }

  Sizes stride, padding, dilation;
  bool transposed = false;
  Sizes output_padding;
  int64_t groups = 1;

  // As one list of numbers, and back: what a node saves costs it by the piece.
  Sizes packed() const {
    Sizes all{groups, transposed};
    for (const Sizes* sizes : {&stride, &padding, &dilation, &output_padding})
      all.insert(all.end(), sizes->begin(), sizes->end());
    return all;
  }
  static Geometry unpacked(const Sizes& all) {
    const auto rank = static_cast<int64_t>(all.size() - 2) / 4;
    const auto part = [&](int64_t i) {
      return Sizes(all.begin() + 2 + i * rank, all.begin() + 2 + (i + 1) * rank);
    };
    return {part(0), part(1), part(2), all[1] != 0, part(3), all[0]};
  }
};

// How a call is computed, as prepare.py plans it.
struct Plan {
  // The geometry of a convolution, the sizes of its output, the variants of the forward in a
  // training step, of the forward otherwise and of the backward, whether the training step keeps
  // x Vᵀ or a convolution's W for the backward, and whether a convolution's bias is added in a pass
  // of its own.
  using Encoded = std::tuple<std::optional<Geometry::Fields>, Sizes, int, int, int, bool, bool>;

  explicit Plan(const Encoded& encoded)
      : y_sizes(std::get<1>(encoded)), recorded(static_cast<Variant>(std::get<2>(encoded))),
        forward(static_cast<Variant>(std::get<3>(encoded))),
        backward(static_cast<Variant>(std::get<4>(encoded))), keeps(std::get<5>(encoded)),
        adds_bias(std::get<6>(encoded)) {
    if (const auto& geometry = std::get<0>(encoded)) conv = Geometry::of(*geometry);
  }

  Geometry conv;
  Sizes y_sizes;
  Variant recorded, forward, backward;
  bool keeps, adds_bias;
};

// The Python functions that this library calls. They are never destroyed: the interpreter may be gone
// before.
struct Callbacks {
  // (rank, (x, v, g, bias), geometry, dim, eps, channels_last, norm) -> Plan::Encoded, or None where
  // the library does not serve the call. It raises what is wrong with a call.
  py::object plan;
  // (rank, (x, v, g, bias), geometry, dim, eps, norm) -> what `Launches` (launched.h) is made of, or
  // None.
  py::object launches;
  // (dY, dW, x, v, g, geometry, dim, eps, needs, norm) -> (dX, dV, dg, db), of a batch of gradients
  // as well
  py::object differentiable_grads;
  // (ddV, ddg, dW, v, g, n, dim, eps, norm) -> the gradients of (dV, dg) with respect to dW, v and g;
  // part of the graph if n is None
  py::object weight_grads_backward;
  // (cell, reversed, (dy, dh_n, dc_n), (h0, c0, v, g, bias, and x, v, g, bias of the input's product),
  // eps, norm, needs) -> the gradients of (p, h0, c0, v, g, bias); part of the graph
  py::object recurrence_grads;
  std::vector<py::object> norms;  // the names of the norms, in the order of `Norm`
};

inline Callbacks& callbacks() {
  static auto* all = new Callbacks;
  return *all;
}

// Returns the name of a norm.
inline py::object as_name(Norm norm) { return callbacks().norms[static_cast<size_t>(norm)]; }

// Returns the norm of this name, or nothing if there is none.
inline std::optional<Norm> norm_of(py::handle name) {
  const auto& names = callbacks().norms;
  for (size_t i = 0; i < names.size(); ++i)
    if (name.is(names[i])) return static_cast<Norm>(i);
  for (size_t i = 0; i < names.size(); ++i)  // another string of these letters
    if (PyUnicode_CheckExact(name.ptr()) && name.equal(names[i])) return static_cast<Norm>(i);
  return std::nullopt;
}

// What a call is looked up by: dtypes, shapes, layouts and options, as bytes.
class Key {
 public:
  // Starts anew.
  void clear() { bytes_.clear(); }
  const std::string& bytes() const { return bytes_; }

  template <typename Number>
  void number(Number number) {
    bytes_.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void list(at::IntArrayRef numbers) {
    number(static_cast<int64_t>(numbers.size()));
    for (const int64_t n : numbers) number(n);
  }
  // False where the option is not of the usual kind.
  bool option(py::handle option);

 private:
  std::string bytes_;
};

inline bool Key::option(py::handle handle) {
  PyObject* o = handle.ptr();
  if (PyTuple_CheckExact(o)) {
    number('t');
    number(static_cast<int64_t>(PyTuple_GET_SIZE(o)));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(o); ++i)
      if (!option(PyTuple_GET_ITEM(o, i))) return false;
    return true;
  }
  if (PyUnicode_CheckExact(o)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(o, &size);
    if (!text) throw py::error_already_set();
    number('s');
    number(static_cast<int64_t>(size));
    bytes_.append(text, size);
    return true;
  }
  if (PyLong_CheckExact(o)) {
    number('i');
    int overflow = 0;
    number(static_cast<int64_t>(PyLong_AsLongLongAndOverflow(o, &overflow)));
    return overflow == 0;
  }
  if (PyFloat_CheckExact(o)) {
    number('f');
    number(PyFloat_AS_DOUBLE(o));
    return true;
  }
  if (o == Py_None) {
    number('n');
    return true;
  }
  if (!PyBool_Check(o)) return false;
  number(o == Py_True ? '1' : '0');
  return true;
}

// Pointers to the answers of Python to new calls by their keys; null for a call that is not served.
// Used with the GIL held.
template <typename Pointer>
class Memo {
 public:
  // `ask` is called for a new key.
  template <typename Ask>
  Pointer find(const std::string& key, const Ask& ask) {
    auto found = values_.find(key);
    if (found == values_.end()) {
      const std::string kept = key;  // Python may call again
      Pointer value = ask();
      if (values_.size() >= kMost_) values_.clear();
      found = values_.insert_or_assign(kept, std::move(value)).first;
    }
    return found->second;
  }

  void forget() { values_.clear(); }

 private:
  static constexpr size_t kMost_ = 4096;
  std::unordered_map<std::string, Pointer> values_;
};

using Planned = std::shared_ptr<const Plan>;

inline Memo<Planned>& plans() {
  static auto* all = new Memo<Planned>;
  return *all;
}

// The plan of a layer's call. Null where the library does not serve it.
inline Planned planned(
    int64_t rank, const Operands& t, py::handle geometry, py::handle dim, py::handle eps,
    Norm norm, bool channels_last) {
  static thread_local Key key;
  key.clear();
  key.number(static_cast<char>(t.x.scalar_type()));
  key.number(static_cast<char>(t.v.scalar_type()));
  key.number(static_cast<char>(2 * rank + channels_last));
  for (const Tensor* tensor : {&t.x, &t.v, &t.g, &t.bias})
    key.list(tensor->defined() ? tensor->sizes() : at::IntArrayRef{-1});
  key.number(norm);
  if (!key.option(geometry) || !key.option(dim) || !key.option(eps)) return nullptr;
  return plans().find(key.bytes(), [&]() -> Planned {
    const py::object bias = t.bias.defined() ? py::cast(t.bias) : py::none();
    const auto encoded = callbacks().plan(
        rank, py::make_tuple(t.x, t.v, t.g, bias), geometry, dim, eps, channels_last, as_name(norm));
    if (encoded.is_none()) return nullptr;
    return std::make_shared<const Plan>(encoded.cast<Plan::Encoded>());
  });
}

}  // namespace wn_kernels
