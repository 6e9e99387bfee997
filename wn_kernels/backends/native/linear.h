// This file computes the linear layer y = x Wᵀ + b with W = s V. There are two variants:
//
//   late      y = (x Vᵀ) s + b,  dX = (dY s) V,  dV = (dY s)ᵀ x - c V, with a = sum dY (x Vᵀ)
//   else      W is formed in the forward and in the backward
//
// The late backward computes a from the product x Vᵀ, if the forward kept it. Otherwise it forms dW
// and computes dV from it. If x has few rows, x Vᵀ and the norms take one read of V, and so do dX
// and dV (panels.h).
//
// If x has one row, or if it has few and V is large, no product comes from a library. The number of
// threads then does not change a bit of any result.

#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "panels.h"
#include "weight.h"

namespace wn_kernels {

// Returns whether one read of V beats a library's product. x must have several rows, but few, and V
// must not be small.
inline bool is_few(int64_t rows, const Tensor& v) {
  return rows > 1 && rows <= kFewRows && v.size(1) >= kFewRowsInputs &&
         v.numel() >= kFewRowsElements;
}

// In a pass over (M, N), a thread takes this many columns. They fill at least a cache line.
constexpr int64_t kColumns = 64;

struct LinearResult {
  Tensor y, n, product;  // the product x Vᵀ is defined only if it is kept
};

// Computes y = p s + b for p = x Vᵀ, which may be stored transposed.
template <typename T>
void epilogue(Tensor& y, const Tensor& p, const Tensor& g, const Tensor& n, const Tensor& b) {
  const int64_t rows = p.size(0), columns = p.size(1), p_row = p.stride(0), p_column = p.stride(1);
  const auto *ps = p.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(), *ns = n.const_data_ptr<T>();
  const auto* bs = b.defined() ? b.const_data_ptr<T>() : nullptr;
  auto* ys = y.mutable_data_ptr<T>();
  for_each((columns + kColumns - 1) / kColumns, rows * kColumns, [&](int64_t block) {
    const int64_t begin = block * kColumns, width = std::min(kColumns, columns - begin);
    T s[kColumns], shift[kColumns] = {};
    for (int64_t j = 0; j < width; ++j) s[j] = gs[begin + j] / ns[begin + j];
    if (bs) std::copy_n(bs + begin, width, shift);
    for (int64_t m = 0; m < rows; ++m) {
      const T* in = ps + m * p_row + begin * p_column;
      T* out = ys + m * columns + begin;
      if (p_column == 1)
        for (int64_t j = 0; j < width; ++j) out[j] = in[j] * s[j] + shift[j];
      else
        for (int64_t j = 0; j < width; ++j) out[j] = in[j * p_column] * s[j] + shift[j];
    }
  });
}

// Returns Dᵀ V for a D of few columns.
template <typename T>
Tensor few_rows_product(const Tensor& d, const Tensor& v) {
  const Tensor out = at::empty({d.size(1), v.size(1)}, v.options());
  Panels<T> q(v.size(1), d.size(1));
  columns_product(q, v.const_data_ptr<T>(), v.size(0), d.const_data_ptr<T>());
  unpack(q, out.mutable_data_ptr<T>());
  return out;
}

// One tile of dᵀ V takes this many rows and columns of V. Its sums stay in the first-level cache.
constexpr int64_t kTileOfRows = 256;
constexpr int64_t kTileOfColumns = 1024;

// Computes to += dᵀ V for some rows and `width` columns of V. It takes eight rows at once, because
// every pass loads and stores the sums.
template <typename T>
void add_scaled_rows(
    T* __restrict to, const T* d, const T* v, int64_t rows, int64_t length, int64_t width) {
  int64_t j = 0;
  for (; j + 8 <= rows; j += 8) {
    const T *a = v + j * length, *b = a + length, *c = b + length, *e = c + length,
            *f = e + length, *h = f + length, *p = h + length, *q = p + length, *s = d + j;
    for (int64_t k = 0; k < width; ++k)
      to[k] += ((s[0] * a[k] + s[1] * b[k]) + (s[2] * c[k] + s[3] * e[k])) +
               ((s[4] * f[k] + s[5] * h[k]) + (s[6] * p[k] + s[7] * q[k]));
  }
  for (; j < rows; ++j)
    for (int64_t k = 0; k < width; ++k) to[k] += d[j] * v[j * length + k];
}

// Returns dᵀ V for a row dᵀ. V is read once, in tiles. Their sums are added in order, whichever
// thread took them.
template <typename T>
Tensor one_row_product(const Tensor& d, const Tensor& v) {
  const int64_t rows = v.size(0), length = v.size(1);
  const int64_t stacks = (rows + kTileOfRows - 1) / kTileOfRows,
                strips = (length + kTileOfColumns - 1) / kTileOfColumns;
  const Tensor out = at::empty({1, length}, v.options());
  const std::unique_ptr<T[]> rest(new T[(stacks - 1) * length]);
  const auto *ds = d.const_data_ptr<T>(), *vs = v.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  for_each(stacks * strips, kTileOfRows * kTileOfColumns, [&](int64_t i) {
    const int64_t stack = i / strips, row = stack * kTileOfRows, k = i % strips * kTileOfColumns;
    const int64_t width = std::min(kTileOfColumns, length - k);
    T* part = (stack ? rest.get() + (stack - 1) * length : to) + k;
    std::fill_n(part, width, T(0));
    add_scaled_rows(
        part, ds + row, vs + row * length + k, std::min(kTileOfRows, rows - row), length, width);
  });
  for_each(stacks > 1 ? strips : 0, stacks * kTileOfColumns, [&](int64_t strip) {
    const int64_t k = strip * kTileOfColumns, end = std::min(k + kTileOfColumns, length);
    for (const T* part = rest.get(); part < rest.get() + (stacks - 1) * length; part += length)
      for (int64_t i = k; i < end; ++i) to[i] += part[i];
  });
  return out;
}

// Returns D V.
inline Tensor rows_times(const Tensor& d, const Tensor& v) {
  if (d.size(0) > 1) return at::mm(d, v);
  Tensor out;
  AT_DISPATCH_FLOATING_TYPES(
      v.scalar_type(), "rows_times", [&] { out = one_row_product<scalar_t>(d, v); });
  return out;
}

// Computes scaled = dY s and db = sum dY in one pass over dY. If p = x Vᵀ is given, it also
// computes a = sum dY p. The sums run over the rows.
template <typename T>
void column_pass(
    Tensor& scaled, Tensor& db, Tensor& a, const Tensor& dy, const Tensor& p, const Tensor& g,
    const Tensor& n) {
  const int64_t rows = dy.size(0), columns = dy.size(1);
  const bool dots = p.defined();
  const int64_t p_row = dots ? p.stride(0) : 0, p_column = dots ? p.stride(1) : 0;
  const auto *dys = dy.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(),
             *ns = n.const_data_ptr<T>(), *ps = dots ? p.const_data_ptr<T>() : nullptr;
  auto *out = scaled.mutable_data_ptr<T>(), *dbs = db.mutable_data_ptr<T>(),
       *as = dots ? a.mutable_data_ptr<T>() : nullptr;
  for_each((columns + kColumns - 1) / kColumns, rows * kColumns, [&](int64_t block) {
    const int64_t begin = block * kColumns, width = std::min(kColumns, columns - begin);
    T s[kColumns], sums[kColumns] = {}, products[kColumns] = {};
    for (int64_t j = 0; j < width; ++j) s[j] = gs[begin + j] / ns[begin + j];
    for (int64_t m = 0; m < rows; ++m) {
      const T* row = dys + m * columns + begin;
      T* to = out + m * columns + begin;
      for (int64_t j = 0; j < width; ++j) {
        to[j] = row[j] * s[j];
        sums[j] += row[j];
      }
      if (dots) {
        const T* with = ps + m * p_row + begin * p_column;
        for (int64_t j = 0; j < width; ++j) products[j] += row[j] * with[j * p_column];
      }
    }
    std::copy_n(sums, width, dbs + begin);
    if (dots) std::copy_n(products, width, as + begin);
  });
}

inline std::optional<LinearResult> linear_forward(
    const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias, double eps,
    Variant variant, bool keeps) {
  const int64_t rows = x.size(0), outputs = v.size(0), inputs = v.size(1);
  if (variant == Variant::materialize) {
    RECORD_FUNCTION("wn_kernels::linear, materialize", {});
    auto result = weight(v, g, eps);
    if (!result) return std::nullopt;
    return LinearResult{at::linear(x, result->first, maybe(bias)), result->second, Tensor()};
  }
  RECORD_FUNCTION("wn_kernels::linear, scaled", {});
  LinearResult out;
  if (rows == 1 || is_few(rows, v)) {
    bool in_range = true;
    out.y = at::empty({rows, outputs}, x.options());
    out.n = at::empty_like(g);
    if (keeps) out.product = at::empty({outputs, rows}, x.options()).t();
    const Tensor input = x.contiguous();
    AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "linear", [&] {
      const auto *vs = v.const_data_ptr<scalar_t>(), *gs = g.const_data_ptr<scalar_t>(),
                 *bs = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
      auto *ys = out.y.mutable_data_ptr<scalar_t>(),
           *kept = keeps ? out.product.mutable_data_ptr<scalar_t>() : nullptr;
      Norms<scalar_t> all(out.n.mutable_data_ptr<scalar_t>(), eps);
      const auto finish = [&](int64_t j, const scalar_t* p, double square) {
        const scalar_t s = gs[j] / all.set(j, square, vs + j * inputs, inputs);
        for (int64_t m = 0; m < rows; ++m) ys[m * outputs + j] = p[m] * s + (bs ? bs[j] : 0);
        if (kept) std::copy_n(p, rows, kept + j * rows);
      };
      if (rows == 1) {
        const auto* xs = input.const_data_ptr<scalar_t>();
        for_each(outputs, inputs, [&](int64_t j) {
          const auto [square, product] = square_and_dot(vs + j * inputs, xs, inputs);
          const auto p = static_cast<scalar_t>(product);
          finish(j, &p, square);
        });
      } else {
        Panels<scalar_t> xs(inputs, rows);
        pack(input.const_data_ptr<scalar_t>(), xs);
        for_each_stack(outputs, xs, [&](int64_t first, int64_t count) {
          rows_product<scalar_t, true>(vs, first, count, xs, finish);
        });
      }
      in_range = all.in_range();
    });
    return in_range ? std::make_optional(out) : std::nullopt;
  }
  const auto n = norms(v, g, eps);
  if (!n) return std::nullopt;
  out.n = *n;
  const Tensor p = rows < kLeftRows ? at::mm(v, x.t()).t() : at::mm(x, v.t());
  if (keeps) out.product = p;
  out.y = !keeps && p.is_contiguous() ? p : at::empty(p.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES(
      v.scalar_type(), "linear", [&] { epilogue<scalar_t>(out.y, p, g, out.n, bias); });
  return out;
}

// (dX, dW, db) of the plain layer, by operations that PyTorch differentiates.
inline std::tuple<Tensor, Tensor, Tensor> plain_linear_grads(
    const Tensor& dy, const Tensor& x, const Tensor& w, bool needs_x, bool needs_w,
    bool needs_bias) {
  const Tensor rows = as_rows(dy);
  Tensor dx, dw, db;
  if (needs_x) dx = rows.mm(w);
  if (needs_x && x.dim() != 2) dx = dx.view(x.sizes());
  if (needs_w) dw = rows.t().mm(as_rows(x));
  if (needs_bias) db = rows.sum(0);
  return {dx, dw, db};
}

struct Linear : Function<Linear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& v, const Tensor& g,
      const MaybeTensor& bias, const LinearResult& result, double eps, Variant variant) {
    ctx->saved_data["bias"] = bias.has_value();
    ctx->save_for_backward({x, v, g, result.n, result.product});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["variant"] = static_cast<int64_t>(variant);
    ctx->set_materialize_grads(false);
    return result.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &v = saved[1], &g = saved[2], &n = saved[3], &p = saved[4];
    const double eps = ctx->saved_data["eps"].toDouble();
    const auto variant = static_cast<Variant>(ctx->saved_data["variant"].toInt());
    const bool needs_x = ctx->needs_input_grad(0), needs_v = ctx->needs_input_grad(1),
               needs_g = ctx->needs_input_grad(2),
               needs_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(3);
    variable_list out(7);
    const LayerGrads given(grads);
    if (given.are_undefined()) return out;
    if (!given.are_plain()) {
      auto found = composite_grads(
          given.dy, given.dw, input, v, g, std::nullopt, eps, {needs_x, needs_v, needs_g});
      std::move(found.begin(), found.end(), out.begin());
      if (needs_bias && given.dy.defined()) out[3] = bias_grad(given.dy, given.dy.dim() - 1);
      return out;
    }
    if (at::GradMode::is_enabled()) {
      RECORD_FUNCTION("wn_kernels::linear_backward, recorded", {});
      Tensor dw;
      if (given.dy.defined()) {
        Tensor w;
        if (needs_x) w = formed_weight(ctx, v, g, n);
        if (needs_x && variant == Variant::materialize) ctx->saved_data["weight"] = w.detach();
        if (needs_x) w = recorded_weight(w, v, g);
        std::tie(out[0], dw, out[3]) = plain_linear_grads(
            given.dy, input, w, needs_x, needs_v || needs_g, needs_bias);
      }
      if (needs_v || needs_g) {
        auto found = recorded_weight_grads(given.total(dw), v, g, n, eps);
        std::move(found.begin(), found.end(), out.begin() + 1);
      }
      return out;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    if (!given.dy.defined()) {
      std::tie(out[1], out[2]) = weight_grads(given.dw, v, g, n, eps, false);
      return out;
    }
    const Tensor dy = as_rows(given.dy).contiguous(), x = as_rows(input);
    Tensor dx, a, db;
    if (variant == Variant::late) {
      RECORD_FUNCTION("wn_kernels::linear_backward, scaled", {});
      Tensor scaled = at::empty_like(dy);
      db = at::empty({dy.size(1)}, dy.options());
      if (p.defined()) a = at::empty_like(g);
      AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "linear_backward", [&] {
        column_pass<scalar_t>(scaled, db, a, dy, p, g, n);
      });
      // The products in panels.h take a matrix with one row for each row of V.
      const Tensor few = is_few(dy.size(0), v) ? scaled.t().contiguous() : Tensor();
      if (needs_x && few.defined())
        AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "linear_backward", [&] {
          dx = few_rows_product<scalar_t>(few, v);
        });
      else if (needs_x)
        dx = rows_times(scaled, v);
      if (p.defined() && !given.dw.defined())
        std::tie(out[1], out[2]) = grads_from_dots(a, scaled, few, x, v, g, n, eps);
    } else {
      RECORD_FUNCTION("wn_kernels::linear_backward, materialize", {});
      if (needs_bias) db = bias_grad(dy, 1);
      if (needs_x) dx = rows_times(dy, formed_weight(ctx, v, g, n));
    }
    if ((needs_v || needs_g) && !out[1].defined())
      std::tie(out[1], out[2]) =
          weight_grads(given.total(at::mm(dy.t(), x)), v, g, n, eps, true);
    if (needs_x) out[0] = dx.view(input.sizes());
    if (needs_bias) out[3] = db;
    return out;
  }

  // Returns the W that a recorded backward has left to the next one, or forms it. The graph of that
  // backward holds W as well.
  static Tensor formed_weight(
      AutogradContext* ctx, const Tensor& v, const Tensor& g, const Tensor& n) {
    const auto left = ctx->saved_data.find("weight");
    if (left == ctx->saved_data.end()) return scaled_weight(v, g, n);
    const Tensor w = left->second.toTensor();
    ctx->saved_data.erase(left);
    return w;
  }

  // Computes dV = (dY s)ᵀ x - c V and dg from a = <dW, V>. dV starts as the last term, and the
  // product is added to it.
  static std::pair<Tensor, Tensor> grads_from_dots(
      const Tensor& a, const Tensor& scaled, const Tensor& few, const Tensor& x, const Tensor& v,
      const Tensor& g, const Tensor& n, double eps) {
    Tensor dv = at::empty_like(v), dg = at::empty_like(g);
    const bool single = x.size(0) == 1;
    const Tensor input = x.contiguous();
    AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "linear_backward", [&] {
      using T = scalar_t;
      const auto *vs = v.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(),
                 *ns = n.const_data_ptr<T>(), *as = a.const_data_ptr<T>(),
                 *ds = scaled.const_data_ptr<T>(), *xs = input.const_data_ptr<T>();
      auto *dvs = dv.mutable_data_ptr<T>(), *dgs = dg.mutable_data_ptr<T>();
      const int64_t length = v.size(1);
      std::vector<T> c(v.size(0));
      for (int64_t j = 0; j < v.size(0); ++j) {
        const Slope<T> slope(as[j], gs[j], ns[j], eps);
        dgs[j] = slope.dg, c[j] = slope.c;
      }
      if (few.defined()) {
        Panels<T> panels(length, x.size(0));
        pack(xs, panels);
        for_each_stack(v.size(0), panels, [&](int64_t first, int64_t count) {
          outer_product(dvs, few.const_data_ptr<T>(), first, count, panels, vs, c.data());
        });
        return;
      }
      for_each(v.size(0), length, [&](int64_t j) {
        const T* row = vs + j * length;
        T* to = dvs + j * length;
        if (single)
          for (int64_t i = 0; i < length; ++i) to[i] = ds[j] * xs[i] - c[j] * row[i];
        else
          scale(to, row, -c[j], length);
      });
    });
    if (!single && !few.defined()) dv.addmm_(scaled.t(), x);
    return {dv, dg};
  }
};

inline MaybeTensor linear(
    py::handle x, py::handle v, py::handle g, py::handle bias, py::handle dim, py::handle eps) {
  const auto t = operands(x, v, g, bias);
  if (!t || !t->v.is_contiguous()) return std::nullopt;
  const auto found = planned(0, *t, {}, dim, eps, false);
  if (!found) return std::nullopt;
  const Plan& plan = *found;
  const double least = py::cast<double>(eps);
  py::gil_scoped_release released;
  const bool recorded = t->needs_grad();
  std::optional<LinearResult> result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool keeps = plan.keeps && recorded && t->needs_weight_grad();
    const Tensor rows = as_rows(t->x);
    result = linear_forward(
        rows, t->v, t->g, t->bias, least, recorded ? plan.recorded : plan.forward, keeps);
    if (!result) return std::nullopt;
    if (t->x.dim() != 2) {
      auto shape = t->x.sizes().vec();
      shape.back() = t->v.size(0);
      result->y = result->y.view(shape);
    }
  }
  if (!recorded) return result->y;
  return with_weight_grad(
      Linear::apply(t->x, t->v, t->g, maybe(t->bias), *result, least, plan.backward), t->v);
}

}  // namespace wn_kernels
