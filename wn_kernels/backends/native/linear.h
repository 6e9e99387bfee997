// This file computes the linear layer y = x Wᵀ + b with W = s V. There are four variants:
//
//   late         y = (x Vᵀ) s + b,  dX = (dY s) V,  dV = (dY s)ᵀ x - c u, with a = sum dY (x Vᵀ)
//   own          the same in float32 or float64; no product comes from a library
//   materialize  W is formed in the forward and in the backward, in the dtype of x
//   widen        the same in float32, for an x in half precision
//
// The late backward computes a from the product x Vᵀ, if the forward kept it. Otherwise it forms dW
// and computes dV from it. In the variant `own`, x Vᵀ and the norms take one read of V, and so do dX
// and dV (products.h). The number of threads does not change a bit of any result.

#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "nodes.h"
#include "products.h"

namespace wn_kernels {

// In a pass over (M, N), a thread takes this many columns. They fill at least a cache line.
constexpr int64_t kColumns = 64;

struct LinearResult {
  Tensor y, n, product;  // the product x Vᵀ is defined only if it is kept
};

// Computes y = p s + b for p = x Vᵀ, which may be stored transposed. The bias has the dtype of n.
template <typename Y>
void epilogue(Tensor& y, const Tensor& p, const Tensor& g, const Tensor& n, const Tensor& b) {
  using T = Wide<Y>;
  const int64_t rows = p.size(0), columns = p.size(1), p_row = p.stride(0), p_column = p.stride(1);
  const auto* ps = p.const_data_ptr<Y>();
  const auto *gs = g.const_data_ptr<T>(), *ns = n.const_data_ptr<T>();
  const auto* bs = b.defined() ? b.const_data_ptr<T>() : nullptr;
  auto* ys = y.mutable_data_ptr<Y>();
  for_each((columns + kColumns - 1) / kColumns, rows * kColumns, [&](int64_t block) {
    const int64_t begin = block * kColumns, width = std::min(kColumns, columns - begin);
    T s[kColumns], shift[kColumns] = {};
    for (int64_t j = 0; j < width; ++j) s[j] = gs[begin + j] / ns[begin + j];
    if (bs) std::copy_n(bs + begin, width, shift);
    for (int64_t m = 0; m < rows; ++m) {
      const Y* in = ps + m * p_row + begin * p_column;
      Y* out = ys + m * columns + begin;
      if (p_column == 1)
        for_each_vector<T>(width, [&](int64_t j, auto count) {
          store(out + j, load(in + j, count) * load(s + j) + load(shift + j), count);
        });
      else
        for (int64_t j = 0; j < width; ++j)
          out[j] = static_cast<Y>(static_cast<T>(in[j * p_column]) * s[j] + shift[j]);
    }
  });
}

// Returns (D s) V.
inline Tensor scaled_product(const Tensor& d, const Tensor& s, const Tensor& v) {
  const Tensor out = at::empty({d.size(0), v.size(1)}, d.options());
  with_dtype(v.scalar_type(), [&](auto number) {
    using V = decltype(number);
    Panels<Wide<V>> q(v.size(1), d.size(0));
    columns_product(
        q, v.const_data_ptr<V>(), v.size(0), turned(d.const_data_ptr<Wide<V>>(), d.size(1)),
        s.const_data_ptr<Wide<V>>());
    unpack(q, out.mutable_data_ptr<Wide<V>>());
  });
  return out;
}

// One tile of dᵀ V takes this many rows and columns of V. Its sums stay in the first-level cache.
constexpr int64_t kTileOfRows = 256;
constexpr int64_t kTileOfColumns = 1024;

// Computes to += dᵀ V for some rows and `width` columns of V. It takes eight rows at once, because
// every pass loads and stores the sums.
template <typename V>
void add_scaled_rows(
    Wide<V>* to, const Wide<V>* d, const V* v, int64_t rows, int64_t length, int64_t width) {
  using T = Wide<V>;
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8, d += 8, v += 8 * length)
    for_each_vector<T>(width, [=](int64_t k, auto count) {
      const auto term = [=](int64_t r) { return d[r] * load(v + r * length + k, count); };
      const Vector<T> low = (term(0) + term(1)) + (term(2) + term(3)),
                      high = (term(4) + term(5)) + (term(6) + term(7));
      store(to + k, load(to + k, count) + (low + high), count);
    });
  for (; row < rows; ++row, ++d, v += length)
    for_each_vector<T>(width, [=](int64_t k, auto count) {
      store(to + k, load(to + k, count) + *d * load(v + k, count), count);
    });
}

