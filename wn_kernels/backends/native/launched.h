// Layers on a GPU, whose kernels Python launches, as nodes of the graph.
//
// Python prepares both directions of a call once, for its dtypes, layouts and options
// (backends/triton). A node calls what was prepared; a backward that is itself differentiated runs on
// the composite formula.

#pragma once

#include <torch/custom_class.h>

#include "call.h"
#include "weight.h"

namespace wn_kernels {

// One prepared call. Its Python objects are released with the GIL held.
struct Launches : torch::CustomClassHolder {
  // (forward, backward, weight, geometry, dim), as Python gives it.
  Launches(const py::tuple& prepared, double eps)
      : forward(prepared[0]), backward(prepared[1]), geometry(prepared[3]), dim(prepared[4]), eps(eps) {
    if (!prepared[2].is_none())
      weight = c10::make_intrusive<Launches>(prepared[2].cast<py::tuple>(), eps);
    if (!geometry.is_none())
      conv = std::make_from_tuple<Geometry>(
          geometry.cast<std::tuple<Sizes, Sizes, Sizes, bool, Sizes, int64_t>>());
  }

  ~Launches() override {
    if (!Py_IsInitialized()) {
      for (py::object* o : {&forward, &backward, &geometry, &dim}) o->release();
      return;
    }
    py::gil_scoped_acquire gil;
    for (py::object* o : {&forward, &backward, &geometry, &dim}) *o = py::object();
  }

  py::object forward;   // (x, v, g, bias) -> (y, n)
  py::object backward;  // (dY, x, v, g, bias, n, needs) -> (dX, dV, dg, db)
  c10::intrusive_ptr<Launches> weight;  // of W alone, where a training step keeps W
  py::object geometry, dim;
  std::optional<Geometry> conv;
  double eps;
};

using Prepared = c10::intrusive_ptr<Launches>;

struct Launched : Function<Launched> {
  static Tensor forward(
      AutogradContext* ctx, const MaybeTensor& x, const Tensor& v, const Tensor& g,
      const MaybeTensor& bias, const std::pair<Tensor, Tensor>& result, const Prepared& launches) {
    ctx->save_for_backward(
        {x.value_or(Tensor()), v, g, bias.value_or(Tensor()), result.second});
    ctx->saved_data["launches"] = c10::IValue::make_capsule(launches);
    return result.first;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &v = saved[1], &g = saved[2], &bias = saved[3], &n = saved[4];
    const auto launches =
        c10::static_intrusive_pointer_cast<Launches>(ctx->saved_data["launches"].toCapsule());
    size_t edge = 0;  // absent tensors have none
    const bool needs_x = x.defined() && ctx->needs_input_grad(edge++),
               needs_v = ctx->needs_input_grad(edge++), needs_g = ctx->needs_input_grad(edge++),
               needs_bias = bias.defined() && ctx->needs_input_grad(edge);
    const auto needs = std::make_tuple(needs_x, needs_v, needs_g, needs_bias);
    py::gil_scoped_acquire gil;
    const auto object = [](const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); };
    py::object found;
    if (at::GradMode::is_enabled() || !is_plain(grads[0], v.device().type())) {
      found = callbacks().differentiable_grads(
          grads[0], object(x), v, g, object(bias), launches->geometry, launches->dim,
          launches->eps, needs);
    } else {
      found = launches->backward(grads[0], object(x), v, g, object(bias), n, needs);
    }
    variable_list out;
    for (auto& grad : found.cast<std::vector<MaybeTensor>>())
      out.push_back(grad.value_or(Tensor()));
    out.resize(6);
    return out;
  }
};

inline Memo<Prepared>& launches_memo() {
  static auto* memo = new Memo<Prepared>;
  return *memo;
}

// What was prepared for a call; nothing where Python serves it by itself.
inline std::optional<Prepared> prepared(
    int64_t rank, const Operands& t, py::handle geometry, py::handle dim, py::handle eps) {
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
  if (!key.option(geometry) || !key.option(dim) || !key.option(eps)) return std::nullopt;
  if (t.x.defined() && t.x.scalar_type() == at::kFloat)
    key.number(callbacks().takes_tf32(rank).cast<bool>());
  return launches_memo().find(key.bytes(), [&]() -> std::optional<Prepared> {
    const auto object = [](const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); };
    const auto answer = callbacks().launches(
        rank, py::make_tuple(object(t.x), t.v, t.g, object(t.bias)), geometry, dim, eps);
    if (answer.is_none()) return std::nullopt;
    return c10::make_intrusive<Launches>(answer.cast<py::tuple>(), py::cast<double>(eps));
  });
}

inline Tensor run(const MaybeTensor& x, const Operands& t, const Prepared& launches) {
  const auto object = [](const MaybeTensor& t) { return t ? py::cast(*t) : py::none(); };
  std::pair<Tensor, Tensor> result;
  const MaybeTensor bias = x ? maybe(t.bias) : std::nullopt;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const at::NoGradGuard no_grad;
    result = launches->forward(object(x), t.v, t.g, object(bias)).cast<std::pair<Tensor, Tensor>>();
  }
  const bool recorded = at::GradMode::is_enabled() &&
                        (t.needs_weight_grad() || (x && x->requires_grad()) ||
                         (bias && bias->requires_grad()));
  return recorded ? Launched::apply(x, t.v, t.g, bias, result, launches) : result.first;
}

inline MaybeTensor launched(
    int64_t rank, py::handle x, py::handle v, py::handle g, py::handle bias, py::handle geometry,
    py::handle dim, py::handle eps) {
  const auto t = launched_operands(x, v, g, bias);
  if (!t) return std::nullopt;
  const auto found = prepared(rank, *t, geometry, dim, eps);
  if (!found) return std::nullopt;
  const Prepared& launches = *found;
  if (!launches->weight || !t->needs_grad()) return run(maybe(t->x), *t, launches);
  const Tensor w = run(std::nullopt, *t, launches->weight);
  const Geometry& conv = *launches->conv;
  py::gil_scoped_release released;
  return at::convolution(
      t->x, w, maybe(t->bias), conv.stride, conv.padding, conv.dilation, conv.transposed,
      conv.output_padding, conv.groups);
}

}  // namespace wn_kernels
