// This file computes P = V B, the products of the rows of a weight, in one of two ways. Both read V once.
//
// With few columns, a tile of rows and columns has a vector of partial sums for each product, whose
// lanes are added up at the end. With many, the rows are first copied into columns, so that a vector
// holds the same element of several rows. A vector of sums is then complete, and V is read from the
// copy, which stays in the cache. The copy is worth its time from kPackedColumns columns on.

#pragma once

#include <optional>
#include <utility>

#include "panels.h"

namespace wn_kernels {

// --- stacks of rows ------------------------------------------------------------------------------

// Returns whether the rows of V are packed for a product with B. Rows that are shorter than a panel would
// be copied for tiles as well.
template <typename T>
bool is_packed(const Panels<T>& b) {
  return b.columns >= kPackedColumns || b.full == 0;
}

// Returns whether threads share the columns of B in a linear layer, and each takes all rows of V. Otherwise
// they share the rows.
inline bool shares_columns(int64_t columns, int64_t rows) {
  return columns > rows && columns >= 2 * kPackedColumns;
}

// Calls f(first, count) for stacks of at most kPanel rows of V, each of which one thread takes.
template <typename T, typename F>
void for_each_stack(int64_t rows, const Panels<T>& b, const F& f) {
  // Half a stack fills a vector of packed rows, or two tiles.
  constexpr int64_t lanes = Lanes<T>::count, tiles = std::min<int64_t>(lanes, 2 * kTileRows);
  const int64_t half = is_packed(b) ? lanes : tiles, length = half * b.length * b.columns;
  at::parallel_for(0, (rows + half - 1) / half, grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 2) {
      const int64_t last = std::min(std::min(i + 2, end) * half, rows);
      f(i * half, last - i * half);
    }
  });
}

// This many bytes of each row of a stack are multiplied by all columns before the next ones.
constexpr int64_t kSegmentBytes = 4096;

// Calls f(first panel, end) for each segment of the panels.
template <typename T, typename F>
void for_each_segment(const Panels<T>& b, const F& f) {
  constexpr int64_t segment = kSegmentBytes / sizeof(T) / kPanel<T>;
  for (int64_t begin = 0; begin < b.count; begin += segment)
    f(begin, std::min(b.count, begin + segment));
}

// --- few columns ---------------------------------------------------------------------------------

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

// A tile takes kTileRows rows and so many columns. Its sums fill one vector of float32.
constexpr int kTileColumns = kVectorBytes / sizeof(float) / kTileRows;

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
  // Few sums would wait for each other, and too many would not fit the registers.
  constexpr int most = kVectorBytes == 64 ? 24 : 12, sets = 2 * N * kTileRows <= most ? 2 : 1;
  // The sums stay in registers until each is one number.
  Vector<T> sum[sets][kTileColumns * kTileRows] = {};
  const T* from = b.panel(begin) + column * kPanel<T>;
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
    from += b.step;
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

// --- many columns --------------------------------------------------------------------------------

// Transposes a square matrix of as many rows as a vector has lanes.
template <typename T, size_t run = 1>
inline __attribute__((always_inline)) void transpose(Vector<T>* row) {
  constexpr size_t lanes = Lanes<T>::count;
  if constexpr (run < lanes) {
    constexpr auto all = std::make_index_sequence<lanes>{};
#pragma GCC unroll 16
    for (size_t i = 0; i < lanes; ++i) {
      if (i & run) continue;
      const Vector<T> a = row[i], b = row[i + run];
      row[i] = __builtin_shuffle(a, b, pick<T, run>(false, all));
      row[i + run] = __builtin_shuffle(a, b, pick<T, run>(true, all));
    }
    transpose<T, 2 * run>(row);
  }
}

// The terms of a row's norm go to this many sums, so that an addition does not wait for the one before.
constexpr int64_t kParts = 4;

// Copies elements [at, at + size) of at most kPanel rows of V into columns: `to` has kPanel numbers for each
// element, of whole panels. If a norm is given, it merges the terms of the rows into their partials.
template <typename V>
void pack_rows(
    Wide<V>* to, const V* v, int64_t count, int64_t length, int64_t at, int64_t size,
    std::optional<Norm> given, double* partials) {
  using T = Wide<V>;
  constexpr int64_t lanes = Lanes<T>::count;
  with_norm(given.value_or(Norm::l2), [&](auto constant) {
    constexpr Norm norm = decltype(constant)::value;
    using Merge = wn_kernels::Merge<norm>;
    for (int64_t top = 0; top < count; top += lanes) {
      const V* row[lanes];
      for (int64_t r = 0; r < lanes; ++r) row[r] = v + std::min(top + r, count - 1) * length + at;
      Vector<T> part[kParts] = {};
      for_each_vector<T>(size, [&](int64_t i, auto width) {
        Vector<T> t[lanes];
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) t[r] = load(row[r] + i, width);
        transpose<T>(t);
#pragma GCC unroll 16
        for (int64_t k = 0; k < lanes; ++k) {
          part[k % kParts] = Merge::merge(part[k % kParts], norm_term<norm>(t[k]));
          store(to + (i + k) * kPanel<T> + top, t[k]);
        }
      });
      alignas(kVectorBytes) T all[lanes];
      store(all, Merge::merge(Merge::merge(part[0], part[1]), Merge::merge(part[2], part[3])));
      for (int64_t r = top; given && r < std::min(count, top + lanes); ++r)
        partials[r] = merged(norm, partials[r], all[r - top]);
    }
  });
}

