// This file multiplies a weight by a matrix of few columns. Each product reads the weight once. A
// matmul or a convolution of a library first copies the weight into a layout of its own.
//
//   rows_product     P = V B          (rows, columns)
//   columns_product  Q += Vᵀ D        (length, columns)
//   outer_product    dW = D Bᵀ        (rows, length)
//
// V (rows, length) is stored row by row. B and Q (length, columns) are stored in panels. A panel
// holds kPanel elements of the length for every column, one column after the other. Each vector of
// V is therefore multiplied by consecutive vectors of B. The last panel is padded with zeros.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "rows.h"

namespace wn_kernels {

// A tile of P = V B takes kTileRows rows and so many columns. Its sums fill one vector of float32.
constexpr int kTileColumns = kVectorBytes / sizeof(float) / kTileRows;

#if WN_VECTOR_BYTES == 64
constexpr int kStackedRows = 8;  // each row takes two vectors, and the sums take two
#else
constexpr int kStackedRows = 6;
#endif

// This many bytes of each row of a tile stay in the first-level cache.
constexpr int64_t kSegmentBytes = 4096;

template <typename T>
constexpr int64_t kPanel = 2 * Lanes<T>::count;

// This class stores a matrix (length, columns) in panels.
template <typename T>
class Panels {
 public:
  Panels(int64_t length, int64_t columns)
      : length(length), columns(columns), full(length / kPanel<T>),
        count((length + kPanel<T> - 1) / kPanel<T>), data_(new T[count * columns * kPanel<T>]) {}

  T* panel(int64_t i) { return data_.get() + i * columns * kPanel<T>; }
  const T* panel(int64_t i) const { return data_.get() + i * columns * kPanel<T>; }

  T* element(int64_t i, int64_t column) {
    return panel(i / kPanel<T>) + column * kPanel<T> + i % kPanel<T>;
  }
  const T* element(int64_t i, int64_t column) const {
    return const_cast<Panels*>(this)->element(i, column);
  }

  void zero() {
    for_each(count, columns * kPanel<T>, [&](int64_t i) { clear(i); });
  }
  void zero(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) clear(i);
  }
  // Zeroes the last panel if it is not full.
  void zero_rest() {
    if (full < count) clear(full);
  }

  const int64_t length, columns, full, count;

 private:
  void clear(int64_t i) { std::fill_n(panel(i), columns * kPanel<T>, T(0)); }

  std::unique_ptr<T[]> data_;
};

// `pack` copies a matrix whose columns lie one after the other into panels. `unpack` copies it
// back.
template <typename T>
void pack(const T* from, Panels<T>& to) {
  to.zero_rest();
  for_each(to.count, kPanel<T> * to.columns, [&](int64_t i) {
    const int64_t at = i * kPanel<T>, width = std::min(kPanel<T>, to.length - at);
    for (int64_t j = 0; j < to.columns; ++j)
      std::copy_n(from + j * to.length + at, width, to.panel(i) + j * kPanel<T>);
  });
}
template <typename T>
void unpack(const Panels<T>& from, T* to) {
  for_each(from.count, kPanel<T> * from.columns, [&](int64_t i) {
    const int64_t at = i * kPanel<T>, width = std::min(kPanel<T>, from.length - at);
    for (int64_t j = 0; j < from.columns; ++j)
      std::copy_n(from.panel(i) + j * kPanel<T>, width, to + j * from.length + at);
  });
}

// This class holds R rows of V. It repeats the last row if there are fewer than R. The elements
// after a row's full panels are copied and padded with zeros.
template <typename V, int R>
class RowBlock {
 public:
  using Rows = std::array<const V*, R>;

  // The block serves the panels before `end`.
  RowBlock(const V* v, int64_t count, int64_t length, int64_t end) : full_(length / kWidth_) {
    for (int r = 0; r < R; ++r) {
      row_[r] = v + std::min<int64_t>(r, count - 1) * length;
      if (end <= full_) continue;
      std::fill_n(rest_[r], kWidth_, V{});
      std::copy(row_[r] + full_ * kWidth_, row_[r] + length, rest_[r]);
    }
  }

