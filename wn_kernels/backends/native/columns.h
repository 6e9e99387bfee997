// This file makes passes over a weight whose slices are not its rows. The slices may lie along any
// other dimension, such as the positions of a kernel, or one slice may be the whole weight. The
// weight is read as a matrix, in which each slice occupies a few neighbouring columns.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "rows.h"

namespace wn_kernels {

// These are limits of the width. At least 16 columns fill a vector. Rows narrower than 512 columns
// are joined. A row has at most 2^14 columns, so that several rows fit in the cache.
constexpr int64_t kFewColumns = 16;
constexpr int64_t kSomeColumns = 512;
constexpr int64_t kManyColumns = 1 << 14;

// A sum takes this many rows before it is added to a double.
constexpr int64_t kBlockOfRows = 64;

// A thread takes a chunk of blocks, of at least kChunk elements. There are at most kChunks chunks,
// because every chunk has its own sums, which another thread reads later.
constexpr int64_t kChunk = 1 << 16;
constexpr int64_t kChunks = 8;

// A weight is viewed in the shape (rows, repeats, count, inner). It has `count` slices.
struct Columns {
  int64_t rows = 1, repeats = 1, count = 1, inner = 1;

  int64_t step() const { return count * inner; }  // distance to the slice's next run
  int64_t width() const { return repeats * step(); }

  // Joins two short rows into one, in which every slice occurs twice, until the row is wide enough.
  void widen() {
    while (rows % 2 == 0 && width() < kSomeColumns) rows /= 2, repeats *= 2;
  }
};

// Returns a row that holds the number of slice j in each of its columns.
template <typename T>
std::vector<T> spread(const Columns& of, std::vector<T> each) {
  if (of.width() == of.count) return each;
  std::vector<T> all(of.width());
  for (int64_t j = 0; j < of.count; ++j) std::fill_n(&all[j * of.inner], of.inner, each[j]);
  for (int64_t at = of.step(); at < of.width(); at += of.step())
    std::copy_n(all.data(), of.step(), &all[at]);
  return all;
}

// Returns whether slice j is all zeros.
template <typename V>
bool is_zero(const V* v, int64_t j, const Columns& of) {
  for (int64_t at = j * of.inner; at < of.rows * of.width(); at += of.step())
    for (int64_t i = 0; i < of.inner; ++i)
      if (static_cast<Wide<V>>(v[at + i]) != 0) return false;
  return true;
}

// Merges the terms of some rows, which start at element `at`, into the partial results of each
// column. It takes four rows at once, because every pass loads and stores the results.
template <typename T, typename... Merges, typename Term>
void merge_rows(T* parts, int64_t at, int64_t rows, int64_t columns, const Term& term) {
  constexpr size_t N = sizeof...(Merges);
  const auto merge = [=](int64_t j, auto count, const std::array<Vector<T>, N>& terms) {
    std::array<Vector<T>, N> all;
    for (size_t k = 0; k < N; ++k) all[k] = load(parts + k * columns + j, count);
    merge_each<Merges...>([&](size_t k) -> Vector<T>& { return all[k]; }, terms);
    for (size_t k = 0; k < N; ++k) store(parts + k * columns + j, all[k], count);
  };
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, at += 4 * columns)
    for_each_vector<T>(columns, [=](int64_t j, auto count) {
      const auto two = [=](int64_t r) {
        auto terms = term(at + r * columns + j, j, count);
        merge_each<Merges...>(
            [&](size_t k) -> Vector<T>& { return terms[k]; },
            term(at + (r + 1) * columns + j, j, count));
        return terms;
      };
      auto terms = two(0);
      merge_each<Merges...>([&](size_t k) -> Vector<T>& { return terms[k]; }, two(2));
      merge(j, count, terms);
    });
  for (; row < rows; ++row, at += columns)
    for_each_vector<T>(
        columns, [=](int64_t j, auto count) { merge(j, count, term(at + j, j, count)); });
}