constexpr int64_t kCacheLine = 64;  // bytes

// Adds the products of P vectors of packed rows with R columns of B to `to`, for `size` elements of the
// length from panel `begin` on.
template <int R, int P, typename T>
inline void packed_tile(
    T* to, const T* packed, const Panels<T>& b, int64_t column, int64_t begin, int64_t size) {
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
  for (; size >= kPanel<T>; size -= kPanel<T>) {
    const T* from = b.panel(begin++) + column * kPanel<T>;
    // The processor does not fetch ahead over the distance of two panels, which may lie in a slow cache.
#pragma GCC unroll 32
    for (int64_t i = 0; i < R * kPanel<T>; i += kCacheLine / sizeof(T))
      __builtin_prefetch(from + b.step + i);
    add(from, kPanel<T>);
  }
  if (size) add(b.panel(begin) + column * kPanel<T>, size);
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
    int64_t width, T* to, const T* packed, const Panels<T>& b, int64_t column, int64_t begin,
    int64_t size) {
  if constexpr (R > 1)
    if (width < R) return packed_tile<P, R - 1>(width, to, packed, b, column, begin, size);
  packed_tile<R, P>(to, packed, b, column, begin, size);
}

// Adds the products of so many packed rows with all columns of B to `to`.
template <typename T>
void packed_product(
    T* to, const T* packed, int64_t count, const Panels<T>& b, int64_t begin, int64_t size) {
  const auto tiles = [&](auto vectors) {
    constexpr int P = decltype(vectors)::value;
    // All tiles have nearly as many columns.
    int64_t left = (b.columns + kWidest<P> - 1) / kWidest<P>;
    for (int64_t column = 0, width; column < b.columns; column += width, --left) {
      width = (b.columns - column + left - 1) / left;
      packed_tile<P>(width, to + column * kPanel<T>, packed, b, column, begin, size);
    }
  };
  if (count > Lanes<T>::count)
    tiles(std::integral_constant<int, 2>{});
  else
    tiles(std::integral_constant<int, 1>{});
}

// --- all columns ---------------------------------------------------------------------------------

// Calls f(i, first, count) for parts of the columns of B, which threads take if they are shared, and which
// otherwise come in turn. A part begins at a whole tile, so that the number of parts changes no bit.
template <typename F>
void for_each_part(int64_t columns, int64_t parts, bool is_shared, const F& f) {
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const auto begin = [=](int64_t i) { return std::min(columns, tiles * i / parts * kTileColumns); };
  const auto part = [&](int64_t i) { f(i, begin(i), begin(i + 1) - begin(i)); };
  if (is_shared)
    for_each(parts, kGrain, part);
  else
    for (int64_t i = 0; i < parts; ++i) part(i);
}

// Computes P = V B for a stack of rows and calls finish(products, partials of the rows). There are kPanel
// products of each column, one column after the other. The partials are zero if no norm is given.
template <typename V, typename Finish>
void rows_product(
    const V* v, int64_t first, int64_t count, const Panels<Wide<V>>& b, std::optional<Norm> norm,
    const Finish& finish) {
  using T = Wide<V>;
  const V* rows = v + first * b.length;
  std::vector<T> products(b.columns * kPanel<T>);
  std::array<double, kPanel<T>> partials{};
  // Rows that would fill no more than half of a vector are not packed.
  const int64_t rest = count % Lanes<T>::count, left = 2 * rest > Lanes<T>::count ? 0 : rest;
  const int64_t copied = is_packed(b) ? count - left : 0;
  const int64_t longest = std::min<int64_t>(b.count * kPanel<T>, kSegmentBytes / sizeof(T));
  const Block memory(copied ? longest * kPanel<T> * static_cast<int64_t>(sizeof(T)) : 0);
  T* const packed = memory.as<T>();
  for_each_segment(b, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kPanel<T>, size = std::min(end * kPanel<T>, b.length) - at;
    if (copied) {
      pack_rows(packed, rows, copied, b.length, at, size, norm, partials.data());
      packed_product(products.data(), packed, copied, b, begin, size);
    }
    for (int64_t top = copied; top < count; top += kTileRows) {
      const int64_t height = std::min<int64_t>(kTileRows, count - top);
      const RowBlock<V, kTileRows> block(rows + top * b.length, height, b.length, end);
      for_each_tile(block, b, begin, end, [&](int64_t column, int64_t width, const T* tile) {
        T* to = products.data() + column * kPanel<T> + top;
        for (int64_t j = 0; j < width; ++j, to += kPanel<T>, tile += kTileRows)
          for (int r = 0; r < kTileRows; ++r) to[r] += tile[r];
      });
    }
    for (int64_t r = copied; norm && r < count; ++r)
      partials[r] = merged(*norm, partials[r], partial(*norm, rows + r * b.length + at, size));
  });
  finish(products.data(), partials.data());
}

// Does the same, and calls finish(j, P_j, partial of V_j) for each row.
template <typename V, typename Finish>
void each_row_product(
    const V* v, int64_t first, int64_t count, const Panels<Wide<V>>& b, std::optional<Norm> norm,
    const Finish& finish) {
  using T = Wide<V>;
  rows_product(v, first, count, b, norm, [&](const T* all, const double* partials) {
    std::vector<T> products(b.columns);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < b.columns; ++j) products[j] = all[j * kPanel<T> + r];
      finish(first + r, products.data(), partials[r]);
    }
  });
}

}  // namespace wn_kernels
