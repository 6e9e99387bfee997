// Layers on a GPU, whose kernels are Triton's, as nodes of the graph.
//
// Python prepares both directions of a call once, for its dtypes, layouts and options
// (`operators.launches`). What only allocates, launches and multiplies matrices is a `Pass`, which runs
// here, and so does PyTorch's own convolution with a `W` that a pass forms. Anything else is a Python
// function. A backward that is itself differentiated is recorded as on a CPU (weight.h): its `W` and
// its `(dV, dg)` are launches of the weight alone.

#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/custom_class.h>

#include "convolution.h"
#include "linear.h"
#include "passes.h"

namespace wn_kernels {

using Needs = std::array<bool, 4>;  // of x, V, g and the bias

inline py::object as_object(const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); }

inline py::tuple as_tuple(const Needs& needs) {
  return py::make_tuple(needs[0], needs[1], needs[2], needs[3]);
}

// One prepared call. Its functions are called without the GIL, and take it where Python runs.
struct Launches : torch::CustomClassHolder {
  Launches(const py::object& prepared, const NormOptions& options)
      : forms_forward(prepared.attr("forms_forward").cast<bool>()),
        forms_backward(prepared.attr("forms_backward").cast<bool>()),
        keeps(prepared.attr("keeps").cast<bool>()),
        axis(prepared.attr("dim").cast<std::optional<int64_t>>().value_or(-1)), options(options),
        is_observed(prepared.attr("signs")),
        geometry(references.keep(prepared.attr("conv"))),
        python_forward(references.keep(prepared.attr("forward"))),
        python_backward(references.keep(prepared.attr("backward"))),
        prepare_backward(references.keep(prepared.attr("prepare_backward"))),
        pass(as_pass(prepared.attr("run"))), keeping(as_pass(prepared.attr("keeping"))) {
    if (const py::object w = prepared.attr("weight"); !w.is_none())
      weight = c10::make_intrusive<Launches>(w, options);
    if (!geometry.is_none()) conv = Geometry::of(geometry.cast<Geometry::Fields>());
  }

  // y or, without x, W; the norms; and what is kept.
  struct Result {
    Tensor y, n, kept;
  };

  // `keep` says whether the backward will need what a training step keeps. The norms may be undefined
  // where the backward does not take them, unless the call is `recorded`.
  Result forward(
      const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias, bool keep,
      bool observed, bool recorded = false) {
    if (forms_forward) {
      auto formed = weight->forward({}, v, g, {}, false, observed, recorded);
      return {product(x, formed.y, bias), std::move(formed.n), {}};
    }
    if (!pass) {
      const py::gil_scoped_acquire gil;
      auto [y, n] =
          python_forward(as_object(x), v, g, as_object(bias)).cast<std::pair<Tensor, Tensor>>();
      return {std::move(y), std::move(n), {}};
    }
    if (!x.defined()) {
      auto found = (*pass)({v, g}, observed, recorded);
      return {std::move(found[0]), std::move(found[1]), {}};
    }
    const bool is_flat = conv || x.dim() == 2;
    keep = keep && keeping;
    const auto found = (*(keep ? keeping : pass))(
        {is_flat ? x : as_rows(x), v, g, bias}, observed, recorded);
    const Tensor kept = keep ? found[2] : Tensor();
    if (is_flat) return {found[0], found[1], kept};
    auto sizes = x.sizes().vec();
    sizes.back() = v.size(0);
    return {found[0].view(sizes), found[1], kept};
  }

  // The layer with a W that is formed or kept, by PyTorch.
  Tensor product(const Tensor& x, const Tensor& w, const Tensor& bias) const {
    const bool casts = bias.defined() && bias.scalar_type() != w.scalar_type();
    const Tensor cast = casts ? bias.to(w.scalar_type()) : bias;
    return conv ? plain(x, w, cast, *conv) : at::linear(x, w, maybe(cast));
  }

  // (dX, dW, db) of that product.
  std::tuple<Tensor, Tensor, Tensor> product_grads(
      const Tensor& dy, const Tensor& x, const Tensor& w, const Needs& needs) const {
    const bool needs_w = needs[1] || needs[2];
    const auto dtype = dy.scalar_type();
    return conv
        ? plain_convolution_grads(dy, x, w, *conv, needs[0], needs_w, needs[3], dtype)
        : plain_linear_grads(dy, x, w, dtype, needs[0], needs_w, needs[3], dtype);
  }