// Computes reductions over every slice. take(parts, at, rows) merges the rows that start at element
// `at` into the partial results of each column. Chunks of rows are merged in order, whichever thread
// took them.
template <typename T, typename... Merges>
std::array<std::vector<double>, sizeof...(Merges)> merged_columns(
    const Columns& of, const std::function<void(T*, int64_t, int64_t)>& take) {
  constexpr size_t N = sizeof...(Merges);
  const int64_t width = of.width(), blocks = (of.rows + kBlockOfRows - 1) / kBlockOfRows,
                chunks = std::clamp(of.rows * width / kChunk, int64_t{1}, std::min(blocks, kChunks));
  std::vector<double> all(chunks * N * width);
  // Merges the results of a column into those of another one, of all results that `all` has.
  const auto merge_into = [&](double* to, const std::array<double, N>& values) {
    merge_each<Merges...>([=](size_t k) -> double& { return to[k * width]; }, values);
  };
  const auto column = [=](const auto* from) {
    std::array<double, N> values;
    for (size_t k = 0; k < N; ++k) values[k] = from[k * width];
    return values;
  };
  for_each(chunks, of.rows * width / chunks, [&](int64_t chunk) {
    double* results = all.data() + chunk * N * width;
    std::vector<T> parts(N * width);
    for (int64_t block = chunk * blocks / chunks; block < (chunk + 1) * blocks / chunks; ++block) {
      const int64_t first = block * kBlockOfRows;
      std::fill(parts.begin(), parts.end(), T(0));
      take(parts.data(), first * width, std::min(kBlockOfRows, of.rows - first));
      for (int64_t j = 0; j < width; ++j) merge_into(results + j, column(&parts[j]));
    }
  });
  double* results = all.data();
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t j = 0; j < width; ++j)
      merge_into(results + j, column(results + chunk * N * width + j));
  for (int64_t at = of.step(); at < width; at += of.step())
    for (int64_t j = 0; j < of.step(); ++j) merge_into(results + j, column(results + at + j));
  std::array<std::vector<double>, N> out;
  for (auto& each : out) each.resize(of.count);
  for (int64_t j = 0; j < of.count; ++j) {
    double* first = results + j * of.inner;
    for (int64_t i = 1; i < of.inner; ++i) merge_into(first, column(first + i));
    for (size_t k = 0; k < N; ++k) out[k][j] = first[k * width];
  }
  return out;
}

// The same, where each reduction merges its terms. term(i, j, count) returns a vector of the terms of
// each, for the elements from i on, which lie in the columns from j on.
template <typename T, typename... Merges, typename Term>
std::array<std::vector<double>, sizeof...(Merges)> column_reductions(
    const Columns& of, const Term& term) {
  return merged_columns<T, Merges...>(of, [&](T* parts, int64_t at, int64_t rows) {
    merge_rows<T, Merges...>(parts, at, rows, of.width(), term);
  });
}

// Returns <A_j, B_j> of every slice.
template <typename A, typename B>
std::vector<double> column_dots(const A* a, const B* b, const Columns& of) {
  using T = Wide<A>;
  return column_reductions<T, Sum>(of, [=](int64_t i, int64_t, auto count) {
    return std::array<Vector<T>, 1>{load(a + i, count) * load(b + i, count)};
  })[0];
}

// Returns the partial of every slice.
template <typename V>
std::vector<double> column_partials(Norm of_norm, const V* v, const Columns& of) {
  using T = Wide<V>;
  std::vector<double> out;
  with_norm(of_norm, [&](auto constant) {
    constexpr Norm norm = decltype(constant)::value;
    out = column_reductions<T, Merge<norm>>(of, [=](int64_t i, int64_t, auto count) {
      return std::array<Vector<T>, 1>{norm_term<norm>(load(v + i, count))};
    })[0];
  });
  return out;
}

}  // namespace wn_kernels
