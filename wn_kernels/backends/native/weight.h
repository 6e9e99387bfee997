// This file computes the norms of the weight, W and its gradients, and makes W a node of the graph.
//
//   n_j = ||V_j||   s = g / n   W = s V   dg_j = <dW_j, V_j> / n_j   dV = s dW - c V,  c = s dg / n
//
// A backward that is itself differentiated is recorded as PyTorch's own products with W, and as
// (dV, dg) of dW. That W is a second output of the layer's node, so that its gradient is added to the
// node's own dW before dV and dg are computed. backends/reference.py has the formula of their own
// backward.

#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "call.h"
#include "columns.h"
#include "rows.h"

namespace wn_kernels {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Describes how the passes below read V. It follows from the shape of g.
struct Extents {
  Extents(const Tensor& v, const Tensor& g) : count(g.numel()), length(v.numel() / count) {
    if (g.dim() > 0 && count == v.size(0) && g.size(0) == count) {
      axis = 0;
      return;
    }
    columns = true;
    if (count == 1) {  // one slice is the whole of V; a few of its last dimensions form a row
      for (int64_t d = v.dim() - 1; d >= 0 && of.inner < kFewColumns; --d) of.inner *= v.size(d);
    } else {
      axis = v.dim() - 1;
      while (axis > 0 && g.size(axis) == 1) of.inner *= v.size(axis--);
    }
    of.count = count;
    of.rows = v.numel() / of.width();
    of.widen();
  }

  bool columns = false;  // false if the slices are rows
  int64_t axis = -1;     // the slices lie along this axis; -1 if one slice is the whole of V
  int64_t count, length;
  Columns of;
};

// Returns whether the slices of V have a memory layout that the passes can read.
inline bool has_slices(const Tensor& v, const Tensor& g) {
  const bool flat = g.dim() != v.dim() && g.dim() != 0;
  if (g.numel() == 0 || (flat && g.numel() != v.size(0))) return false;
  const Extents e(v, g);
  if (!e.columns) return has_rows(v);
  return v.is_contiguous() && (e.axis < 0 || v.size(e.axis) == e.count) &&
         e.of.width() >= kFewColumns && e.of.width() <= kManyColumns;
}

// Returns the dtype of the norms of V.
inline at::ScalarType wide_dtype(const Tensor& v) {
  return v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Returns the dtype of W and of the products with it, for an input x.
inline at::ScalarType product_dtype(Variant variant, const Tensor& x, const Tensor& v) {
  const bool wide = variant == Variant::widen || variant == Variant::own;
  return wide ? wide_dtype(v) : x.scalar_type();
}

inline bool forms_weight(Variant variant) {
  return variant == Variant::materialize || variant == Variant::widen;
}

// Returns memory for numbers of this dtype, laid out as those of a dense tensor. No dispatcher runs.
inline Tensor empty_as(const Tensor& t, at::ScalarType dtype) {
  return Tensor(at::detail::empty_strided_cpu(t.sizes(), t.strides(), dtype));
}

inline Tensor empty_as(const Tensor& t) { return empty_as(t, t.scalar_type()); }

// A W of at most this many bytes may have memory that is kept for the next one.
constexpr int64_t kPassingBytes = 1 << 21;

// Returns memory for a W in this dtype that its caller alone uses, and only until it returns. A small
// one has the same memory in every call of a thread. Otherwise W would leave a hole in the heap, which
// small tensors then break up.
inline Tensor passing_weight(const Tensor& v, at::ScalarType dtype) {
  static thread_local Tensor memory;
  const int64_t bytes = v.numel() * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes > kPassingBytes) return empty_as(v, dtype);
  if (!memory.defined() || memory.numel() < bytes || memory.storage().use_count() > 1)
    memory = Tensor(at::detail::empty_cpu({bytes}, at::kByte));
  const Tensor w = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(memory.storage()), memory.key_set(), c10::scalarTypeToTypeMeta(dtype));
  w.unsafeGetTensorImpl()->set_sizes_and_strides(v.sizes(), v.strides());
  return w;
}

// Returns memory for the norms.
inline Tensor empty_norms(const Tensor& v, const Tensor& g) {
  return empty_as(g, wide_dtype(v));
}