  // Calls f(i, rows) for the panels from begin to end. `rows` points to the elements of panel i.
  template <typename F>
  void for_each_panel(int64_t begin, int64_t end, const F& f) const {
    Rows at = row_;
    for (auto& row : at) row += begin * kWidth_;
    for (int64_t i = begin; i < end; ++i) {
      if (i == full_)
        for (int r = 0; r < R; ++r) at[r] = rest_[r];
      f(i, at);
      for (auto& row : at) row += kWidth_;
    }
  }

 private:
  static constexpr int64_t kWidth_ = kPanel<Wide<V>>;

  int64_t full_;
  Rows row_;
  V rest_[R][kWidth_];
};

// This class stores D in stacks of R rows. Within a stack the columns lie one after the other. The
// last stack is padded with zeros.
template <typename T, int R>
class Stacked {
 public:
  Stacked(int64_t rows, int64_t columns)
      : columns_(columns), data_((rows + R - 1) / R * R * columns) {}

  void set(int64_t row, const T* values, T factor = T(1)) {
    T* to = data_.data() + row / R * R * columns_ + row % R;
    for (int64_t j = 0; j < columns_; ++j) to[j * R] = factor * values[j];
  }
  // Sets the rows of a column that a vector has values for.
  template <typename Count>
  void set_column(int64_t row, int64_t column, Vector<T> values, Count count) {
    constexpr int64_t lanes = Lanes<T>::count;
    alignas(kVectorBytes) T all[lanes];
    store(all, values);
    const auto at = [&](int64_t i) {
      return data_.data() + i / R * R * columns_ + column * R + i % R;
    };
    if (std::is_same_v<Count, All> && lanes % R == 0 && row % R == 0)
      for (int64_t i = 0; i < lanes; i += R) std::copy_n(all + i, R, at(row + i));
    else
      for (int64_t i = 0; i < width<T>(count); ++i) *at(row + i) = all[i];
  }
  // Returns the stack that starts at `row`.
  const T* stack(int64_t row) const { return data_.data() + row * columns_; }

 private:
  int64_t columns_;
  std::vector<T> data_;
};

// --- P = V B -------------------------------------------------------------------------------------

// Picks lanes of two vectors that are to be added up. Runs of `run` lanes alternate between the two. The
// second pick has the other half of the lanes, in the same order.
template <typename T, size_t run, size_t... lane>
constexpr Raw<T> pick(bool second, std::index_sequence<lane...>) {
  constexpr size_t lanes = Lanes<T>::count;
  const auto from = [=](size_t i) {
    const size_t in = i % (2 * run), of = in < run ? 0 : lanes;
    return static_cast<RawNumber<T>>(of + i - in + in % run + (second ? run : 0));
  };
  return Raw<T>{from(lane)...};
}

// Returns the sum of the lanes of each of as many vectors as a vector has lanes. Each level halves their
// number. The vectors come in the order of reversed bits.
template <typename T, size_t run = 1>
inline Vector<T> sums_of_lanes(const Vector<T>* from) {
  constexpr size_t lanes = Lanes<T>::count, half = lanes / run / 2;
  if constexpr (half == 0) {
    return *from;
  } else {
    constexpr auto all = std::make_index_sequence<lanes>{};
    Vector<T> next[half];
#pragma GCC unroll 8
    for (size_t i = 0; i < half; ++i)
      next[i] = __builtin_shuffle(from[i], from[i + half], pick<T, run>(false, all)) +
                __builtin_shuffle(from[i], from[i + half], pick<T, run>(true, all));
    return sums_of_lanes<T, 2 * run>(next);
  }
}