// Returns dᵀ V for a row dᵀ. V is read once, in tiles. Their sums are added in order, whichever
// thread took them.
template <typename V>
Tensor one_row_product(const Tensor& d, const Tensor& v) {
  using T = Wide<V>;
  const int64_t rows = v.size(0), length = v.size(1);
  const int64_t stacks = (rows + kTileOfRows - 1) / kTileOfRows,
                strips = (length + kTileOfColumns - 1) / kTileOfColumns;
  const Tensor out = at::empty({1, length}, d.options());
  const std::unique_ptr<T[]> rest(new T[(stacks - 1) * length]);
  const auto* ds = d.const_data_ptr<T>();
  const auto* vs = v.const_data_ptr<V>();
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

// Returns D V in the dtype of D, which is that of V or a wider one.
inline Tensor rows_times(const Tensor& d, const Tensor& v) {
  if (d.size(0) > 1) return at::mm(d, v);
  Tensor out;
  with_dtype(v.scalar_type(), [&](auto number) {
    out = one_row_product<decltype(number)>(as(d, wide_dtype(v)), v);
  });
  return as(out, d.scalar_type());
}

// Computes db = sum dY, and scaled = dY s and a = sum dY p if they are given, in one pass over dY. The
// sums run over the rows.
template <typename Y>
void column_pass(
    const Tensor& dy, Tensor& db, Tensor& scaled, Tensor& a, const Tensor& p, const Tensor& g,
    const Tensor& n) {
  using T = Wide<Y>;
  const int64_t rows = dy.size(0), columns = dy.size(1);
  const bool scales = scaled.defined(), dots = a.defined();
  const int64_t p_row = dots ? p.stride(0) : 0, p_column = dots ? p.stride(1) : 0;
  const auto* dys = dy.const_data_ptr<Y>();
  const auto *gs = scales ? g.const_data_ptr<T>() : nullptr,
             *ns = scales ? n.const_data_ptr<T>() : nullptr,
             *ps = dots ? p.const_data_ptr<T>() : nullptr;
  auto* out = scales ? scaled.mutable_data_ptr<Y>() : nullptr;
  auto *dbs = db.mutable_data_ptr<T>(), *as = dots ? a.mutable_data_ptr<T>() : nullptr;
  for_each((columns + kColumns - 1) / kColumns, rows * kColumns, [&](int64_t block) {
    const int64_t begin = block * kColumns, width = std::min(kColumns, columns - begin);
    T s[kColumns], sums[kColumns] = {}, products[kColumns] = {};
    for (int64_t j = 0; scales && j < width; ++j) s[j] = gs[begin + j] / ns[begin + j];
    for (int64_t m = 0; m < rows; ++m) {
      const Y* row = dys + m * columns + begin;
      for_each_vector<T>(width, [&](int64_t j, auto count) {
        const Vector<T> value = load(row + j, count);
        store(sums + j, load(sums + j) + value);
        if (scales) store(out + m * columns + begin + j, value * load(s + j), count);
      });
      if (dots) {
        const T* with = ps + m * p_row + begin * p_column;
        for (int64_t j = 0; j < width; ++j)
          products[j] += static_cast<T>(row[j]) * with[j * p_column];
      }
    }
    std::copy_n(sums, width, dbs + begin);
    if (dots) std::copy_n(products, width, as + begin);
  });
}

// A part of x has at most this many rows and bytes, so that its products with a stack of rows of V stay in
// a thread's cache.
constexpr int64_t kPartRows = 1024;
constexpr int64_t kPartBytes = 1 << 20;

// Returns how many parts the rows of x are taken in. If threads share them, there are as many parts for
// each thread, as far as each part has kPartColumns rows.
inline int64_t parts_of(int64_t rows, int64_t row_bytes, bool is_shared) {
  const int64_t most = std::clamp<int64_t>(kPartBytes / row_bytes, kPartColumns, kPartRows);
  const int64_t parts = (rows + most - 1) / most, threads = at::get_num_threads();
  if (!is_shared) return parts;
  return std::min((parts + threads - 1) / threads * threads, rows / kPartColumns);
}

// Computes y, n and, if it is kept, x Vᵀ by this library's own products, all of them in the dtype of
// n. It returns nothing if a norm is out of range.
template <typename V>
std::optional<LinearResult> own_forward(
    const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias,
    const NormOptions& options, bool keeps) {
  using T = Wide<V>;
  const int64_t rows = x.size(0), outputs = v.size(0), inputs = v.size(1);
  const bool is_shared = shares_columns(rows, outputs);
  LinearResult out;
  if (is_shared) {
    const auto n = norms(v, g, options);
    if (!n) return std::nullopt;
    out.n = *n;
  } else {
    out.n = empty_norms(v, g);
  }
  out.y = at::empty({rows, outputs}, x.options());
  if (keeps) out.product = at::empty({outputs, rows}, x.options()).t();
  const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
  const auto *xs = x.const_data_ptr<T>(), *bs = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  auto *ys = out.y.mutable_data_ptr<T>(), *ns = out.n.mutable_data_ptr<T>(),
       *kept = keeps ? out.product.mutable_data_ptr<T>() : nullptr;
  Norms<T> all(ns, options);
  const auto scale = [&](int64_t j, double partial) {
    return static_cast<T>(gs[j]) / all.set(j, partial, vs + j * inputs, inputs);
  };
  if (rows == 1) {
    for_each(outputs, inputs, [&](int64_t j) {
      const auto [partial, product] =
          partial_and_dot(options.norm, vs + j * inputs, xs, inputs);
      const auto p = static_cast<T>(product);
      ys[j] = p * scale(j, partial) + (bs ? bs[j] : 0);
      if (kept) kept[j] = p;
    });
    return all.in_range() ? std::make_optional(out) : std::nullopt;
  }
  const int64_t parts = parts_of(rows, inputs * sizeof(T), is_shared);
  for_each_part<T>(rows, parts, is_shared, [&](int64_t i, int64_t top, int64_t height) {
    // The first part has the norms as well, if they are not yet known.
    const auto norm = is_shared || i ? std::nullopt : std::make_optional(options.norm);
    Strips<T> strips(inputs, height);
    strips.fill([=](int64_t k, int64_t m) { return xs + (top + m) * inputs + k; });
    for_each_stack<T>(outputs, inputs * height, [&](int64_t first, int64_t count) {
      rows_product(vs, first, count, strips, norm, [&](const T* products, const double* partials) {
        alignas(kVectorBytes) T scales[kStack<T>] = {}, shifts[kStack<T>] = {};
        for (int64_t r = 0; r < count; ++r)
          scales[r] = norm ? scale(first + r, partials[r])
                           : static_cast<T>(gs[first + r]) / ns[first + r];
        if (bs) std::copy_n(bs + first, count, shifts);
        for_each_column(
            products, strips.sums(), count, height,
            [&](int64_t m, int64_t r, Vector<T> p, auto width) {
              T* to = ys + (top + m) * outputs + first + r;
              store(to, multiply_add(p, load(scales + r), load(shifts + r)), width);
            });
        for (int64_t r = 0; kept && r < count; ++r)
          std::copy_n(products + r * strips.sums(), height, kept + (first + r) * rows + top);
      });
    });
  });
  return all.in_range() ? std::make_optional(out) : std::nullopt;
}

// Returns whether the product of so many rows of x has V on its left, as `is_left` of limits.py does.
inline bool is_left(int64_t rows) {
  if (rows >= kLeftRowsAlone) return rows < kLeftRows;
  const bool fits = rows <= kLeftGroup / 2 || rows % kLeftGroup == 0;
  return rows > 1 && fits && at::get_num_threads() > 1;
}

inline std::optional<LinearResult> linear_forward(
    const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& bias,
    const NormOptions& options, Variant variant, bool keeps) {
  const auto dtype = x.scalar_type(), wide = wide_dtype(v);
  if (variant == Variant::materialize || variant == Variant::widen) {
    RECORD_FUNCTION(
        variant == Variant::widen ? "wn_kernels::linear, widen" : "wn_kernels::linear, materialize",
        {});
    const auto of_product = product_dtype(variant, x, v);
    auto result = weight(passing_weight(v, of_product), v, g, options);
    if (!result) return std::nullopt;
    const Tensor y =
        at::linear(as(x, of_product), result->first, maybe(as(bias, of_product)));
    return LinearResult{as(y, dtype), result->second, Tensor()};
  }
  RECORD_FUNCTION("wn_kernels::linear, scaled", {});
  const Tensor shift = as(bias, wide);
  std::optional<LinearResult> out;
  if (variant == Variant::own) {
    with_dtype(v.scalar_type(), [&](auto number) {
      out = own_forward<decltype(number)>(as(x, wide).contiguous(), v, g, shift, options, keeps);
    });
    if (out) out->y = as(out->y, dtype);
    return out;
  }
  const auto n = norms(v, g, options);
  if (!n) return std::nullopt;
  const bool left = dtype == wide && is_left(x.size(0));
  const Tensor p = left ? at::mm(v, x.t()).t() : at::mm(x, v.t());
  out = LinearResult{Tensor(), *n, keeps ? p : Tensor()};
  out->y = !keeps && p.is_contiguous() ? p : at::empty(p.sizes(), x.options());
  with_dtype(dtype, [&](auto number) {
    epilogue<decltype(number)>(out->y, p, as(g, wide), *n, shift);
  });
  return out;
}

// (dX, dW, db) of the plain layer, by operations that PyTorch differentiates. The products and dW have
// this dtype, which is that of W.
inline std::tuple<Tensor, Tensor, Tensor> plain_linear_grads(
    const Tensor& dy, const Tensor& x, const Tensor& w, at::ScalarType dtype, bool needs_x,
    bool needs_w, bool needs_bias, at::ScalarType bias_dtype) {
  const Tensor rows = as(as_rows(dy), dtype);
  Tensor dx, dw, db;
  if (needs_x) dx = as(rows.mm(w), x.scalar_type());
  if (needs_x && x.dim() != 2) dx = dx.view(x.sizes());
  if (needs_w) dw = rows.t().mm(as(as_rows(x), dtype));
  if (needs_bias) db = bias_grad(as_rows(dy), 1, bias_dtype);
  return {dx, dw, db};
}

struct Linear : Function<Linear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& v, const Tensor& g,
      const MaybeTensor& bias, const LinearResult& result, const NormOptions& options,
      Variant variant) {
    if (bias) ctx->saved_data["bias"] = static_cast<int64_t>(bias->scalar_type());
    ctx->save_for_backward({x, v, g, result.n, result.product});
    save(ctx, options);
    ctx->saved_data["variant"] = static_cast<int64_t>(variant);
    ctx->set_materialize_grads(false);
    return result.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &v = saved[1], &g = saved[2], &n = saved[3], &p = saved[4];
    const NormOptions options = saved_options(ctx);
    const auto bias = ctx->saved_data.find("bias");
    const auto variant = static_cast<Variant>(ctx->saved_data["variant"].toInt());
    const bool needs_x = ctx->needs_input_grad(0), needs_v = ctx->needs_input_grad(1),
               needs_g = ctx->needs_input_grad(2), needs_weight = needs_v || needs_g,
               needs_bias = bias != ctx->saved_data.end() && ctx->needs_input_grad(3);
    const auto bias_dtype =
        needs_bias ? static_cast<at::ScalarType>(bias->second.toInt()) : at::kFloat;
    variable_list out(7);
    const LayerGrads given(grads);
    if (given.are_undefined()) return out;
    if (!given.are_plain()) {
      auto found = composite_grads(
          given.dy, given.dw, input, v, g, std::nullopt, options, {needs_x, needs_v, needs_g});
      std::move(found.begin(), found.end(), out.begin());
      if (needs_bias && given.dy.defined())
        out[3] = bias_grad(given.dy, given.dy.dim() - 1, bias_dtype);
      return out;
    }
    const auto dtype = product_dtype(variant, input, v);
    if (at::GradMode::is_enabled()) {
      RECORD_FUNCTION("wn_kernels::linear_backward, recorded", {});
      const WithoutAutocast no_autocast;
      Tensor dw;
      if (given.dy.defined()) {
        Tensor w;
        if (needs_x) {
          w = left_weight(ctx);
          if (!w.defined()) w = scaled_weight(empty_as(v, dtype), v, g, n);
        }
        if (needs_x && forms_weight(variant)) ctx->saved_data["weight"] = w.detach();
        if (needs_x) w = recorded_weight(w, v, g);
        std::tie(out[0], dw, out[3]) = plain_linear_grads(
            given.dy, input, w, dtype, needs_x, needs_weight, needs_bias, bias_dtype);
      }
      if (needs_weight) {
        auto found = recorded_weight_grads(given.total(dw), v, g, n, options);
        std::move(found.begin(), found.end(), out.begin() + 1);
      }
      return out;
    }
    const BelowAutograd below;
    if (!given.dy.defined()) {
      std::tie(out[1], out[2]) = weight_grads(given.dw, v, g, n, options, false);
      return out;
    }
    const Tensor dy = as_rows(given.dy).contiguous(), x = as_rows(input);
    Tensor dx, db, scaled, a;
    const auto pass_over = [&](const Tensor& grad) {
      db = at::empty({grad.size(1)}, n.options());
      with_dtype(grad.scalar_type(), [&](auto number) {
        column_pass<decltype(number)>(grad, db, scaled, a, p, as(g, n.scalar_type()), n);
      });
    };
    const bool own = variant == Variant::own;
    if (own || variant == Variant::late) {
      RECORD_FUNCTION("wn_kernels::linear_backward, scaled", {});
      const Tensor grad = own ? as(dy, n.scalar_type()) : dy;
      // The products in products.h scale the rows of V themselves.
      const bool by_products = own && dy.size(0) > 1;
      if (!by_products) scaled = empty_as(grad);
      if (p.defined()) a = at::empty_like(n);
      if (needs_bias || scaled.defined() || a.defined()) pass_over(grad);
      const Tensor s = by_products ? as(g, n.scalar_type()).view(-1) / n.view(-1) : Tensor();
      if (needs_x) dx = by_products ? scaled_product(grad, s, v) : rows_times(scaled, v);
      if (p.defined() && !given.dw.defined())
        std::tie(out[1], out[2]) =
            grads_from_dots(a, by_products ? grad : scaled, s, x, v, g, n, options);
      else if (needs_weight && own && !given.dw.defined())
        std::tie(out[1], out[2]) =
            own_weight_grads(grad, as(x, n.scalar_type()), v, g, n, options);
    } else {
      RECORD_FUNCTION(
          variant == Variant::widen ? "wn_kernels::linear_backward, widen"
                                    : "wn_kernels::linear_backward, materialize",
          {});
      if (needs_bias) pass_over(dy);
      if (needs_x) {
        Tensor w = left_weight(ctx);
        if (!w.defined()) w = scaled_weight(passing_weight(v, dtype), v, g, n);
        dx = rows_times(as(dy, dtype), w);
      }
    }
    if (needs_weight && !out[1].defined()) {
      const Tensor dw = at::mm(as(dy, dtype).t(), as(x, dtype));
      std::tie(out[1], out[2]) = weight_grads(given.total(dw), v, g, n, options, true);
    }
    if (needs_x) out[0] = as(dx, input.scalar_type()).view(input.sizes());
    if (needs_bias) out[3] = as(db, bias_dtype);
    return out;
  }

  // Returns the W that a recorded backward has left to the next one, if there is one. The graph of
  // that backward holds W as well.
  static Tensor left_weight(AutogradContext* ctx) {
    const auto left = ctx->saved_data.find("weight");
    if (left == ctx->saved_data.end()) return {};
    const Tensor w = left->second.toTensor();
    ctx->saved_data.erase(left);
    return w;
  }

  // Computes dV = (dY s)ᵀ x - c u and dg from a = <dW, V>, all in one dtype. If s is given, d is dY, and
  // the product subtracts the last term. Otherwise d is dY s, and dV starts as the last term.
  static std::pair<Tensor, Tensor> grads_from_dots(
      const Tensor& a, const Tensor& d, const Tensor& s, const Tensor& x, const Tensor& v,
      const Tensor& g, const Tensor& n, const NormOptions& options) {
    Tensor dv = empty_as(v), dg = empty_as(g);
    const Tensor input = x.contiguous();
    AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "linear_backward", [&] {
      with_norm(options.norm, [&](auto norm) {
        grads_from_dots<decltype(norm)::value, scalar_t>(
            dv, dg, a, d, s, input, v, g, n, options);
      });
    });
    if (x.size(0) > 1 && !s.defined()) dv.addmm_(d.t(), x);
    return {dv, dg};
  }

  template <Norm norm, typename T>
  static void grads_from_dots(
      const Tensor& dv, const Tensor& dg, const Tensor& a, const Tensor& d, const Tensor& s,
      const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& n,
      const NormOptions& options) {
    const auto *vs = v.const_data_ptr<T>(), *gs = g.const_data_ptr<T>(),
               *ns = n.const_data_ptr<T>(), *as = a.const_data_ptr<T>(),
               *ds = d.const_data_ptr<T>(), *xs = x.const_data_ptr<T>();
    auto *dvs = dv.mutable_data_ptr<T>(), *dgs = dg.mutable_data_ptr<T>();
    const int64_t outputs = v.size(0), length = v.size(1);
    std::vector<T> c(outputs);
    // Under linf, write(i, count) is called for the groups of a long row that have no ties.
    const auto set_slope = [&](int64_t j, const auto& write) {
      Ties<T> ties;
      if (norm == Norm::linf) ties.find(vs + j * length, ns[j], length, write);
      const Slope<T> slope(as[j], ties.count(), gs[j], ns[j], options);
      dgs[j] = slope.dg, c[j] = slope.c;
      return ties;
    };
    if (s.defined()) {
      Panels<T> panels(length, x.size(0));
      pack(xs, panels);
      for_each_stack<T>(outputs, length * panels.columns, [&](int64_t first, int64_t count) {
        for (int64_t j = first; j < first + count; ++j) set_slope(j, Ignore{});
        outer_product<norm>(
            dvs, turned(ds, outputs), first, count, panels, vs, ns, c.data(), s.const_data_ptr<T>());
      });
      return;
    }
    for_each(outputs, length, [&](int64_t j) {
      const T* row = vs + j * length;
      T* to = dvs + j * length;
      if (x.size(0) == 1) {
        const auto ties = set_slope(j, scale_part(to, ds[j], xs));
        difference<norm>(to, xs, row, ns[j], ds[j], c[j], ties, length);
      } else {
        const auto ties = set_slope(
            j, [=](int64_t i, int64_t count) { std::fill_n(to + i, count, T(0)); });
        scaled_slope<norm>(to, row, ns[j], -c[j], ties, length);
      }
    });
  }

  // Computes (dV, dg) from d = dY and x, which have the dtype of n. Rows of dW = dᵀ x stay in the cache
  // until their dV is written.
  static std::pair<Tensor, Tensor> own_weight_grads(
      const Tensor& d, const Tensor& x, const Tensor& v, const Tensor& g, const Tensor& n,
      const NormOptions& options) {
    Tensor dv = empty_as(v), dg = empty_as(g);
    const Tensor input = x.contiguous();
    const int64_t rows = x.size(0), outputs = v.size(0), length = v.size(1);
    with_dtype(v.scalar_type(), [&](auto number) {
      using V = decltype(number);
      using T = Wide<V>;
      const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
      const auto *ns = n.const_data_ptr<T>(), *ds = d.const_data_ptr<T>(),
                 *xs = input.const_data_ptr<T>();
      auto *dvs = dv.mutable_data_ptr<V>(), *dgs = dg.mutable_data_ptr<V>();
      if (rows == 1) {
        with_norm(options.norm, [&](auto constant) {
          constexpr Norm norm = decltype(constant)::value;
          for_each(outputs, length, [&](int64_t j) {
            const V* row = vs + j * length;
            Ties<V> ties;
            const T s = gs[j] / ns[j] * ds[j];
            const double a =
                dot_and_scale<norm>(dvs + j * length, s, xs, row, ns[j], ties, length);
            const Slope<T> slope(ds[j] * a, ties.count(), gs[j], ns[j], options);
            dgs[j] = static_cast<V>(slope.dg);
            difference<norm>(dvs + j * length, xs, row, ns[j], s, slope.c, ties, length);
          });
        });
        return;
      }
      Panels<T> panels(length, rows);
      pack(xs, panels);
      for_each_stack<T>(outputs, length * panels.columns, [&](int64_t first, int64_t count) {
        weight_rows(
            dvs, dgs, turned(ds, outputs), vs, gs, ns, options, first, count, panels);
      });
    });
    return {dv, dg};
  }
};

