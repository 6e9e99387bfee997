// This file computes the backward of (dV, dg). From ddV and ddg follow, with the u and d of norm.h,
//
//   b = <ddV, u> / d   t = <ddV, dW>   e = (ddg - s b) / n   f = (s (t - k b dg) + ddg dg) / (n d)
//   s ddV + e V   e dW - c ddV - f u   (t - b dg) / n   with respect to dW, V and g
//
// For l2, k is 3. For the other norms it is 2, and the term with c is zero, because their slope is
// constant almost everywhere.

#pragma once

#include "weight.h"

namespace wn_kernels {

// The factors of one slice, from its reductions: <dW, V>, <ddV, u>, <ddV, dW> and the ties.
template <Norm norm, typename T>
struct Bend {
  Bend(const std::array<double, 4>& reductions, T ddg, T g, T n, double eps) : s(g / n) {
    const bool clamped = is_clamped(n, eps);  // then the norm is a constant
    const T d = slope_divisor(norm, n, reductions[3]), k = norm == Norm::l2 ? 3 : 2;
    const T dg = clamped ? T(0) : static_cast<T>(reductions[0]) / n,
            b = clamped ? T(0) : static_cast<T>(reductions[1]) / d,
            t = static_cast<T>(reductions[2]);
    c = norm == Norm::l2 ? s * dg / n : T(0);
    e = (ddg - s * b) / n;
    f = clamped ? T(0) : multiply_add(s, multiply_add(-k * b, dg, t), ddg * dg) / n / d;
    to_g = (t - b * dg) / n;
  }

  T s, c, e, f, to_g;
};

// Returns the terms of the reductions of a vector.
template <Norm norm, typename T, typename N>
std::array<Vector<T>, 4> bend_terms(Vector<T> ddv, Vector<T> dw, Vector<T> v, N n) {
  const Vector<T> u = times_slope<norm>(T(1), v, n);
  return {dw * v, ddv * u, ddv * dw, norm == Norm::linf ? tied(v, n) : Vector<T>{}};
}

// Computes the gradients of weight_grads() with respect to dW, V and g. If slices are rows, each of
// the three tensors is read from memory once.
template <Norm norm, typename T>
void bend(
    T* to_dw, T* to_v, T* to_g, const T* ddv, const T* ddg, const T* dw, const T* v, const T* g,
    const T* n, double eps, const Extents& e) {
  const auto write = [=](int64_t i, T n, T s, T c, T e, T f) {
    to_dw[i] = multiply_add(s, ddv[i], e * v[i]);
    to_v[i] = multiply_add(e, dw[i], -multiply_add(c, ddv[i], times_slope<norm>(f, v[i], n)));
  };
  if (!e.columns) {
    for_each(e.count, e.length, [&](int64_t j) {
      const int64_t at = j * e.length;
      const auto term = [=](int64_t i, auto count) {
        return bend_terms<norm, T>(
            load(ddv + at + i, count), load(dw + at + i, count), load(v + at + i, count), n[j]);
      };
      const Bend<norm, T> of(
          reductions<T, Sum, Sum, Sum, Sum>(e.length, term), ddg[j], g[j], n[j], eps);
      to_g[j] = of.to_g;
      for (int64_t i = 0; i < e.length; ++i) write(at + i, n[j], of.s, of.c, of.e, of.f);
    });
    return;
  }
  const auto ns = spread(e.of, std::vector<T>(n, n + e.count));
  const auto term = [=, ns = ns.data()](int64_t i, int64_t j, auto count) {
    return bend_terms<norm, T>(
        load(ddv + i, count), load(dw + i, count), load(v + i, count), load(ns + j, count));
  };
  const auto found = column_reductions<T, Sum, Sum, Sum, Sum>(e.of, term, ddv, dw, v);
  std::vector<T> s(e.count), c(e.count), es(e.count), f(e.count);
  for (int64_t j = 0; j < e.count; ++j) {
    const Bend<norm, T> of(
        {found[0][j], found[1][j], found[2][j], found[3][j]}, ddg[j], g[j], n[j], eps);
    to_g[j] = of.to_g;
    s[j] = of.s, c[j] = of.c, es[j] = of.e, f[j] = of.f;
  }
  for (auto* each : {&s, &c, &es, &f}) *each = spread(e.of, std::move(*each));
  const int64_t width = e.of.width();
  for_each(e.of.rows, width, [&](int64_t row) {
    for (int64_t j = 0; j < width; ++j) write(row * width + j, ns[j], s[j], c[j], es[j], f[j]);
  });
}

// The same of tensors: the gradients with respect to dW, V and g.
inline std::array<Tensor, 3> weight_grads_backward(
    const Tensor& ddv_given, const Tensor& ddg, const Tensor& dw_given, const Tensor& v,
    const Tensor& g, const Tensor& n, const NormOptions& options) {
  const Extents e(v, g);
  const auto laid_out = [&](const Tensor& t) {
    return t.strides() == v.strides() ? t : at::empty_like(v).copy_(t);
  };
  const Tensor ddv = laid_out(ddv_given), dw = laid_out(dw_given), flat = ddg.contiguous(),
               to_dw = at::empty_like(v), to_v = at::empty_like(v), to_g = at::empty_like(g);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "weight_grads_backward", [&] {
    using T = scalar_t;
    with_norm(options.norm, [&](auto norm) {
      bend<decltype(norm)::value, T>(
          to_dw.mutable_data_ptr<T>(), to_v.mutable_data_ptr<T>(), to_g.mutable_data_ptr<T>(),
          ddv.const_data_ptr<T>(), flat.const_data_ptr<T>(), dw.const_data_ptr<T>(),
          v.const_data_ptr<T>(), g.const_data_ptr<T>(), n.const_data_ptr<T>(), options.eps, e);
    });
  });
  return {to_dw, to_v, to_g};
}

}  // namespace wn_kernels