// Returns a number below `count`, a power of two, with its bits in reverse.
constexpr int64_t reversed_bits(int64_t number, int64_t count) {
  int64_t out = 0;
  for (; count > 1; count /= 2, number /= 2) out = 2 * out + number % 2;
  return out;
}

// The products of a tile: kTileRows of each column, one column after the other.
template <typename T>
struct TileProducts {
  alignas(kVectorBytes) T of[kTileColumns * kTileRows];
};

// Computes the products of the rows with N columns of B, over some panels.
template <int N, typename V>
inline void tile_product(
    const RowBlock<V, kTileRows>& block, const Panels<Wide<V>>& b, int64_t column, int64_t begin,
    int64_t end, TileProducts<Wide<V>>& products) {
  using T = Wide<V>;
  constexpr int64_t lanes = Lanes<T>::count;
  constexpr int sets = N * kTileRows < 16 ? 2 : 1;  // few sums would wait for each other
  // The sums stay in registers until each is one number.
  Vector<T> sum[sets][kTileColumns * kTileRows] = {};
  const T* from = b.panel(begin) + column * kPanel<T>;
  const int64_t step = b.columns * kPanel<T>;
  block.for_each_panel(begin, end, [&](int64_t, const auto& rows) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      Vector<T> values[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) values[j] = load(from + j * kPanel<T> + half * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vector<T> value = load(rows[r] + half * lanes);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[half % sets][j * kTileRows + r] += value * values[j];
      }
    }
    from += step;
  });
#pragma GCC unroll 4
  for (int64_t at = 0; at < N * kTileRows; at += lanes) {
    Vector<T> ordered[lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      ordered[reversed_bits(i, lanes)] = sum[0][at + i];
      if (sets > 1) ordered[reversed_bits(i, lanes)] += sum[1][at + i];
    }
    store(products.of + at, sums_of_lanes<T>(ordered));
  }
}

template <int N = kTileColumns, typename V>
inline void tile_product(
    int64_t width, const RowBlock<V, kTileRows>& block, const Panels<Wide<V>>& b, int64_t column,
    int64_t begin, int64_t end, TileProducts<Wide<V>>& products) {
  if constexpr (N > 1)
    if (width < N) return tile_product<N - 1>(width, block, b, column, begin, end, products);
  tile_product<N>(block, b, column, begin, end, products);
}

// Calls f(column, width, products) for the tiles of a block of rows, over some panels.
template <typename V, typename F>
inline void for_each_tile(
    const RowBlock<V, kTileRows>& block, const Panels<Wide<V>>& b, int64_t begin, int64_t end,
    const F& f) {
  for (int64_t column = 0; column < b.columns; column += kTileColumns) {
    const int64_t width = std::min<int64_t>(kTileColumns, b.columns - column);
    TileProducts<Wide<V>> products;
    tile_product(width, block, b, column, begin, end, products);
    f(column, width, products.of);
  }
}

// A B of at most this many bytes stays in a thread's cache from one tile of rows to the next.
constexpr int64_t kCachedBytes = 3 << 18;

// The sums of the rows that share one pass over a segment of a larger B take at most this many
// bytes.
constexpr int64_t kSumBytes = 1 << 13;

// A stack of a smaller B takes at most this many times the least number of rows.
constexpr int64_t kMostStacked = 2;

// A stack has whole tiles of both P = V B and dW = D Bᵀ.
constexpr int64_t kStackRows = std::lcm(kTileRows, kStackedRows);

// Calls f(first, count) for each stack of rows of V that one thread takes together.
template <typename T, typename F>
void for_each_stack(int64_t rows, const Panels<T>& b, const F& f) {
  const int64_t least = (rows + kStackRows - 1) / kStackRows, threads = at::get_num_threads();
  // The products of a stack fill a cache line for each column, if there are enough stacks.
  int64_t stack = kStackRows * std::clamp<int64_t>(least / (4 * threads), 1, kMostStacked);
  if (b.length * b.columns * static_cast<int64_t>(sizeof(T)) > kCachedBytes) {
    const int64_t row = b.columns * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(1, kSumBytes / (kStackRows * row));
    stack = kStackRows * std::min(most, (least + threads - 1) / threads);
  }
  for_each((rows + stack - 1) / stack, stack * b.length * b.columns, [&](int64_t i) {
    f(i * stack, std::min(stack, rows - i * stack));
  });
}

