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

// This class stores the transpose of some rows of D, which may have factors.
template <typename T>
class Turned {
 public:
  Turned(int64_t rows, int64_t columns) : row_(rows | 1), data_(columns * row_) {}

  void set(int64_t row, const T* values, int64_t columns, T factor) {
    for (int64_t j = 0; j < columns; ++j) data_[j * row_ + row] = factor * values[j];
  }
  void fill(const Strided<T>& d, int64_t first, int64_t rows, int64_t columns, const T* factors) {
    if (d.column == 1) {
      for (int64_t r = 0; r < rows; ++r)
        set(r, d.at(first + r, 0), columns, factors ? factors[first + r] : T(1));
      return;
    }
    for (int64_t j = 0; j < columns; ++j) {
      const T* from = d.at(first, j);
      T* to = data_.data() + j * row_;
      if (factors)
        for (int64_t r = 0; r < rows; ++r) to[r] = factors[first + r] * from[r];
      else
        std::copy_n(from, rows, to);
    }
  }
  // The elements of a column of D from this row on. So far apart are those of two columns.
  const T* from(int64_t row) const { return data_.data() + row; }
  int64_t row() const { return row_; }

 private:
  int64_t row_;
  std::vector<T> data_;
};

// So many rows of a panel of V are read for some columns of D after the other.
constexpr int64_t kRowsOfPanel = 64;

// Computes Q += Vᵀ D for `rows` rows of V and D, and for some panels of Q.
template <typename V>
void columns_product(
    Panels<Wide<V>>& q, int64_t begin, int64_t end, const V* v, int64_t rows,
    const Turned<Wide<V>>& d) {
  using T = Wide<V>;
  for (int64_t first = 0; first < rows; first += kRowsOfPanel, v += kRowsOfPanel * q.length) {
    const int64_t count = std::min(kRowsOfPanel, rows - first);
    const auto add = [&](int64_t i, const Strip<V>& strip) {
      strip_product<2, 1>(q.columns, q.panel(i), kPanel<T>, d.from(first), d.row(), strip, count);
    };
    for (int64_t i = begin; i < std::min(end, q.full); ++i)
      add(i, {v + i * kPanel<T>, q.length, kPanel<T>});
    if (end <= q.full) continue;
    V padded[kRowsOfPanel * kPanel<T>] = {};
    const int64_t at = q.full * kPanel<T>;
    for (int64_t r = 0; r < count; ++r)
      std::copy_n(v + r * q.length + at, q.length - at, padded + r * kPanel<T>);
    add(q.full, {padded, kPanel<T>});
  }
}

// This many bytes of D stay in a thread's cache while all of its panels take them.
constexpr int64_t kFactorBytes = 1 << 17;

// Computes Q = Vᵀ D. The rows of D may have factors.
template <typename V>
void columns_product(
    Panels<Wide<V>>& q, const V* v, int64_t rows, const Strided<Wide<V>>& d,
    const Wide<V>* factors = nullptr) {
  using T = Wide<V>;
  const int64_t columns = q.columns, row = columns * static_cast<int64_t>(sizeof(T));
  const int64_t chunk = std::min(rows, std::max(kRowsOfPanel, kFactorBytes / row));
  const int64_t group = panel_group(q.count), groups = (q.count + group - 1) / group;
  q.zero();
  at::parallel_for(
      0, groups, grain(group * kPanel<T> * rows * columns), [&](int64_t begin, int64_t end) {
        Turned<T> turned(chunk, columns);
        for (int64_t first = 0; first < rows; first += chunk) {
          const int64_t count = std::min(chunk, rows - first);
          turned.fill(d, first, count, columns, factors);
          columns_product(
              q, begin * group, std::min(q.count, end * group), v + first * q.length, count, turned);
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
