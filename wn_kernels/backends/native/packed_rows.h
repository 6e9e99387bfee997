// This file multiplies rows that are copied into columns, as those of a recurrent layer are once for all of
// its steps. A vector holds the same element of several rows, and is multiplied by that element of a column.

#pragma once

#include <utility>

#include "panels.h"

namespace wn_kernels {

// Copies at most kPanel rows of V into columns. `to` has kPanel numbers for each element, of whole panels.
template <typename T>
void pack_rows(T* to, const T* v, int64_t count, int64_t length) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t top = 0; top < count; top += lanes) {
    const T* row[lanes];
    for (int64_t r = 0; r < lanes; ++r) row[r] = v + std::min(top + r, count - 1) * length;
    for_each_vector<T>(length, [&](int64_t i, auto width) {
      Vector<T> t[lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) t[r] = load(row[r] + i, width);
      transpose<T>(t);
#pragma GCC unroll 16
      for (int64_t k = 0; k < lanes; ++k) store(to + (i + k) * kPanel<T> + top, t[k]);
    });
  }
}

// Adds the products of P vectors of packed rows with R columns of B to `to`.
template <int R, int P, typename T>
inline void packed_tile(T* to, const T* packed, const Panels<T>& b, int64_t column) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> sum[R][P];
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) sum[j][p] = load(to + j * kPanel<T> + p * lanes);
  const auto add = [&](const T* from, int64_t count) {
    for (int64_t k = 0; k < count; ++k, packed += kPanel<T>) {
      Vector<T> value[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) value[p] = load(packed + p * lanes);
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        const Vector<T> factor = from[j * kPanel<T> + k] - Vector<T>{};
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sum[j][p] = multiply_add(value[p], factor, sum[j][p]);
      }
    }
  };
  for (int64_t i = 0; i < b.full; ++i) {
    const T* from = b.panel(i) + column * kPanel<T>;
    // The processor does not fetch ahead over the distance of two panels, which may lie in a slow cache.
#pragma GCC unroll 32
    for (int64_t k = 0; k < R * kPanel<T>; k += kCacheLine / sizeof(T))
      __builtin_prefetch(from + b.step + k);
    add(from, kPanel<T>);
  }
  if (b.full < b.count) add(b.panel(b.full) + column * kPanel<T>, b.length - b.full * kPanel<T>);
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) store(to + j * kPanel<T> + p * lanes, sum[j][p]);
}

// A tile of P vectors of rows has at most this many columns, so that its sums and its operands fit in the
// registers.
template <int P>
constexpr int kWidest = 2 * kStackedRows / P;

template <int P, int R = kWidest<P>, typename T>
inline void packed_tile(
    int64_t width, T* to, const T* packed, const Panels<T>& b, int64_t column) {
  if constexpr (R > 1)
    if (width < R) return packed_tile<P, R - 1>(width, to, packed, b, column);
  packed_tile<R, P>(to, packed, b, column);
}

// Adds the products of so many packed rows with all columns of B to `to`.
template <typename T>
void packed_product(T* to, const T* packed, int64_t count, const Panels<T>& b) {
  const auto tiles = [&](auto vectors) {
    constexpr int P = decltype(vectors)::value;
    // All tiles have nearly as many columns.
    int64_t left = (b.columns + kWidest<P> - 1) / kWidest<P>;
    for (int64_t column = 0, width; column < b.columns; column += width, --left) {
      width = (b.columns - column + left - 1) / left;
      packed_tile<P>(width, to + column * kPanel<T>, packed, b, column);
    }
  };
  if (count > Lanes<T>::count)
    tiles(std::integral_constant<int, 2>{});
  else
    tiles(std::integral_constant<int, 1>{});
}

}  // namespace wn_kernels