// Returns n, or nothing if a norm is out of range.
inline MaybeTensor norms(const Tensor& v, const Tensor& g, double eps) {
  const Extents e(v, g);
  Tensor n = empty_norms(v, g);
  bool in_range = true;
  with_dtype(v.scalar_type(), [&](auto number) {
    using V = decltype(number);
    const auto* vs = v.const_data_ptr<V>();
    Norms<Wide<V>> all(n.mutable_data_ptr<Wide<V>>(), eps);
    if (e.columns) {
      all.set_all(column_dots(vs, vs, e.of), [&](int64_t j) { return is_zero(vs, j, e.of); });
    } else {
      for_each(e.count, e.length, [&](int64_t j) {
        const auto* row = vs + j * e.length;
        all.set(j, dot(row, row, e.length), row, e.length);
      });
    }
    in_range = all.in_range();
  });
  return in_range ? MaybeTensor(n) : std::nullopt;
}

// Computes W from n, in its memory, which it returns.
inline Tensor scaled_weight(Tensor w, const Tensor& v, const Tensor& g, const Tensor& n) {
  const Extents e(v, g);
  with_dtypes(w.scalar_type(), v.scalar_type(), [&](auto to, auto from) {
    using W = decltype(to);
    using V = decltype(from);
    using T = Wide<V>;
    const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
    const auto* ns = n.const_data_ptr<T>();
    auto* ws = w.mutable_data_ptr<W>();
    const auto s = [=](int64_t j) { return static_cast<T>(gs[j]) / ns[j]; };
    if (e.columns) {
      const int64_t width = e.of.width();
      const auto all = spread<T>(e.of, s);
      const T* scales = all.data();
      for_each(e.of.rows, width, [=](int64_t i) {
        const int64_t at = i * width;
        for_each_vector<T>(width, [=](int64_t j, auto count) {
          store(ws + at + j, load(scales + j, count) * load(vs + at + j, count), count);
        });
      });
    } else {
      for_each(e.count, e.length, [&](int64_t j) {
        scale(ws + j * e.length, vs + j * e.length, s(j), e.length);
      });
    }
  });
  return w;
}

// Computes the rows of W and n from `begin` to `end`. Every row of V is read from memory once. Returns
// whether all norms are in range.
inline bool weight_rows(
    const Tensor& w, const Tensor& n, const Tensor& v, const Tensor& g, double eps, int64_t begin,
    int64_t end) {
  const int64_t length = v.numel() / n.numel();
  bool in_range = true;
  with_dtypes(w.scalar_type(), v.scalar_type(), [&](auto to, auto from) {
    using W = decltype(to);
    using V = decltype(from);
    using T = Wide<V>;
    const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
    auto* ws = w.mutable_data_ptr<W>();
    Norms<T> all(n.mutable_data_ptr<T>(), eps);
    for (int64_t j = begin; j < end; ++j) {
      const auto* row = vs + j * length;
      const T norm = all.set(j, dot(row, row, length), row, length);
      scale(ws + j * length, row, static_cast<T>(gs[j]) / norm, length);
    }
    in_range = all.in_range();
  });
  return in_range;
}

// Computes W in its memory. Returns it and n, or nothing if a norm is out of range. If slices are
// rows, V is read from memory once.
inline std::optional<std::pair<Tensor, Tensor>> weight(
    const Tensor& w, const Tensor& v, const Tensor& g, double eps) {
  const Extents e(v, g);
  if (e.columns) {
    const auto n = norms(v, g, eps);
    if (!n) return std::nullopt;
    return std::make_pair(scaled_weight(w, v, g, *n), *n);
  }
  auto result = std::make_pair(w, empty_norms(v, g));
  std::atomic<bool> in_range{true};
  at::parallel_for(0, e.count, grain(e.length), [&](int64_t begin, int64_t end) {
    if (!weight_rows(result.first, result.second, v, g, eps, begin, end)) in_range = false;
  });
  if (!in_range) return std::nullopt;
  return result;
}

// Computes the rows of dV and dg from `begin` to `end`. dV may be dW.
inline void weight_grad_rows(
    const Tensor& dv, const Tensor& dg, const Tensor& dw, const Tensor& v, const Tensor& g,
    const Tensor& n, double eps, int64_t begin, int64_t end) {
  const int64_t length = v.numel() / n.numel();
  with_dtypes(dw.scalar_type(), v.scalar_type(), [&](auto of_dw, auto of_v) {
    using W = decltype(of_dw);
    using V = decltype(of_v);
    const auto* dws = dw.const_data_ptr<W>();
    const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
    const auto* ns = n.const_data_ptr<Wide<V>>();
    auto *dvs = dv.mutable_data_ptr<V>(), *dgs = dg.mutable_data_ptr<V>();
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = j * length;
      dgs[j] =
          static_cast<V>(weight_grad(dvs + at, dws + at, vs + at, gs[j], ns[j], eps, length));
    }
  });
}