  // (dX, dV, dg, db); what is not needed may be undefined.
  variable_list backward(
      const Tensor& dy, const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& n,
      const Tensor& kept, const Needs& needs, bool observed) {
    if (forms_backward) return backward_of_convolution(dy, x, v, g, n, needs, observed);
    const bool is_flat = !x.defined() || conv || x.dim() == 2;
    const Tensor flat_dy = is_flat ? dy : as_rows(dy), flat_x = is_flat ? x : as_rows(x);
    if (const auto prepared = backward_pass(flat_dy, flat_x, v, g, needs)) {
      if (!x.defined()) {
        auto found = (*prepared)({dy, v, g, n}, observed);
        return {Tensor(), std::move(found[0]), std::move(found[1]), Tensor()};
      }
      Tensors given{flat_dy, flat_x, v, g, n};
      if (keeping) given.push_back(kept);
      auto found = (*prepared)(std::move(given), observed);
      if (!is_flat && found[0].defined()) found[0] = found[0].view(x.sizes());
      return {found.begin(), found.end()};
    }
    const py::gil_scoped_acquire gil;
    return as_variables(python_backward(dy, as_object(x), v, g, n, as_tuple(needs)));
  }

  // The same around PyTorch's convolution, the layout of whose dW it alone determines.
  variable_list backward_of_convolution(
      const Tensor& dy, const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& n,
      const Needs& needs, bool observed) {
    const bool needs_weight = needs[1] || needs[2];
    const Tensor formed = needs[0] ? weight->forward({}, v, g, {}, false, observed).y : Tensor();
    Tensor dx, dw, db;
    const Tensor w = needs[0] ? formed : v.to(x.scalar_type());
    std::tie(dx, dw, db) = product_grads(dy, x, w, needs);
    variable_list out{dx, {}, {}, db};
    if (needs_weight) {
      auto found = weight->backward(dw, {}, v, g, n, {}, {false, true, true, false}, observed);
      out[1] = std::move(found[1]);
      out[2] = std::move(found[2]);
    }
    return out;
  }

  // The backward's pass for a layout of dY; null where Python serves it, and for the ninth layout.
  std::shared_ptr<Pass> backward_pass(
      const Tensor& dy, const Tensor& x, const Tensor& v, const Tensor& g, const Needs& needs) {
    const auto fits = [&](const Backward& each) {
      return each.needs == needs && dy.strides() == at::IntArrayRef(each.strides);
    };
    if (const Backward* found = backwards.find(fits)) return found->pass;
    if (backwards.size() >= 8) return nullptr;
    const py::gil_scoped_acquire gil;
    const auto prepared = as_pass(prepare_backward(dy, as_object(x), v, g, as_tuple(needs)));
    return backwards.add(needs, dy.strides().vec(), prepared)->pass;
  }

  struct Backward {
    Needs needs;
    Sizes strides;  // of dY
    std::shared_ptr<Pass> pass;
  };

  References references;
  bool forms_forward, forms_backward;  // whether PyTorch's convolution by W serves a direction
  bool keeps;                          // whether a training step keeps that W
  int64_t axis;                        // the kept dimension; -1 for the whole of V
  NormOptions options;
  Observation is_observed;
  py::handle geometry;
  py::handle python_forward;    // (x, v, g, bias) -> (y, n)
  py::handle python_backward;   // (dY, x, v, g, n, needs) -> (dX, dV, dg, db)
  py::handle prepare_backward;  // (dY, x, v, g, needs) -> its pass, or None
  std::shared_ptr<Pass> pass;   // of the forward; null where Python serves it
  // The same in a training step that keeps the packed W or the product x Vᵀ, which it returns behind
  // n, and which the pass of the backward takes.
  std::shared_ptr<Pass> keeping;
  c10::intrusive_ptr<Launches> weight;  // of W alone, where it is formed
  std::optional<Geometry> conv;
  Published<Backward> backwards;
};

using Prepared = c10::intrusive_ptr<Launches>;

inline Prepared prepared(
    int64_t rank, const Operands& t, py::handle geometry, py::handle dim, py::handle eps,
    Norm norm);

