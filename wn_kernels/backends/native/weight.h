// This file computes the norms of the weight, W and its gradients.
//
//   n_j = ||V_j||   s = g / n   W = s V   dg_j = <dW_j, V_j> / n_j   dV = s dW - c u,  c = s dg / d
//
// norm.h has u and d of every norm, whose slope is u / d.

#pragma once

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "columns.h"
#include "memory.h"
#include "rows.h"

namespace wn_kernels {

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

// Returns memory for the norms.
inline Tensor empty_norms(const Tensor& v, const Tensor& g) {
  return empty_as(g, wide_dtype(v));
}

// Returns n, or nothing if a norm is out of range.
inline MaybeTensor norms(const Tensor& v, const Tensor& g, const NormOptions& options) {
  const Extents e(v, g);
  Tensor n = empty_norms(v, g);
  bool in_range = true;
  with_dtype(v.scalar_type(), [&](auto number) {
    using V = decltype(number);
    const auto* vs = v.const_data_ptr<V>();
    Norms<Wide<V>> all(n.mutable_data_ptr<Wide<V>>(), options);
    if (e.columns) {
      all.set_all(
          column_partials(options.norm, vs, e.of), [&](int64_t j) { return is_zero(vs, j, e.of); });
    } else {
      for_each(e.count, e.length, [&](int64_t j) {
        const auto* row = vs + j * e.length;
        all.set(j, partial(options.norm, row, e.length), row, e.length);
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
      std::vector<T> each(e.count);
      for (int64_t j = 0; j < e.count; ++j) each[j] = s(j);
      const auto all = spread(e.of, std::move(each));
      const T* scales = all.data();
      for_each_row_again(e.of, [=](int64_t i) {
        scale(ws + i * width, vs + i * width, scales, width);
      });
    } else {
      for_each(e.count, e.length, [&](int64_t j) {
        scale(ws + j * e.length, vs + j * e.length, s(j), e.length);
      });
    }
  });
  return w;
}

// The norms of rows of so many elements are taken before the first of these rows is scaled, so that no
// sum has to wait for the scale of the row before it. The rows stay in the first cache meanwhile.
constexpr int64_t kAhead = 2048;

// Computes the rows of W and n from `begin` to `end`. Every row of V is read from memory once. Returns
// whether all norms are in range.
inline bool weight_rows(
    const Tensor& w, const Tensor& n, const Tensor& v, const Tensor& g, const NormOptions& options,
    int64_t begin, int64_t end) {
  const int64_t length = v.numel() / n.numel();
  bool in_range = true;
  with_dtypes(w.scalar_type(), v.scalar_type(), [&](auto to, auto from) {
    using W = decltype(to);
    using V = decltype(from);
    using T = Wide<V>;
    const auto *vs = v.const_data_ptr<V>(), *gs = g.const_data_ptr<V>();
    auto* ws = w.mutable_data_ptr<W>();
    auto* ns = n.mutable_data_ptr<T>();
    Norms<T> all(ns, options);
    const int64_t count = std::max<int64_t>(1, kAhead / length);
    for (int64_t first = begin; first < end; first += count) {
      const int64_t last = std::min(first + count, end);
      for (int64_t j = first; j < last; ++j) {
        const auto* row = vs + j * length;
        all.set(j, partial(options.norm, row, length), row, length);
      }
      for (int64_t j = first; j < last; ++j)
        scale(ws + j * length, vs + j * length, static_cast<T>(gs[j]) / ns[j], length);
    }
    in_range = all.in_range();
  });
  return in_range;
}

// Computes W in its memory. Returns it and n, or nothing if a norm is out of range. If slices are
// rows, V is read from memory once.
inline std::optional<std::pair<Tensor, Tensor>> weight(
    const Tensor& w, const Tensor& v, const Tensor& g, const NormOptions& options) {
  const Extents e(v, g);
  if (e.columns) {
    const auto n = norms(v, g, options);
    if (!n) return std::nullopt;
    return std::make_pair(scaled_weight(w, v, g, *n), *n);
  }
  auto result = std::make_pair(w, empty_norms(v, g));
  std::atomic<bool> in_range{true};
  at::parallel_for(0, e.count, grain(e.length), [&](int64_t begin, int64_t end) {
    if (!weight_rows(result.first, result.second, v, g, options, begin, end)) in_range = false;
  });
  if (!in_range) return std::nullopt;
  return result;
}

// Computes the rows of dV and dg from `begin` to `end`. dV may be dW.
inline void weight_grad_rows(
    const Tensor& dv, const Tensor& dg, const Tensor& dw, const Tensor& v, const Tensor& g,
    const Tensor& n, const NormOptions& options, int64_t begin, int64_t end) {
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
          static_cast<V>(weight_grad(dvs + at, dws + at, vs + at, gs[j], ns[j], options, length));
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

// The same of the columns of dV, and of all dg.
template <Norm norm, typename W, typename V>
void weight_grad_columns(
    V* dv, V* dg, const W* dw, const V* v, const V* g, const Wide<V>* n, const NormOptions& options,
    const Columns& of) {
  using T = Wide<V>;
  const auto all_n = spread(of, std::vector<T>(n, n + of.count));
  std::vector<T> s(of.count), c(of.count);
  for (int64_t j = 0; j < of.count; ++j) s[j] = g[j] / n[j];
  const auto all_s = spread(of, std::move(s));
  const T *ns = all_n.data(), *ss = all_s.data();
  const int64_t width = of.width();
  std::array<std::vector<double>, 2> found;  // the dots and, under linf, the ties
  std::optional<ColumnTies<V>> ties;
  if constexpr (norm == Norm::linf)
    found = ties.emplace(v, all_n, of).dots_and_scale(dv, ss, dw);
  else
    found = {column_dots(dw, v, of), std::vector<double>(of.count)};
  for (int64_t j = 0; j < of.count; ++j) {
    const Slope<T> slope(found[0][j], found[1][j], g[j], n[j], options);
    dg[j] = static_cast<V>(slope.dg), c[j] = slope.c;
  }
  const auto all_c = spread(of, std::move(c));
  const auto difference = [=, cs = all_c.data()](int64_t i, int64_t j, auto count) {
    const auto minus_cu = slope_at<norm>(-load(cs + j, count), v + i, load(ns + j, count), count);
    store(dv + i, multiply_add(load(ss + j, count), load(dw + i, count), minus_cu), count);
  };
  if (ties) return ties->for_each_row(difference);
  for_each_row_again(of, [=](int64_t row) {
    for_each_vector<T>(
        width, [=](int64_t j, auto count) { difference(row * width + j, j, count); });
  });
}

// Computes (dV, dg), in the dtype of V, from dW. dV takes the memory of dW if `overwrite` is true
// and the dtypes are the same.
inline std::pair<Tensor, Tensor> weight_grads(
    const Tensor& grad, const Tensor& v, const Tensor& g, const Tensor& n,
    const NormOptions& options, bool overwrite) {
  const Extents e(v, g);
  const auto [dw, dv, dg] = empty_weight_grads(grad, v, g, overwrite);
  if (!e.columns) {
    const auto grad_rows = [&, &dw = dw, &dv = dv, &dg = dg](int64_t begin, int64_t end) {
      weight_grad_rows(dv, dg, dw, v, g, n, options, begin, end);
    };
    at::parallel_for(0, e.count, grain(e.length), grad_rows);
    return {dv, dg};
  }
  with_dtypes(dw.scalar_type(), v.scalar_type(), [&, &dw = dw, &dv = dv, &dg = dg](
                                                     auto of_dw, auto of_v) {
    using W = decltype(of_dw);
    using V = decltype(of_v);
    with_norm(options.norm, [&](auto norm) {
      weight_grad_columns<decltype(norm)::value>(
          dv.mutable_data_ptr<V>(), dg.mutable_data_ptr<V>(), dw.const_data_ptr<W>(),
          v.const_data_ptr<V>(), g.const_data_ptr<V>(), n.const_data_ptr<Wide<V>>(), options, e.of);
    });
  });
  return {dv, dg};
}

}  // namespace wn_kernels