inline MaybeTensor linear(
    py::handle x, py::handle v, py::handle g, py::handle bias, py::handle dim, py::handle eps,
    py::handle norm) {
  auto t = operands(x, v, g, bias);
  const auto named = norm_of(norm);
  if (!t || !named || !t->v.is_contiguous()) return std::nullopt;
  t->x = as_autocast(t->x);
  const auto found = planned(0, *t, py::tuple(), dim, eps, *named, false);
  if (!found) return std::nullopt;
  const Plan& plan = *found;
  const NormOptions options{py::cast<double>(eps), *named};
  py::gil_scoped_release released;
  const bool recorded = t->needs_grad();
  std::optional<LinearResult> result;
  {
    const BelowAutograd below;
    const bool keeps = plan.keeps && recorded && t->needs_weight_grad();
    const Tensor rows = as_rows(t->x);
    result = linear_forward(
        rows, t->v, t->g, t->bias, options, recorded ? plan.recorded : plan.forward, keeps);
    if (!result) return std::nullopt;
    if (t->x.dim() != 2) {
      auto shape = t->x.sizes().vec();
      shape.back() = t->v.size(0);
      result->y = result->y.view(shape);
    }
  }
  if (!recorded) return result->y;
  return with_weight_grad(
      Linear::apply(t->x, t->v, t->g, maybe(t->bias), *result, options, plan.backward), t->v);
}

}  // namespace wn_kernels