// Calls f(first panel, end) for each segment of the panels.
template <typename T, typename F>
void for_each_segment(const Panels<T>& b, const F& f) {
  constexpr int64_t segment = kSegmentBytes / sizeof(T) / kPanel<T>;
  for (int64_t begin = 0; begin < b.count; begin += segment)
    f(begin, std::min(b.count, begin + segment));
}

// The products of a stack of rows: kTileRows of each column, and then those of the next rows.
template <typename T>
struct StackProducts {
  T* of(int64_t row, int64_t column) {
    return sums.data() + row / kTileRows * kTileRows * columns + column * kTileRows + row % kTileRows;
  }

  int64_t columns;
  std::vector<T> sums;
};

// Computes P = V B for some rows and calls finish(products, partials of their rows). The partials are
// zero if no norm is given.
template <typename V, typename Finish>
void rows_product(
    const V* v, int64_t first, int64_t count, const Panels<Wide<V>>& b, std::optional<Norm> norm,
    const Finish& finish) {
  using T = Wide<V>;
  const V* rows = v + first * b.length;
  const int64_t padded = (count + kTileRows - 1) / kTileRows * kTileRows;
  StackProducts<T> all{b.columns, std::vector<T>(padded * b.columns)};
  std::vector<double> partials(count);
  for_each_segment(b, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kPanel<T>, size = std::min(end * kPanel<T>, b.length) - at;
    for (int64_t top = 0; top < count; top += kTileRows) {
      const int64_t height = std::min<int64_t>(kTileRows, count - top);
      const RowBlock<V, kTileRows> block(rows + top * b.length, height, b.length, end);
      for_each_tile(block, b, begin, end, [&](int64_t column, int64_t width, const T* products) {
        T* to = all.of(top, column);
        for (int64_t i = 0; i < width * kTileRows; ++i) to[i] += products[i];
      });
      for (int64_t r = top; norm && r < top + height; ++r)
        partials[r] =
            merged(*norm, partials[r], partial(*norm, rows + r * b.length + at, size));
    }
  });
  finish(all, partials.data());
}

