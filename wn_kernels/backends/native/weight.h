// The weight itself: its norms, W, its gradients, and W as a node of the graph.
//
//   n_j = ||V_j||   s = g / n   W = s V   dg_j = <dW_j, V_j> / n_j   dV = s dW - c V,  c = s dg / n

#pragma once

#include <tuple>
#include <utility>

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "call.h"
#include "rows.h"

namespace wn_kernels {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// n, or nothing where a norm is out of range.
inline MaybeTensor norms(const Tensor& v, const Tensor& g, double eps) {
  Tensor n = at::empty_like(g);
  bool in_range = true;
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "norms", [&] {
    const auto* rows = v.const_data_ptr<scalar_t>();
    const int64_t length = v.numel() / v.size(0);
    Norms<scalar_t> all(n.mutable_data_ptr<scalar_t>(), eps);
    for_each(v.size(0), length, [&](int64_t j) {
      const auto* row = rows + j * length;
      all.set(j, dot(row, row, length), row, length);
    });
    in_range = all.in_range();
  });
  return in_range ? MaybeTensor(n) : std::nullopt;
}

// W from n.
inline Tensor scaled_weight(const Tensor& v, const Tensor& g, const Tensor& n) {
  Tensor w = at::empty_like(v);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "scaled_weight", [&] {
    const auto *rows = v.const_data_ptr<scalar_t>(), *gs = g.const_data_ptr<scalar_t>(),
               *ns = n.const_data_ptr<scalar_t>();
    auto* out = w.mutable_data_ptr<scalar_t>();
    const int64_t length = v.numel() / v.size(0);
    for_each(v.size(0), length, [&](int64_t j) {
      scale(out + j * length, rows + j * length, gs[j] / ns[j], length);
    });
  });
  return w;
}

// (W, n) with one read of V from memory; nothing where a norm is out of range.
inline std::optional<std::pair<Tensor, Tensor>> weight(
    const Tensor& v, const Tensor& g, double eps) {
  Tensor w = at::empty_like(v), n = at::empty_like(g);
  bool in_range = true;
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "weight", [&] {
    const auto *rows = v.const_data_ptr<scalar_t>(), *gs = g.const_data_ptr<scalar_t>();
    auto* out = w.mutable_data_ptr<scalar_t>();
    const int64_t length = v.numel() / v.size(0);
    Norms<scalar_t> all(n.mutable_data_ptr<scalar_t>(), eps);
    for_each(v.size(0), length, [&](int64_t j) {
      const auto* row = rows + j * length;
      const scalar_t norm = all.set(j, dot(row, row, length), row, length);
      scale(out + j * length, row, gs[j] / norm, length);
    });
    in_range = all.in_range();
  });
  if (!in_range) return std::nullopt;
  return std::make_pair(w, n);
}

// (dV, dg) from dW, in its place if it may be overwritten.
inline std::pair<Tensor, Tensor> weight_grads(
    const Tensor& grad, const Tensor& v, const Tensor& g, const Tensor& n, double eps,
    bool overwrite) {
  Tensor dw = grad;
  if (dw.strides() != v.strides()) {
    dw = at::empty_like(v).copy_(grad);
    overwrite = true;
  }
  Tensor dv = overwrite ? dw : at::empty_like(v), dg = at::empty_like(g);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "weight_grads", [&] {
    const auto *dws = dw.const_data_ptr<scalar_t>(), *rows = v.const_data_ptr<scalar_t>(),
               *gs = g.const_data_ptr<scalar_t>(), *ns = n.const_data_ptr<scalar_t>();
    auto *dvs = dv.mutable_data_ptr<scalar_t>(), *dgs = dg.mutable_data_ptr<scalar_t>();
    const int64_t length = v.numel() / v.size(0);
    for_each(v.size(0), length, [&](int64_t j) {
      const int64_t at = j * length;
      dgs[j] = weight_grad(dvs + at, dws + at, rows + at, gs[j], ns[j], eps, length);
    });
  });
  return {dv, dg};
}

// --- second derivatives ------------------------------------------------------------------------

// Where the gradient is itself differentiated, or is one of a batch.
inline bool goes_to_composite(const Tensor& dy) {
  return at::GradMode::is_enabled() || !is_plain(dy);
}

inline variable_list composite_grads(
    const Tensor& dy, const MaybeTensor& x, const Tensor& v, const Tensor& g,
    const std::optional<Geometry>& conv, double eps, const std::vector<bool>& needs) {
  py::gil_scoped_acquire gil;
  py::object geometry = py::none();
  if (conv)
    geometry = py::make_tuple(
        conv->stride, conv->padding, conv->dilation, conv->transposed, conv->output_padding,
        conv->groups);
  const auto grads = callbacks().second_order(dy, x, v, g, geometry, eps, needs);
  variable_list out;
  for (auto& grad : grads.cast<std::vector<MaybeTensor>>()) out.push_back(grad.value_or(Tensor()));
  return out;
}

// --- weight_norm -------------------------------------------------------------------------------

struct WeightNorm : Function<WeightNorm> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& v, const Tensor& g,
      const std::pair<Tensor, Tensor>& result, double eps) {
    ctx->save_for_backward({v, g, result.second});
    ctx->saved_data["eps"] = eps;
    return result.first;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &v = saved[0], &g = saved[1], &n = saved[2];
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool needs_v = ctx->needs_input_grad(0), needs_g = ctx->needs_input_grad(1);
    if (goes_to_composite(grads[0])) {
      auto out = composite_grads(
          grads[0], std::nullopt, v, g, std::nullopt, eps, {false, needs_v, needs_g});
      return {out[1], out[2], Tensor(), Tensor()};
    }
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dv, dg] = weight_grads(grads[0], v, g, n, eps, false);
    return {dv, dg, Tensor(), Tensor()};
  }
};

inline MaybeTensor weight_norm(py::handle v, py::handle g, py::handle dim, py::handle eps) {
  const auto t = operands(v, v, g, py::none());
  if (!t || !PyLong_CheckExact(dim.ptr()) || !PyFloat_CheckExact(eps.ptr())) return std::nullopt;
  int overflow = 0;
  const long axis = PyLong_AsLongAndOverflow(dim.ptr(), &overflow);  // -1 where it overflows
  if (axis != 0 && (axis != -t->v.dim() || axis == -1)) return std::nullopt;
  const double least = PyFloat_AS_DOUBLE(eps.ptr());
  const bool fits = t->g.numel() == t->v.size(0) && t->g.dim() > 0 &&
                    t->g.size(0) == t->v.size(0) &&
                    (t->g.dim() == 1 || t->g.dim() == t->v.dim());
  if (!fits || !(least >= 0 && std::isfinite(least))) return std::nullopt;
  py::gil_scoped_release released;
  std::optional<std::pair<Tensor, Tensor>> result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = weight(t->v, t->g, least);
  }
  if (!result) return std::nullopt;
  if (!t->needs_grad()) return result->first;
  return WeightNorm::apply(t->v, t->g, *result, least);
}

}  // namespace wn_kernels
