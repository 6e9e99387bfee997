// Which calls are served, and how: what is looked at in every call, and what is decided once.
//
// Every call that is not served, a wrong one too, is answered with None, and so left to the rest of
// the package. What shapes and options decide, Python is asked once, and its answer remembered.

#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

namespace wn_kernels {

namespace py = pybind11;
using at::Tensor;
using Sizes = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// --- what is served ----------------------------------------------------------------------------

// Whether nobody sees through the call: no torch.func transform, forward-mode AD, trace, autocast,
// dispatch or function mode.
inline bool is_eager() {
  const auto& included = c10::impl::tls_local_dispatch_key_set().included_;
  return !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0) && !torch::jit::tracer::isTracing() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !c10::impl::dispatch_mode_enabled() &&
         !at::impl::torch_function_mode_enabled();
}

// Of torch's own kind, with memory to read: no transform's wrapper, no lazy negative.
inline bool is_plain(const Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && !t.is_nested() && t.has_storage() &&
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

// A layer's tensors, where they are served.
struct Operands {
  Tensor x, v, g, bias;  // the bias may be undefined

  bool needs_weight_grad() const { return v.requires_grad() || g.requires_grad(); }
  bool needs_grad() const {
    return at::GradMode::is_enabled() && (x.requires_grad() || needs_weight_grad() ||
                                          (bias.defined() && bias.requires_grad()));
  }
};

// A tensor, no subclass.
inline bool is_tensor(py::handle object) { return THPVariable_CheckExact(object.ptr()); }

inline std::optional<Operands> operands(py::handle x, py::handle v, py::handle g, py::handle bias) {
  if (!is_tensor(x) || !is_tensor(v) || !is_tensor(g) || !(bias.is_none() || is_tensor(bias)) ||
      !is_eager())
    return std::nullopt;
  Operands out{THPVariable_Unpack(x.ptr()), THPVariable_Unpack(v.ptr()),
               THPVariable_Unpack(g.ptr()), {}};
  if (!bias.is_none()) out.bias = THPVariable_Unpack(bias.ptr());
  const auto dtype = out.v.scalar_type();
  const auto fits = [&](const Tensor& t) { return t.scalar_type() == dtype && is_plain(t); };
  const bool served = (dtype == at::kFloat || dtype == at::kDouble) && fits(out.x) && fits(out.v) &&
                      fits(out.g) && out.x.numel() > 0 && out.v.numel() > 0 &&
                      out.v.dim() > 0 && out.g.is_contiguous() &&
                      (!out.bias.defined() || (fits(out.bias) && out.bias.is_contiguous()));
  return served ? std::make_optional(std::move(out)) : std::nullopt;
}

// --- what shapes and options decide ------------------------------------------------------------

// Remembers, for what a call was made with, what Python answered: it checks the call, raises what
// is wrong with it, and plans it. Used with the GIL held.
template <typename Value>
class Memo {
 public:
  // The answer for these tensors and options, `ask()` where they are new; nothing, too, where an
  // option is not of the usual kind.
  template <typename Ask>
  std::optional<Value> find(
      const Operands& t, std::initializer_list<py::handle> options, const Ask& ask) {
    key_.assign(1, static_cast<char>(t.v.scalar_type()));
    for (const Tensor* tensor : {&t.x, &t.v, &t.g, &t.bias})
      append_sizes(tensor->defined() ? tensor->sizes() : at::IntArrayRef{-1});
    for (const auto option : options)
      if (!append_option(option)) return std::nullopt;
    auto found = values_.find(key_);
    if (found == values_.end()) {
      const std::string key = key_;  // Python may call again
      auto value = ask();
      if (values_.size() >= kMost_) values_.clear();
      found = values_.insert_or_assign(key, std::move(value)).first;
    }
    return found->second;
  }

  void forget() { values_.clear(); }

 private:
  static constexpr size_t kMost_ = 4096;

  template <typename Number>
  void append(Number number) {
    key_.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void append_sizes(at::IntArrayRef sizes) {
    append(static_cast<int64_t>(sizes.size()));
    for (const int64_t size : sizes) append(size);
  }
  bool append_option(py::handle option) {
    PyObject* o = option.ptr();
    if (PyTuple_CheckExact(o)) {
      key_.push_back('t');
      append(static_cast<int64_t>(PyTuple_GET_SIZE(o)));
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(o); ++i)
        if (!append_option(PyTuple_GET_ITEM(o, i))) return false;
      return true;
    }
    if (PyUnicode_CheckExact(o)) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(o, &size);
      if (!text) throw py::error_already_set();
      key_.push_back('s');
      append(static_cast<int64_t>(size));
      key_.append(text, size);
      return true;
    }
    if (PyLong_CheckExact(o)) {
      key_.push_back('i');
      int overflow = 0;
      append(static_cast<int64_t>(PyLong_AsLongLongAndOverflow(o, &overflow)));
      return overflow == 0;
    }
    if (PyFloat_CheckExact(o)) {
      key_.push_back('f');
      append(PyFloat_AS_DOUBLE(o));
      return true;
    }
    if (!PyBool_Check(o)) return false;
    key_.push_back(o == Py_True ? '1' : '0');
    return true;
  }

  std::string key_;
  std::unordered_map<std::string, std::optional<Value>> values_;
};

// How a layer is served in a direction: with a W that is formed, with the scale of a side, late, or
// as a product with the unfolded input.
enum class Variant { materialize, late, unfold };

// How a layer is served: the variant of each direction, and whether the forward keeps the product
// x Vᵀ, or a convolution's W, for the backward.
struct Path {
  using Flags = std::tuple<int, int, bool>;  // as Python gives it
  explicit Path(const Flags& flags)
      : forward(static_cast<Variant>(std::get<0>(flags))),
        backward(static_cast<Variant>(std::get<1>(flags))), keeps(std::get<2>(flags)) {}

  Variant forward, backward;
  bool keeps;
};

// What torch.convolution takes after the bias.
struct Geometry {
  Sizes stride, padding, dilation;
  bool transposed;
  Sizes output_padding;
  int64_t groups;

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

// What of Python's this library calls. Never destroyed: the interpreter may be gone before.
struct Callbacks {
  py::object plan_linear, plan_convolution;  // of the call's shapes and options
  py::object second_order;  // (dY, x, v, g, dim, geometry, eps, needs) -> (dX, dV, dg)
};

inline Callbacks& callbacks() {
  static auto* all = new Callbacks;
  return *all;
}

}  // namespace wn_kernels