// Does the same, and calls finish(j, P_j, partial of V_j) for each row.
template <typename V, typename Finish>
void each_row_product(
    const V* v, int64_t first, int64_t count, const Panels<Wide<V>>& b, std::optional<Norm> norm,
    const Finish& finish) {
  using T = Wide<V>;
  rows_product(v, first, count, b, norm, [&](StackProducts<T>& all, const double* partials) {
    std::vector<T> products(b.columns);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < b.columns; ++j) products[j] = *all.of(r, j);
      finish(first + r, products.data(), partials[r]);
    }
  });
}

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
    block.for_each_panel(begin, end, [&](int64_t i, const auto& from) {
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

// Computes Q = Vᵀ D. The rows of D may have factors.
template <typename V>
void columns_product(
    Panels<Wide<V>>& q, const V* v, int64_t rows, const Wide<V>* d,
    const Wide<V>* factors = nullptr) {
  using T = Wide<V>;
  const int64_t columns = q.columns, row = columns * static_cast<int64_t>(sizeof(T));
  const int64_t stacks = std::max<int64_t>(1, kFactorBytes / (kStackedRows * row));
  const int64_t chunk = std::min(stacks * kStackedRows, rows);
  const int64_t group = panel_group(q.count), groups = (q.count + group - 1) / group;
  q.zero();
  at::parallel_for(
      0, groups, grain(group * kPanel<T> * rows * columns), [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < rows; first += chunk) {
          const int64_t count = std::min(chunk, rows - first);
          Stacked<T, kStackedRows> stacked(count, columns);
          for (int64_t r = 0; r < count; ++r)
            stacked.set(r, d + (first + r) * columns, factors ? factors[first + r] : T(1));
          for (int64_t i = begin; i < end; ++i)
            columns_product(
                q, i * group, std::min(q.count, (i + 1) * group), v + first * q.length, count, stacked);
        }
      });
}

// --- dW = D Bᵀ -----------------------------------------------------------------------------------

// Computes `count` rows of dW = D Bᵀ from row `first` on. If V is given, it subtracts c u, where u is
// that of V, from their products with factors.
template <Norm norm = Norm::l2, typename T>
void outer_product(
    T* dw, const T* d, int64_t first, int64_t count, const Panels<T>& b, const T* v = nullptr,
    const T* n = nullptr, const T* c = nullptr, const T* factors = nullptr) {
  constexpr int64_t lanes = Lanes<T>::count;
  constexpr int tall = kStackedRows;  // fewer reads of B for each product
  const int64_t columns = b.columns;
  Stacked<T, tall> stacked(count, columns);
  for (int64_t r = 0; r < count; ++r)
    stacked.set(r, d + (first + r) * columns, factors ? factors[first + r] : T(1));
  const auto tile = [&](int64_t top, int64_t i) {
    Vector<T> sum[tall][2] = {};
    const T *from = b.panel(i), *factor = stacked.stack(top);
    for (int64_t j = 0; j < columns; ++j, from += kPanel<T>, factor += tall) {
      const Vector<T> low = load(from), high = load(from + lanes);
#pragma GCC unroll 8
      for (int r = 0; r < tall; ++r)
        sum[r][0] += low * factor[r], sum[r][1] += high * factor[r];
    }
    for (int64_t r = top; r < std::min(count, top + tall); ++r) {
      const int64_t row = first + r, at = row * b.length + i * kPanel<T>;
      const auto write = [&](int64_t l, auto part) {
        const Vector<T> product = sum[r - top][l / lanes];
        const auto cu = [&] { return times_slope<norm>(c[row], load(v + at + l, part), n[row]); };
        store(dw + at + l, v ? product - cu() : product, part);
      };
      if (i < b.full)
        write(0, All{}), write(lanes, All{});
      else
        for_each_vector<T>(b.length - i * kPanel<T>, write);
    }
  };
  for_each_segment(b, [&](int64_t begin, int64_t end) {
    for (int64_t top = 0; top < count; top += tall)
      for (int64_t i = begin; i < end; ++i) tile(top, i);
  });
}

// Computes `count` rows of dV and dg from row `first` on. dW is formed in the memory of dV if that
// has its dtype.
template <typename V>
void weight_rows(
    V* dv, V* dg, const Wide<V>* d, const V* v, const V* g, const Wide<V>* n,
    const NormOptions& options, int64_t first, int64_t count, const Panels<Wide<V>>& b) {
  using T = Wide<V>;
  const auto finish = [&](const T* dw, int64_t j) {
    const int64_t at = j * b.length;
    dg[j] = static_cast<V>(weight_grad(dv + at, dw, v + at, g[j], n[j], options, b.length));
  };
  if constexpr (std::is_same_v<T, V>) {
    outer_product(dv, d, first, count, b);
    for (int64_t j = first; j < first + count; ++j) finish(dv + j * b.length, j);
  } else {
    const std::unique_ptr<T[]> dw(new T[kStackedRows * b.length]);
    for (int64_t top = first; top < first + count; top += kStackedRows) {
      const int64_t rows = std::min<int64_t>(kStackedRows, first + count - top);
      outer_product(dw.get(), d + top * b.columns, 0, rows, b);
      for (int64_t r = 0; r < rows; ++r) finish(dw.get() + r * b.length, top + r);
    }
  }
}

}  // namespace wn_kernels