// Returns dW in the memory layout of V, and memory for (dV, dg). dV takes the memory of dW if
// `overwrite` is true, or dW was copied, and the dtypes are the same.
inline std::tuple<Tensor, Tensor, Tensor> empty_weight_grads(
    const Tensor& grad, const Tensor& v, const Tensor& g, bool overwrite) {
  Tensor dw = grad;
  if (dw.strides() != v.strides()) {
    dw = at::empty_like(v, v.options().dtype(grad.scalar_type())).copy_(grad);
    overwrite = true;
  }
  overwrite = overwrite && dw.scalar_type() == v.scalar_type();
  return {dw, overwrite ? dw : empty_as(v), empty_as(g)};
}

// Computes (dV, dg), in the dtype of V, from dW. dV takes the memory of dW if `overwrite` is true
// and the dtypes are the same.
inline std::pair<Tensor, Tensor> weight_grads(
    const Tensor& grad, const Tensor& v, const Tensor& g, const Tensor& n, double eps,
    bool overwrite) {
  const Extents e(v, g);
  const auto [dw, dv, dg] = empty_weight_grads(grad, v, g, overwrite);
  if (!e.columns) {
    const auto grad_rows = [&, &dw = dw, &dv = dv, &dg = dg](int64_t begin, int64_t end) {
      weight_grad_rows(dv, dg, dw, v, g, n, eps, begin, end);
    };
    at::parallel_for(0, e.count, grain(e.length), grad_rows);
    return {dv, dg};
  }
  with_dtypes(dw.scalar_type(), v.scalar_type(), [&, &dw = dw, &dv = dv, &dg = dg](
                                                     auto of_dw, auto of_v) {
    using W = decltype(of_dw);
    using V = decltype(of_v);
    using T = Wide<V>;
    const auto* dws = dw.const_data_ptr<W>();
    const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
    const auto* ns = n.const_data_ptr<T>();
    auto *dvs = dv.mutable_data_ptr<V>(), *dgs = dg.mutable_data_ptr<V>();
    const auto dots = column_dots(dws, vs, e.of);
    const auto slope = [&](int64_t j) { return Slope<T>(dots[j], gs[j], ns[j], eps); };
    for (int64_t j = 0; j < e.count; ++j) dgs[j] = static_cast<V>(slope(j).dg);
    const auto s = spread<T>(e.of, [&](int64_t j) { return slope(j).s; }),
               c = spread<T>(e.of, [&](int64_t j) { return slope(j).c; });
    const int64_t width = e.of.width();
    const T *ss = s.data(), *cs = c.data();
    for_each(e.of.rows, width, [=](int64_t i) {
      const int64_t at = i * width;
      for_each_vector<T>(width, [=](int64_t j, auto count) {
        const auto scaled = load(ss + j, count) * load(dws + at + j, count);
        store(dvs + at + j, scaled - load(cs + j, count) * load(vs + at + j, count), count);
      });
    });
  });
  return {dv, dg};
}

// The factors in the backward of (dV_j, dg_j), from the dots of dW_j, V_j and ddV_j.
template <typename T>
struct Bend {
  Bend(double dw_v, double ddv_v, double ddv_dw, T ddg, T g, T n, double eps) : s(g / n) {
    const bool clamped = eps > 0 && n <= static_cast<T>(eps);  // then the norm is a constant
    const T dg = clamped ? T(0) : static_cast<T>(dw_v) / n,
            b = clamped ? T(0) : static_cast<T>(ddv_v) / n, t = static_cast<T>(ddv_dw);
    c = s * dg / n;
    e = (ddg - s * b) / n;
    f = clamped ? T(0) : (s * (t - 3 * b * dg) + ddg * dg) / n / n;
    to_g = (t - b * dg) / n;
  }

  T s, c, e, f, to_g;
};

