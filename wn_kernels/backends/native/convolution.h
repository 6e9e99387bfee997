// This file computes convolutions and transposed convolutions with W = s V, in four variants:
//
//   unfold       V is multiplied by the unfolded image, over few pixels (unfold.h)
//   late         PyTorch convolves with V, and the channels that the scale belongs to are scaled:
//                the input's of a transposed convolution, the output's of any other
//   materialize  W is formed in the dtype of x, and PyTorch convolves with it; W is kept for the
//                backward if planned
//   widen        the same in float32, for an x in half precision

#pragma once

#include <tuple>

#include "nodes.h"
#include "unfold.h"

namespace wn_kernels {

struct ConvolutionResult {
  Tensor y, n, w;  // W is defined only if it is kept
};

// Returns the scale of V's first dimension in a shape that broadcasts over channels. These are the
// input's channels of a transposed convolution, and the output's of any other.
inline Tensor per_channel(const Tensor& g, const Tensor& n, int64_t ndim) {
  Sizes shape(ndim - 1, 1);
  shape[0] = n.numel();
  return (g / n).view(shape);
}

// Returns PyTorch's convolution, computed in the dtype of W and returned in that of x. It adds the bias
// in a pass of its own if `adds_bias` is true.
inline Tensor plain(
    const Tensor& x, const Tensor& w, const Tensor& bias, const Geometry& conv,
    bool adds_bias = false) {
  const auto dtype = w.scalar_type();
  const Tensor shift = as(bias, dtype);
  adds_bias = adds_bias && bias.defined();
  const Tensor y = at::convolution(
      as(x, dtype), w, maybe(adds_bias ? Tensor() : shift), conv.stride, conv.padding,
      conv.dilation, conv.transposed, conv.output_padding, conv.groups);
  if (adds_bias) {
    Sizes shape(y.dim() - 1, 1);
    shape[0] = shift.numel();
    y.add_(shift.view(shape));
  }
  return as(y, x.scalar_type());
}

// Computes y = y s + b in place.
inline void scale_channels(Tensor& y, const Tensor& s, const Tensor& bias) {
  const int64_t channels = s.numel(), pixels = y.numel() / (y.size(0) * channels);
  if (!y.is_contiguous()) {
    bias.defined() ? at::addcmul_out(y, bias.view(s.sizes()), y, s) : y.mul_(s);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "scale_channels", [&] {
    auto* ys = y.mutable_data_ptr<scalar_t>();
    const auto *scales = s.const_data_ptr<scalar_t>(),
               *shifts = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    for_each(y.size(0) * channels, pixels, [&](int64_t j) {
      const scalar_t factor = scales[j % channels], shift = shifts ? shifts[j % channels] : 0;
      scalar_t* row = ys + j * pixels;
      for (int64_t i = 0; i < pixels; ++i) row[i] = row[i] * factor + shift;
    });
  });
}

// Returns the sums of dY over all dimensions but the channels, in this dtype. The number of threads does
// not change a bit of them.
inline Tensor channel_sums(const Tensor& dy, at::ScalarType dtype) {
  if (!dy.is_contiguous()) return bias_grad(dy, 1, dtype);
  const int64_t batch = dy.size(0), channels = dy.size(1), pixels = dy.numel() / (batch * channels);
  const Tensor out = at::empty({channels}, dy.options().dtype(wide_dtype(dy)));
  with_dtype(dy.scalar_type(), [&](auto number) {
    using Y = decltype(number);
    using T = Wide<Y>;
    const auto* dys = dy.const_data_ptr<Y>();
    auto* to = out.mutable_data_ptr<T>();
    // Images are read one after the other, as they lie in memory.
    std::vector<double> sums(batch * channels);
    for_each(batch * channels, pixels, [&](int64_t j) {
      const Y* row = dys + j * pixels;
      sums[j] = reductions<T, Sum>(pixels, [=](int64_t i, auto count) {
        return std::array<Vector<T>, 1>{load(row + i, count)};
      })[0];
    });
    for (int64_t channel = 0; channel < channels; ++channel) {
      double sum = 0;
      for (int64_t image = 0; image < batch; ++image) sum += sums[image * channels + channel];
      to[channel] = static_cast<T>(sum);
    }
  });
  return as(out, dtype);
}

// Returns (dX, dW) of PyTorch's convolution, computed in the dtype of W. A gradient that is not needed
// is undefined. The bias's gradient is a sum of its own, because oneDNN adds up all of dY in one
// accumulator, and ATen would compute the weight's gradient as well if the bias's alone is needed.
inline std::tuple<Tensor, Tensor> plain_grads(
    const Tensor& dy, const Tensor& x, const Tensor& w, const Geometry& conv, bool needs_x,
    bool needs_w) {
  if (!needs_x && !needs_w) return {};
  const auto dtype = w.scalar_type();
  const auto found = at::convolution_backward(
      as(dy, dtype), as(x, dtype), w, at::nullopt, conv.stride, conv.padding, conv.dilation,
      conv.transposed, conv.output_padding, conv.groups, {needs_x, needs_w, false});
  return {as(std::get<0>(found), x.scalar_type()), std::get<1>(found)};
}

// Returns (dX, dW, db) by operations that PyTorch differentiates.
inline std::tuple<Tensor, Tensor, Tensor> plain_convolution_grads(
    const Tensor& dy, const Tensor& x, const Tensor& w, const Geometry& conv, bool needs_x,
    bool needs_w, bool needs_bias, at::ScalarType bias_dtype) {
  const auto [dx, dw] = plain_grads(dy, x, w, conv, needs_x, needs_w);
  return {dx, dw, needs_bias ? bias_grad(dy, 1, bias_dtype) : Tensor()};
}

inline std::optional<ConvolutionResult> convolution_forward(
    const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias, const Geometry& conv,
    at::IntArrayRef y_sizes, const NormOptions& options, Variant variant, bool keeps,
    bool adds_bias) {
  if (variant == Variant::unfold) {
    RECORD_FUNCTION("wn_kernels::convolution, unfold", {});
    const auto result = unfolded_forward(
        x, v, g, as(bias, x.scalar_type()), conv, y_sizes, options);
    if (!result) return std::nullopt;
    return ConvolutionResult{result->first, result->second, Tensor()};
  }
  if (variant != Variant::late) {
    RECORD_FUNCTION(
        variant == Variant::widen ? "wn_kernels::convolution, widen"
                                  : "wn_kernels::convolution, materialize",
        {});
    const auto dtype = product_dtype(variant, x, v);
    auto result = weight(keeps ? empty_as(v, dtype) : passing_weight(v, dtype), v, g, options);
    if (!result) return std::nullopt;
    auto& [w, n] = *result;
    return ConvolutionResult{plain(x, w, bias, conv, adds_bias), n, keeps ? w : Tensor()};
  }
  RECORD_FUNCTION(
      conv.transposed ? "wn_kernels::convolution, input" : "wn_kernels::convolution, output", {});
  const auto n = norms(v, g, options);
  if (!n) return std::nullopt;
  const Tensor s = per_channel(g, *n, x.dim());
  if (conv.transposed) return ConvolutionResult{plain(x * s, v, bias, conv), *n, Tensor()};
  Tensor y = plain(x, v, Tensor(), conv);
  scale_channels(y, s, as(bias, y.scalar_type()));
  return ConvolutionResult{y, *n, Tensor()};
}

struct Convolution : Function<Convolution> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& v, const Tensor& g,
      const MaybeTensor& bias, const ConvolutionResult& result, const Geometry& conv,
      const NormOptions& options, Variant variant) {
    ctx->save_for_backward({x, v, g, result.n, result.w});
    auto& data = ctx->saved_data;
    if (bias) data["bias"] = static_cast<int64_t>(bias->scalar_type());
    save(ctx, options);
    data["variant"] = static_cast<int64_t>(variant);
    data["geometry"] = conv.packed();
    ctx->set_materialize_grads(false);
    return result.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &v = saved[1], &g = saved[2], &n = saved[3], &w = saved[4];
    const LayerGrads given(grads);
    const Tensor& dy = given.dy;
    auto& data = ctx->saved_data;
    const NormOptions options = saved_options(ctx);
    const auto conv = Geometry::unpacked(data["geometry"].toIntVector());
    const auto bias = data.find("bias");
    const bool needs_x = ctx->needs_input_grad(0), needs_v = ctx->needs_input_grad(1),
               needs_g = ctx->needs_input_grad(2), needs_weight = needs_v || needs_g,
               needs_bias = bias != data.end() && ctx->needs_input_grad(3);
    const auto bias_dtype =
        needs_bias ? static_cast<at::ScalarType>(bias->second.toInt()) : at::kFloat;
    variable_list out(8);
    if (given.are_undefined()) return out;
    if (!given.are_plain()) {
      auto found = composite_grads(dy, given.dw, x, v, g, conv, options, {needs_x, needs_v, needs_g});
      std::move(found.begin(), found.end(), out.begin());
      if (needs_bias && dy.defined()) out[3] = bias_grad(dy, 1, bias_dtype);
      return out;
    }
    const auto variant = static_cast<Variant>(data["variant"].toInt());
    const auto dtype = product_dtype(variant, x, v);
    // The elements of W do not matter to dW.
    const auto stand_in = [&] {
      return w.defined()                ? w
             : v.scalar_type() == dtype ? v
                                        : at::empty_like(v, v.options().dtype(dtype));
    };
    if (at::GradMode::is_enabled()) {
      RECORD_FUNCTION("wn_kernels::convolution_backward, recorded", {});
      const WithoutAutocast no_autocast;
      Tensor dw;
      if (dy.defined()) {
        Tensor weight = stand_in().detach();
        if (needs_x)
          weight = recorded_weight(
              w.defined() ? w.detach() : scaled_weight(empty_as(v, dtype), v, g, n), v, g);
        std::tie(out[0], dw, out[3]) = plain_convolution_grads(
            dy, x, weight, conv, needs_x, needs_weight, needs_bias, bias_dtype);
      }
      if (needs_weight) {
        auto found = recorded_weight_grads(given.total(dw), v, g, n, options);
        std::move(found.begin(), found.end(), out.begin() + 1);
      }
      return out;
    }
    if (!dy.defined()) {
      const BelowAutograd below;
      std::tie(out[1], out[2]) = weight_grads(given.dw, v, g, n, options, false);
      return out;
    }
    const BelowAutograd below;
    if (needs_bias) out[3] = channel_sums(dy, bias_dtype);
    if (variant == Variant::unfold) {
      RECORD_FUNCTION("wn_kernels::convolution_backward, unfold", {});
      std::tie(out[0], out[1], out[2]) =
          unfolded_backward(dy, x, v, g, n, conv, options, needs_x, needs_weight);
      if (needs_weight && given.dw.defined()) {
        const auto [dv, dg] = weight_grads(given.dw, v, g, n, options, false);
        out[1].add_(dv), out[2].add_(dg);
      }
      return out;
    }
    Tensor dw;
    RECORD_FUNCTION(
        variant == Variant::materialize ? "wn_kernels::convolution_backward, materialize"
        : variant == Variant::widen     ? "wn_kernels::convolution_backward, widen"
        : conv.transposed               ? "wn_kernels::convolution_backward, input"
                                        : "wn_kernels::convolution_backward, output",
        {});
    if (variant == Variant::late) {
      const Tensor s = per_channel(g, n, x.dim());
      if (conv.transposed) {  // one call gives dW and dX before its scale: dX = s (dY * V)
        std::tie(out[0], dw) = plain_grads(dy, x, v, conv, needs_x, needs_weight);
        if (needs_x) out[0].mul_(s);
      } else {
        if (needs_x) out[0] = std::get<0>(plain_grads(dy * s, x, v, conv, true, false));
        dw = std::get<1>(plain_grads(dy, x, v, conv, false, needs_weight));
      }
    } else {
      Tensor formed = w;
      if (needs_x && !w.defined()) formed = scaled_weight(passing_weight(v, dtype), v, g, n);
      // A large W that is formed is freed before dW is allocated. Otherwise one call takes less time.
      const bool at_once = w.defined() || bytes_of(v, dtype) <= kAtOnceBytes;
      if (needs_x && !at_once) {
        out[0] = std::get<0>(plain_grads(dy, x, formed, conv, true, false));
        formed.reset();
      }
      auto [dx, found] = plain_grads(
          dy, x, formed.defined() ? formed : stand_in(), conv, needs_x && at_once, needs_weight);
      if (dx.defined()) out[0] = dx;
      dw = found;
    }
    if (needs_weight)
      std::tie(out[1], out[2]) = weight_grads(given.total(dw), v, g, n, options, true);
    return out;
  }
};

