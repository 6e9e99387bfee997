// This file makes W and its gradients nodes of the graph.
//
// A backward that is itself differentiated is recorded as PyTorch's own products with W, and as
// (dV, dg) of dW. That W is a second output of the layer's node, so that its gradient is added to the
// node's own dW before dV and dg are computed.

#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "bend.h"

namespace wn_kernels {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

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

// The options of a norm in what a `Function` saves. Every entry costs it time, so that l2, which most
// calls take, has none.
inline void save(AutogradContext* ctx, const NormOptions& options) {
  ctx->saved_data["eps"] = options.eps;
  if (options.norm != Norm::l2) ctx->saved_data["norm"] = static_cast<int64_t>(options.norm);
}
inline NormOptions saved_options(AutogradContext* ctx) {
  const auto norm = ctx->saved_data.find("norm");
  return {
      ctx->saved_data["eps"].toDouble(), norm == ctx->saved_data.end()
          ? Norm::l2
          : static_cast<Norm>(norm->second.toInt())};
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
    const std::optional<Geometry>& conv, const NormOptions& options,
    const std::vector<bool>& needs) {
  py::gil_scoped_acquire gil;
  py::object geometry = py::none();
  if (conv)
    geometry = py::make_tuple(
        conv->stride, conv->padding, conv->dilation, conv->transposed, conv->output_padding,
        conv->groups);
  return as_variables(callbacks().differentiable_grads(
      maybe(dy), maybe(dw), maybe(x), v, g, geometry, as_dim(Extents(v, g).axis), options.eps, needs,
      as_name(options.norm)));
}

// (dV, dg), which a pass has computed, as a function of dW, V and g.
struct WeightGrads : Function<WeightGrads> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& dw, const Tensor& v, const Tensor& g, const Tensor& n,
      const std::pair<Tensor, Tensor>& result, int64_t axis, const NormOptions& options) {
    ctx->save_for_backward({dw, v, g, n});
    ctx->saved_data["axis"] = axis;
    save(ctx, options);
    return {result.first, result.second};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &ddv = grads[0], &ddg = grads[1], &dw = saved[0], &v = saved[1], &g = saved[2],
               &n = saved[3];
    const NormOptions options = saved_options(ctx);
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
          as_dim(ctx->saved_data["axis"].toInt()), options.eps, as_name(options.norm)));
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      const auto found = weight_grads_backward(ddv, ddg, dw, v, g, n, options);
      out.assign(found.begin(), found.end());
    }
    out.resize(7);
    return out;
  }
};

// The same by the pass of this file. A dW that is narrower than V is converted first.
inline variable_list recorded_weight_grads(
    const Tensor& grad, const Tensor& v, const Tensor& g, const Tensor& n,
    const NormOptions& options) {
  const Tensor dw = as(grad, at::promote_types(grad.scalar_type(), v.scalar_type()));
  std::pair<Tensor, Tensor> result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::NoGradGuard no_grad;
    result = weight_grads(dw, v, g, n, options, false);
  }
  return WeightGrads::apply(dw, v, g, n, result, Extents(v, g).axis, options);
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
      const Tensor& v, const Tensor& g, std::pair<Tensor, Tensor> result,
      const NormOptions& options) {
    auto& [w, n] = result;
    const auto node = make_node<WeightNorm>(v, g, n, options);
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
          dw, {}, {}, v, g, std::nullopt, options_,
          {false, task_should_compute_output(0), task_should_compute_output(1)});
      return {out[1], out[2]};
    }
    if (at::GradMode::is_enabled()) return recorded_weight_grads(dw, v, g, n, options_);
    const BelowAutograd below;
    auto [dv, dg] = weight_grads(dw, v, g, n, options_, false);
    return {dv, dg};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&v_, &g_, &n_}) saved->reset_data();
  }

  std::string name() const override { return "wn_kernels::WeightNorm"; }

  WeightNorm(const Tensor& v, const Tensor& g, const Tensor& n, const NormOptions& options)
      : v_(v, false), g_(g, false), n_(n, false), options_(options) {}

 private:
  torch::autograd::SavedVariable v_, g_, n_;
  NormOptions options_;
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