// Computes the gradients of weight_grads() with respect to dW, V and g. If slices are rows, each of
// the three tensors is read from memory once.
inline std::array<Tensor, 3> weight_grads_backward(
    const Tensor& ddv_given, const Tensor& ddg, const Tensor& dw_given, const Tensor& v,
    const Tensor& g, const Tensor& n, double eps) {
  const Extents e(v, g);
  const auto laid_out = [&](const Tensor& t) {
    return t.strides() == v.strides() ? t : at::empty_like(v).copy_(t);
  };
  const Tensor ddv = laid_out(ddv_given), dw = laid_out(dw_given), flat = ddg.contiguous(),
               to_dw = at::empty_like(v), to_v = at::empty_like(v), to_g = at::empty_like(g);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "weight_grads_backward", [&] {
    using T = scalar_t;
    const auto *ps = ddv.const_data_ptr<T>(), *ws = dw.const_data_ptr<T>(),
               *vs = v.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(),
               *ns = n.const_data_ptr<T>(), *qs = flat.const_data_ptr<T>();
    auto *to_ws = to_dw.mutable_data_ptr<T>(), *to_vs = to_v.mutable_data_ptr<T>(),
         *to_gs = to_g.mutable_data_ptr<T>();
    if (e.columns) {
      const auto dw_v = column_dots(ws, vs, e.of), ddv_v = column_dots(ps, vs, e.of),
                 ddv_dw = column_dots(ps, ws, e.of);
      const auto bend = [&](int64_t j) {
        return Bend<T>(dw_v[j], ddv_v[j], ddv_dw[j], qs[j], gs[j], ns[j], eps);
      };
      for (int64_t j = 0; j < e.count; ++j) to_gs[j] = bend(j).to_g;
      const auto each = [&](T Bend<T>::*factor) {
        return spread<T>(e.of, [&](int64_t j) { return bend(j).*factor; });
      };
      const auto s = each(&Bend<T>::s), c = each(&Bend<T>::c), es = each(&Bend<T>::e),
                 f = each(&Bend<T>::f);
      const int64_t width = e.of.width();
      for_each(e.of.rows, width, [&](int64_t row) {
        const int64_t at = row * width;
        for (int64_t j = 0; j < width; ++j) {
          to_ws[at + j] = s[j] * ps[at + j] + es[j] * vs[at + j];
          to_vs[at + j] = es[j] * ws[at + j] - c[j] * ps[at + j] - f[j] * vs[at + j];
        }
      });
    } else {
      for_each(e.count, e.length, [&](int64_t j) {
        const int64_t at = j * e.length;
        const T *p = ps + at, *w = ws + at, *row = vs + at;
        const auto dots = sums<T, 3>(e.length, [=](int64_t i, auto count) {
          const Vector<T> of_w = load(w + i, count), of_v = load(row + i, count),
                          of_p = load(p + i, count);
          return std::array<Vector<T>, 3>{of_w * of_v, of_p * of_v, of_p * of_w};
        });
        const Bend<T> bend(dots[0], dots[1], dots[2], qs[j], gs[j], ns[j], eps);
        to_gs[j] = bend.to_g;
        for (int64_t i = 0; i < e.length; ++i) {
          to_ws[at + i] = bend.s * p[i] + bend.e * row[i];
          to_vs[at + i] = bend.e * w[i] - bend.c * p[i] - bend.f * row[i];
        }
      });
    }
  });
  return {to_dw, to_v, to_g};
}

// --- nodes -------------------------------------------------------------------------------------

// Returns a new node in what holds one: a shared_ptr or an intrusive_ptr, by the version of torch.
template <
    typename N, typename Pointer = decltype(torch::autograd::Edge::function),
    typename... Arguments>