// The arguments from `stride` on are those of functional.convolution.
inline MaybeTensor convolution(
    int64_t rank, py::handle x, py::handle v, py::handle g, py::handle bias, py::handle geometry,
    py::handle dim, py::handle eps, py::handle norm) {
  auto t = operands(x, v, g, bias);
  const auto named = norm_of(norm);
  if (!t || !named || !has_slices(t->v, t->g)) return std::nullopt;
  t->x = as_autocast(t->x);
  const bool channels_last = !(is_channels_first(t->x) && is_channels_first(t->v));
  const auto found = planned(rank, *t, geometry, dim, eps, *named, channels_last);
  if (!found) return std::nullopt;
  const Plan& plan = *found;
  const NormOptions options{py::cast<double>(eps), *named};
  py::gil_scoped_release released;
  const bool recorded = t->needs_grad();
  std::optional<ConvolutionResult> result;
  {
    const BelowAutograd below;
    result = convolution_forward(
        t->x, t->v, t->g, t->bias, plan.conv, plan.y_sizes, options,
        recorded ? plan.recorded : plan.forward, plan.keeps && recorded, plan.adds_bias);
  }
  if (!result) return std::nullopt;
  if (!recorded) return result->y;
  return with_weight_grad(
      Convolution::apply(
          t->x, t->v, t->g, maybe(t->bias), *result, plan.conv, options, plan.backward),
      t->v);
}

}  // namespace wn_kernels
