// This file multiplies a weight by a matrix of few columns. Each product reads the weight once. A
// matmul or a convolution of a library first copies the weight into a layout of its own.
//
//   rows_product     P = V B          (rows, columns), in rows_product.h
//   columns_product  Q += Vᵀ D        (length, columns)
//   outer_product    dW = D Bᵀ        (rows, length)
//
// V (rows, length) is stored row by row. B and Q (length, columns) are stored in panels. D (rows, columns)
// is given by rows or by columns.

#pragma once

#include "rows_product.h"

namespace wn_kernels {

// --- Q += Vᵀ D -----------------------------------------------------------------------------------

// Returns how many panels a thread takes. A group is long enough to read a row as a stream, and
// there are enough groups for many threads.
inline int64_t panel_group(int64_t count) { return std::clamp<int64_t>(count / 8, 1, 16); }

// Calls f(first panel, end) for every group of panels.
template <typename T, typename F>
void for_each_panel_group(const Panels<T>& q, int64_t rows, const F& f) {
  const int64_t group = panel_group(q.count);
  for_each((q.count + group - 1) / group, group * kPanel<T> * rows, [&](int64_t i) {
    f(i * group, std::min(q.count, (i + 1) * group));
  });
}

// Computes Q += Vᵀ D for `rows` rows of V and D, and for some panels and columns of Q.
template <typename V>
void columns_product(
    Panels<Wide<V>>& q, int64_t begin, int64_t end, int64_t left, int64_t right, const V* v,
    int64_t rows, const Stacked<Wide<V>, kStackedRows>& d) {
  using T = Wide<V>;
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t first = 0; first < rows; first += kStackedRows) {
    const int64_t count = std::min<int64_t>(kStackedRows, rows - first);
    const RowBlock<V, kStackedRows> block(v + first * q.length, count, q.length, end);
    // The processor does not fetch ahead from rows to those below them.
    const bool fetches = left == 0 && first + count < rows;
    const auto fetch = [=, &q](int64_t i, int64_t r) {
      const V* from = v + std::min(first + kStackedRows + r, rows - 1) * q.length + i * kPanel<T>;
      for (int64_t k = 0; k < kPanel<T>; k += kCacheLine / sizeof(V)) prefetch(from + k);
    };
    block.for_each_panel(begin, end, [&](int64_t i, const auto& from) {
      if (fetches && i < q.full)
#pragma GCC unroll 8
        for (int64_t r = 0; r < kStackedRows; ++r) fetch(i, r);
      Vector<T> value[kStackedRows][2];
#pragma GCC unroll 8
      for (int r = 0; r < kStackedRows; ++r)
        value[r][0] = load(from[r]), value[r][1] = load(from[r] + lanes);
      T* to = q.panel(i) + left * kPanel<T>;
      const T* factor = d.stack(first) + left * kStackedRows;
      for (int64_t j = left; j < right; ++j, to += kPanel<T>, factor += kStackedRows) {
        Vector<T> low = load(to), high = load(to + lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kStackedRows; ++r)
          low += value[r][0] * factor[r], high += value[r][1] * factor[r];
        store(to, low), store(to + lanes, high);
      }
    });
  }
}

// So many columns of a panel stay in the first-level cache.
constexpr int64_t kPanelColumns = 64;

// Does the same for all columns. Many of them are taken in parts, a panel after the other.
template <typename V>
void columns_product(
    Panels<Wide<V>>& q, int64_t begin, int64_t end, const V* v, int64_t rows,
    const Stacked<Wide<V>, kStackedRows>& d) {
  if (q.columns <= kPanelColumns) return columns_product(q, begin, end, 0, q.columns, v, rows, d);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t left = 0; left < q.columns; left += kPanelColumns)
      columns_product(q, i, i + 1, left, std::min(q.columns, left + kPanelColumns), v, rows, d);
}

// This many bytes of D stay in a thread's cache while all of its panels take them.
constexpr int64_t kFactorBytes = 1 << 17;

// This many bytes of Q stay in the first-level cache. The more panels a thread takes at once, the longer it
// reads a row as a stream.
constexpr int64_t kSumBytes = 24 << 10;