auto make_node(const Arguments&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<N>(new N(arguments...), [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>(arguments...);
}

// --- second derivatives ------------------------------------------------------------------------

// The dimension that Python calls `dim`. -1 is the whole of V.
inline py::object as_dim(int64_t axis) {
  return axis < 0 ? py::object(py::none()) : py::int_(axis);
}

inline variable_list as_variables(const py::object& grads) {
  variable_list out;
  for (auto& grad : grads.cast<std::vector<MaybeTensor>>()) out.push_back(grad.value_or(Tensor()));
  return out;
}

// (dX, dV, dg) by operations of ATen, for a batch of gradients, which the passes cannot read. Either of
// dY, which is W's without x, and dW may be undefined.
inline variable_list composite_grads(
    const Tensor& dy, const Tensor& dw, const Tensor& x, const Tensor& v, const Tensor& g,
    const std::optional<Geometry>& conv, double eps, const std::vector<bool>& needs) {
  py::gil_scoped_acquire gil;
  py::object geometry = py::none();
  if (conv)
    geometry = py::make_tuple(
        conv->stride, conv->padding, conv->dilation, conv->transposed, conv->output_padding,
        conv->groups);
  return as_variables(callbacks().differentiable_grads(
      maybe(dy), maybe(dw), maybe(x), v, g, geometry, as_dim(Extents(v, g).axis), eps, needs));
}

// (dV, dg), which a pass has computed, as a function of dW, V and g.
struct WeightGrads : Function<WeightGrads> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& dw, const Tensor& v, const Tensor& g, const Tensor& n,
      const std::pair<Tensor, Tensor>& result, int64_t axis, double eps) {
    ctx->save_for_backward({dw, v, g, n});
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["eps"] = eps;
    return {result.first, result.second};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &ddv = grads[0], &ddg = grads[1], &dw = saved[0], &v = saved[1], &g = saved[2],
               &n = saved[3];
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool again = at::GradMode::is_enabled();
    const auto fits = [&](const Tensor& t) {
      return is_plain(t) && t.scalar_type() == v.scalar_type();
    };
    const bool readable = (v.scalar_type() == at::kFloat || v.scalar_type() == at::kDouble) &&
                          fits(ddv) && fits(ddg) && fits(dw) && fits(g) && has_slices(v, g);
    variable_list out;
    if (again || !readable) {
      py::gil_scoped_acquire gil;
      out = as_variables(callbacks().weight_grads_backward(
          ddv, ddg, dw, v, g, again ? py::none() : py::cast(n),
          as_dim(ctx->saved_data["axis"].toInt()), eps));
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      const auto found = weight_grads_backward(ddv, ddg, dw, v, g, n, eps);
      out.assign(found.begin(), found.end());
    }
    out.resize(7);
    return out;
  }
};

// The same by the pass of this file. A dW that is narrower than V is converted first.
inline variable_list recorded_weight_grads(
    const Tensor& grad, const Tensor& v, const Tensor& g, const Tensor& n, double eps) {
  const Tensor dw = as(grad, at::promote_types(grad.scalar_type(), v.scalar_type()));
  std::pair<Tensor, Tensor> result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::NoGradGuard no_grad;
    result = weight_grads(dw, v, g, n, eps, false);
  }
  return WeightGrads::apply(dw, v, g, n, result, Extents(v, g).axis, eps);
}

// The gradients of a layer's node: dY, and that of the W which a recorded backward makes an output of
// the node. Either may be undefined.
struct LayerGrads {
  explicit LayerGrads(const variable_list& grads) : dy(grads[0]), dw(grads[1]) {}

  bool are_undefined() const { return !dy.defined() && !dw.defined(); }
  bool are_plain(at::DeviceType device = at::kCPU) const {
    return (!dy.defined() || is_plain(dy, device)) && (!dw.defined() || is_plain(dw, device));
  }
  // Adds dW, which has the dtype of V, to the dW of dY, which may be undefined. The sum is taken in
  // place, or in the wider of two dtypes.
  Tensor total(const Tensor& own) const {
    if (!dw.defined()) return own;
    if (!own.defined()) return dw;
    const bool apart = at::GradMode::is_enabled() || own.scalar_type() != dw.scalar_type();
    return apart ? own + dw : own.add_(dw);
  }

  Tensor dy, dw;
};

// Returns y, whose node gets the second gradient.
inline Tensor with_weight_grad(Tensor y, const Tensor& v) {
  y.grad_fn()->add_input_metadata(v);
  return y;
}

// Returns W, which becomes an output of the node whose backward is running.
inline Tensor recorded_weight(const Tensor& w, const Tensor& v, const Tensor& g) {
  if (v.requires_grad() || g.requires_grad())
    torch::autograd::impl::set_gradient_edge(w, {torch::autograd::get_current_node(), 1});
  return w;
}

// `(*, K)` as `(M, K)`.
inline Tensor as_rows(const Tensor& x) {
  if (x.dim() == 2) return x;
  return x.dim() > 2 ? x.flatten(0, -2) : x.unsqueeze(0);
}