// The node of a call. It is no `Function`, whose context takes longer than a launch does.
class Launched : public torch::autograd::Node {
 public:
  // y with a node that holds these tensors, but for the bias, which may change before a backward.
  static Tensor recorded(
      const Tensor& y, const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias,
      const Tensor& n, const Tensor& kept, const Prepared& launches) {
    const auto node = make_node<Launched>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, v, g, bias));
    node->launches_ = launches;
    if (bias.defined()) node->bias_dtype_ = bias.scalar_type();
    size_t i = 0;
    for (const Tensor* t : {&x, &v, &g, &n, &kept})
      node->saved_[i++] = torch::autograd::SavedVariable(*t, /*is_output=*/false);
    torch::autograd::set_history(y, node);
    return x.defined() ? with_weight_grad(y, v) : y;
  }

  std::string name() const override { return "wn_kernels::Launched"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& each : saved_) each.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    if (grads.size() == 1) grads.emplace_back();
    const LayerGrads given(grads);
    const Tensor &dy = given.dy, &dw = given.dw;
    if (given.are_undefined()) return variable_list(4);
    std::array<Tensor, 5> tensors;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = 0; i < tensors.size(); ++i) tensors[i] = saved_[i].unpack();
    }
    const auto& [x, v, g, n, kept] = tensors;
    Needs needs;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
    // The launches of the weight alone, for W and its gradient.
    const bool again = at::GradMode::is_enabled(), for_weight = again || dw.defined();
    const auto weight = !x.defined() ? launches_ : for_weight ? weight_alone(v, g) : Prepared();
    variable_list out(4);
    if (!given.are_plain(v.device().type()) || (for_weight && !weight)) {
      const py::gil_scoped_acquire gil;
      out = as_variables(callbacks().differentiable_grads(
          as_object(dy), as_object(dw), as_object(x), v, g, launches_->geometry,
          as_dim(launches_->axis), launches_->options.eps, as_tuple(needs),
          as_name(launches_->options.norm)));
    } else if (again) {
      out = recorded(given, x, v, g, n, needs, *weight);
    } else {
      const bool observed = is_observed();
      if (dy.defined()) out = launches_->backward(dy, x, v, g, n, kept, needs, observed);
      if (dw.defined()) {
        const Needs of_weight{false, needs[1], needs[2], false};
        const auto more = weight->backward(dw, {}, v, g, n, {}, of_weight, observed);
        for (const size_t i : {1, 2})
          if (needs[i]) out[i] = out[i].defined() ? out[i] + more[i] : more[i];
      }
    }
    if (out[3].defined()) out[3] = out[3].to(bias_dtype_);
    return out;
  }

 private:
  bool is_observed() const {
    const py::gil_scoped_acquire gil;
    return launches_->is_observed();
  }

  // What forms W alone in V's dtype, and its gradients; null where Python does.
  Prepared weight_alone(const Tensor& v, const Tensor& g) const {
    const py::gil_scoped_acquire gil;
    return prepared(
        0, {{}, v, g, {}}, py::tuple(), as_dim(launches_->axis), py::float_(launches_->options.eps),
        launches_->options.norm);
  }

  // (dX, dV, dg, db) as part of the graph.
  variable_list recorded(
      const LayerGrads& given, const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& n,
      const Needs& needs, Launches& weight) const {
    const bool observed = is_observed();
    Tensor dx, own = x.defined() ? Tensor() : given.dy, db;
    if (x.defined() && given.dy.defined()) {
      Tensor w = v.detach();  // without dX, its values play no part
      if (needs[0]) {
        {
          at::AutoDispatchBelowADInplaceOrView below;
          const at::NoGradGuard no_grad;
          w = weight.forward({}, v, g, {}, false, observed).y;
        }
        w = recorded_weight(w, v, g);
      }
      std::tie(dx, own, db) = launches_->product_grads(given.dy, x, w.to(x.scalar_type()), needs);
      if (own.defined()) own = own.to(v.scalar_type());
    }
    variable_list out{dx, {}, {}, db};
    if (!needs[1] && !needs[2]) return out;
    const Tensor dw = given.total(own);
    variable_list grads;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const at::NoGradGuard no_grad;
      grads = weight.backward(dw, {}, v, g, n, {}, {false, true, true, false}, observed);
    }
    auto found = WeightGrads::apply(
        dw, v, g, n, std::make_pair(grads[1], grads[2]), launches_->axis,
        launches_->options);
    std::move(found.begin(), found.end(), out.begin() + 1);
    return out;
  }

  std::array<torch::autograd::SavedVariable, 5> saved_;  // x, V, g, n and what is kept
  at::ScalarType bias_dtype_ = at::kFloat;
  Prepared launches_;
};