// Computes Q = Vᵀ D. The rows of D may have factors.
template <typename V>
void columns_product(
    Panels<Wide<V>>& q, const V* v, int64_t rows, const Strided<Wide<V>>& d,
    const Wide<V>* factors = nullptr) {
  using T = Wide<V>;
  const int64_t columns = q.columns, row = columns * static_cast<int64_t>(sizeof(T));
  const int64_t stacks = std::max<int64_t>(1, kFactorBytes / (kStackedRows * row));
  const int64_t chunk = std::min(stacks * kStackedRows, rows);
  const int64_t group = panel_group(q.count), groups = (q.count + group - 1) / group;
  const int64_t at_once = std::max(group, kSumBytes / (kPanel<T> * row));
  q.zero();
  at::parallel_for(
      0, groups, grain(group * kPanel<T> * rows * columns), [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < rows; first += chunk) {
          const int64_t count = std::min(chunk, rows - first);
          Stacked<T, kStackedRows> stacked(count, columns);
          stacked.fill(d, first, count, factors);
          const int64_t last = std::min(q.count, end * group);
          for (int64_t i = begin * group; i < last; i += at_once)
            columns_product(
                q, i, std::min(last, i + at_once), v + first * q.length, count, stacked);
        }
      });
}

// --- dW = D Bᵀ -----------------------------------------------------------------------------------

// Computes `count` rows of dW = D Bᵀ from row `first` on. If V is given, it subtracts c u, where u is
// that of V, from their products with factors.
template <Norm norm = Norm::l2, typename T>
void outer_product(
    T* dw, const Strided<T>& d, int64_t first, int64_t count, const Panels<T>& b,
    const T* v = nullptr, const T* n = nullptr, const T* c = nullptr, const T* factors = nullptr) {
  constexpr int64_t lanes = Lanes<T>::count;
  constexpr int tall = kStackedRows;  // fewer reads of B for each product
  const int64_t columns = b.columns;
  Stacked<T, tall> stacked(count, columns);
  stacked.fill(d, first, count, factors);
  const auto tile = [&](int64_t top, int64_t i) {
    Vector<T> low[tall] = {}, high[tall] = {};
    const T *from = b.panel(i), *factor = stacked.stack(top);
    for (int64_t j = 0; j < columns; ++j, from += kPanel<T>, factor += tall) {
      const Vector<T> first_half = load(from), second_half = load(from + lanes);
#pragma GCC unroll 8
      for (int r = 0; r < tall; ++r)
        low[r] += first_half * factor[r], high[r] += second_half * factor[r];
    }
    // The loop is unrolled, so that the sums stay in registers.
#pragma GCC unroll 8
    for (int r = 0; r < tall; ++r) {
      if (top + r >= count) break;
      const int64_t row = first + top + r, at = row * b.length + i * kPanel<T>;
      const auto write = [&](int64_t l, Vector<T> product, auto part) {
        const auto cu = [&] { return times_slope<norm>(c[row], load(v + at + l, part), n[row]); };
        store(dw + at + l, v ? product - cu() : product, part);
      };
      if (const int64_t width = b.length - i * kPanel<T>; width >= kPanel<T>) {
        write(0, low[r], All{}), write(lanes, high[r], All{});
      } else {
        write(0, low[r], std::min(width, lanes));
        if (width > lanes) write(lanes, high[r], width - lanes);
      }
    }
  };
  for (int64_t top = 0; top < count; top += tall)
    for (int64_t i = 0; i < b.count; ++i) tile(top, i);
}

// This many bytes of dW stay in a thread's cache until their dV is written.
constexpr int64_t kGradBytes = 1 << 18;

// Computes `count` rows of dV and dg from row `first` on. dW is formed in the memory of dV if that
// has its dtype.
template <typename V>
void weight_rows(
    V* dv, V* dg, const Strided<Wide<V>>& d, const V* v, const V* g, const Wide<V>* n,
    const NormOptions& options, int64_t first, int64_t count, const Panels<Wide<V>>& b) {
  using T = Wide<V>;
  constexpr bool in_place = std::is_same_v<T, V>;
  const int64_t tile = kStackedRows * b.length * static_cast<int64_t>(sizeof(T));
  const int64_t most = kStackedRows * std::max<int64_t>(1, kGradBytes / tile);
  const std::unique_ptr<T[]> formed(in_place ? nullptr : new T[most * b.length]);
  for (int64_t top = first, rows; top < first + count; top += rows) {
    rows = std::min(most, first + count - top);
    T* dw = formed.get();
    if constexpr (in_place) dw = dv + top * b.length;
    outer_product(dw, d.below(top), 0, rows, b);
    for (int64_t j = top; j < top + rows; ++j, dw += b.length) {
      const int64_t at = j * b.length;
      dg[j] = static_cast<V>(weight_grad(dv + at, dw, v + at, g[j], n[j], options, b.length));
    }
  }
}

}  // namespace wn_kernels