// Returns the gradient of a bias along dimension `channel` of dY, in this dtype or that of dY.
inline Tensor bias_grad(
    const Tensor& dy, int64_t channel, std::optional<at::ScalarType> dtype = std::nullopt) {
  Sizes others;
  for (int64_t i = 0; i < dy.dim(); ++i)
    if (i != channel) others.push_back(i);
  return others.empty() ? as(dy, dtype.value_or(dy.scalar_type())) : dy.sum(others, false, dtype);
}

// --- weight_norm -------------------------------------------------------------------------------

// The node of W. It is one of PyTorch's own kind, since `Function` would take longer than the passes over a
// small weight.
class WeightNorm : public torch::autograd::Node {
 public:
  // Returns W as this node's output.
  static Tensor apply(
      const Tensor& v, const Tensor& g, std::pair<Tensor, Tensor> result, double eps) {
    auto& [w, n] = result;
    const auto node = make_node<WeightNorm>(v, g, n, eps);
    node->set_next_edges(torch::autograd::collect_next_edges(v, g));
    torch::autograd::set_history(w, node);
    return w;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor &dw = grads[0], v = v_.unpack(), g = g_.unpack(), n = n_.unpack();
    if (!dw.defined()) return variable_list(2);
    if (!is_plain(dw)) {
      auto out = composite_grads(
          dw, {}, {}, v, g, std::nullopt, eps_,
          {false, task_should_compute_output(0), task_should_compute_output(1)});
      return {out[1], out[2]};
    }
    if (at::GradMode::is_enabled()) return recorded_weight_grads(dw, v, g, n, eps_);
    const BelowAutograd below;
    auto [dv, dg] = weight_grads(dw, v, g, n, eps_, false);
    return {dv, dg};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&v_, &g_, &n_}) saved->reset_data();
  }

  std::string name() const override { return "wn_kernels::WeightNorm"; }

  WeightNorm(const Tensor& v, const Tensor& g, const Tensor& n, double eps)
      : v_(v, false), g_(g, false), n_(n, false), eps_(eps) {}

 private:
  torch::autograd::SavedVariable v_, g_, n_;
  double eps_;
};

// Returns the axis that `dim` names, or -1 for the whole of V. Returns nothing if `dim` is invalid.
inline std::optional<int64_t> axis_of(py::handle dim, int64_t ndim) {
  if (dim.is_none()) return -1;
  if (!PyLong_CheckExact(dim.ptr())) return std::nullopt;
  int overflow = 0;
  const int64_t number = PyLong_AsLongAndOverflow(dim.ptr(), &overflow);
  const int64_t axis = number < -1 ? number + ndim : number;
  const bool known = overflow == 0 && number >= -ndim && axis < ndim;
  return known ? std::make_optional(axis) : std::nullopt;
}

// Returns the operands of a weight alone. Returns nothing if they are not served.
inline std::optional<Operands> weight_operands(
    py::handle v, py::handle g, py::handle dim, py::handle eps) {
  auto t = operands(v, v, g, py::none());
  if (!t || !PyFloat_CheckExact(eps.ptr())) return std::nullopt;
  const auto axis = axis_of(dim, t->v.dim());
  const double least = PyFloat_AS_DOUBLE(eps.ptr());
  // g has to be flat, or of the shape that dim implies. has_slices checks the rest.
  const auto fits = [&](const Tensor& scales) {
    if (*axis < 0 || scales.dim() == 0) return *axis < 0 && scales.dim() == 0;
    const bool shaped = scales.dim() == t->v.dim() && scales.size(*axis) == scales.numel();
    return scales.numel() == t->v.size(*axis) && (shaped || (scales.dim() == 1 && *axis == 0));
  };
  if (!axis || !fits(t->g) || !has_slices(t->v, t->g) || !(least >= 0 && std::isfinite(least)))
    return std::nullopt;
  return t;
}

inline MaybeTensor weight_norm(py::handle v, py::handle g, py::handle dim, py::handle eps) {
  const auto t = weight_operands(v, g, dim, eps);
  if (!t) return std::nullopt;
  const double least = PyFloat_AS_DOUBLE(eps.ptr());
  py::gil_scoped_release released;
  std::optional<std::pair<Tensor, Tensor>> result;
  {
    const BelowAutograd below;
    result = weight(empty_as(t->v, t->v.scalar_type()), t->v, t->g, least);
  }
  if (!result) return std::nullopt;
  if (!t->needs_grad()) return result->first;
  return WeightNorm::apply(t->v, t->g, *std::move(result), least);
}

}  // namespace wn_kernels