// The operands of a weight alone, and its norm.
struct WeightOperands : Operands {
  NormOptions options;
};

// Returns the operands of a weight alone. Returns nothing if they are not served.
inline std::optional<WeightOperands> weight_operands(
    py::handle v, py::handle g, py::handle dim, py::handle eps, py::handle norm) {
  auto t = operands(v, v, g, py::none());
  if (!t || !PyFloat_CheckExact(eps.ptr())) return std::nullopt;
  const auto axis = axis_of(dim, t->v.dim());
  const double least = PyFloat_AS_DOUBLE(eps.ptr());
  const auto named = norm_of(norm);
  // g has to be flat, or of the shape that dim implies. has_slices checks the rest.
  const auto fits = [&](const Tensor& scales) {
    if (*axis < 0 || scales.dim() == 0) return *axis < 0 && scales.dim() == 0;
    const bool shaped = scales.dim() == t->v.dim() && scales.size(*axis) == scales.numel();
    return scales.numel() == t->v.size(*axis) && (shaped || (scales.dim() == 1 && *axis == 0));
  };
  if (!axis || !named || !fits(t->g) || !has_slices(t->v, t->g) ||
      !(least >= 0 && std::isfinite(least)))
    return std::nullopt;
  return WeightOperands{std::move(*t), {least, *named}};
}

// A weight of at most this many elements takes so short a time that the GIL stays held.
constexpr int64_t kHeldElements = 1 << 13;

inline MaybeTensor weight_norm(
    py::handle v, py::handle g, py::handle dim, py::handle eps, py::handle norm) {
  const auto t = weight_operands(v, g, dim, eps, norm);
  if (!t) return std::nullopt;
  std::optional<py::gil_scoped_release> released;
  if (t->v.numel() > kHeldElements) released.emplace();
  std::optional<std::pair<Tensor, Tensor>> result;
  {
    const BelowAutograd below;
    result = weight(empty_as(t->v), t->v, t->g, t->options);
  }
  if (!result) return std::nullopt;
  if (!t->needs_grad()) return result->first;
  return WeightNorm::apply(t->v, t->g, *std::move(result), t->options);
}

// Returns the norms of V in the shape of g, and zero for a slice of zeros. It serves a V that needs no
// gradient.
inline MaybeTensor slice_norm(py::handle v, py::handle dim, py::handle norm) {
  const auto named = norm_of(norm);
  if (!named || !is_tensor(v) || !is_seen_by_nobody()) return std::nullopt;
  const Tensor& t = THPVariable_Unpack(v.ptr());
  const auto axis = axis_of(dim, t.dim());
  if (!axis || !is_floating(t.scalar_type()) || !is_plain(t) || t.numel() == 0 || t.dim() < 2 ||
      (at::GradMode::is_enabled() && t.requires_grad()))
    return std::nullopt;
  std::optional<py::gil_scoped_release> released;
  if (t.numel() > kHeldElements) released.emplace();
  const BelowAutograd below;
  Sizes shape;
  if (*axis >= 0) shape.assign(t.dim(), 1), shape[*axis] = t.size(*axis);
  const Tensor g = at::empty(shape, t.options());
  if (!has_slices(t, g)) return std::nullopt;
  auto n = norms(t, g, {0.0, *named});
  if (!n) return std::nullopt;
  AT_DISPATCH_FLOATING_TYPES(n->scalar_type(), "slice_norm", [&] {
    auto* each = n->mutable_data_ptr<scalar_t>();
    std::replace(each, each + n->numel(), std::numeric_limits<scalar_t>::infinity(), scalar_t(0));
  });
  return n;
}

}  // namespace wn_kernels