inline Memo<Prepared>& launches_memo() {
  static auto* memo = new Memo<Prepared>;
  return *memo;
}

// Whether PyTorch is set to take such products in TF32, as `takes_tf32` of call.py. The getter's own
// types, which differ between versions of torch, name the setting.
template <typename Precision, typename Backend, typename Op>
bool takes_tf32(Precision (at::Context::*get)(Backend, Op) const, int64_t rank) {
  const at::Context& context = at::globalContext();
  if constexpr (std::is_enum_v<Precision>)
    return (context.*get)(Backend::CUDA, rank ? Op::CONV : Op::MATMUL) == Precision::TF32;
  else
    return (context.*get)("cuda", rank ? "conv" : "matmul") == "tf32";
}

// What was prepared for a call; null where Python serves it by itself.
inline Prepared prepared(
    int64_t rank, const Operands& t, py::handle geometry, py::handle dim, py::handle eps,
    Norm norm) {
  static thread_local Key key;
  key.clear();
  key.number(static_cast<char>(rank));
  key.number(static_cast<char>(t.v.get_device()));
  for (const Tensor* tensor : {&t.x, &t.v, &t.g, &t.bias}) {
    key.number(static_cast<char>(tensor->defined() ? static_cast<int>(tensor->scalar_type()) : -1));
    if (!tensor->defined()) continue;
    key.list(tensor->sizes());
    key.list(tensor->strides());
  }
  key.number(norm);
  if (!key.option(geometry) || !key.option(dim) || !key.option(eps)) return {};
  if (t.x.defined() && t.x.scalar_type() == at::kFloat)
    key.number(takes_tf32(&at::Context::float32Precision, rank));
  return launches_memo().find(key.bytes(), [&]() -> Prepared {
    const auto answer = callbacks().launches(
        rank, py::make_tuple(as_object(t.x), t.v, t.g, as_object(t.bias)), geometry, dim, eps,
        as_name(norm));
    if (answer.is_none()) return {};
    return c10::make_intrusive<Launches>(
        answer, NormOptions{py::cast<double>(eps), norm});
  });
}

// The layer's output for these operands, recorded where a gradient is needed. Called without the GIL.
inline Tensor run(
    const Tensor& x, const Operands& t, const Tensor& bias, const Prepared& launches,
    bool observed) {
  const auto needs = [](const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
  const bool recorded =
      at::GradMode::is_enabled() && (t.needs_weight_grad() || needs(x) || needs(bias));
  // dX takes the packed W, and the gradients of V and g take the product.
  const bool keep = recorded && (launches->conv ? needs(x) : t.needs_weight_grad());
  Launches::Result result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::NoGradGuard no_grad;
    result = launches->forward(x, t.v, t.g, bias, keep, observed, recorded);
  }
  if (!recorded) return std::move(result.y);
  return Launched::recorded(result.y, x, t.v, t.g, bias, result.n, result.kept, launches);
}

inline MaybeTensor launched(
    int64_t rank, py::handle x, py::handle v, py::handle g, py::handle bias, py::handle geometry,
    py::handle dim, py::handle eps, py::handle norm) {
  const auto t = launched_operands(x, v, g, bias);
  const auto named = norm_of(norm);
  if (!t || !named || t->x.defined() != (rank >= 0)) return std::nullopt;
  const auto launches = prepared(std::max<int64_t>(rank, 0), *t, geometry, dim, eps, *named);
  if (!launches) return std::nullopt;
  const bool observed = launches->is_observed();
  const py::gil_scoped_release released;
  if (!launches->keeps || !t->needs_grad()) return run(t->x, *t, t->bias, launches, observed);
  return launches->product(t->x, run({}, *t, {}, launches->weight, observed), t->bias);
}

}  // namespace wn_kernels
