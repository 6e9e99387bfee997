// This file makes passes over a weight whose slices are not its rows. The slices may lie along any
// other dimension, such as the positions of a kernel, or one slice may be the whole weight. The
// weight is read as a matrix, in which each slice occupies a few neighbouring columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
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

// Returns a row that holds f(j) in every column of slice j.
template <typename T, typename F>
std::vector<T> spread(const Columns& of, const F& f) {
  std::vector<T> each(of.count);
  for (int64_t j = 0; j < of.count; ++j) each[j] = f(j);
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

// Computes part_j += <a_j, b_j>. It takes four rows at once, because every pass loads and stores
// the sums.
template <typename A, typename B>
void add_dots(Wide<A>* part, const A* a, const B* b, int64_t rows, int64_t columns) {
  using T = Wide<A>;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, a += 4 * columns, b += 4 * columns)
    for_each_vector<T>(columns, [=](int64_t j, auto count) {
      const auto term = [=](int64_t r) {
        return load(a + r * columns + j, count) * load(b + r * columns + j, count);
      };
      store(part + j, load(part + j, count) + ((term(0) + term(1)) + (term(2) + term(3))), count);
    });
  for (; row < rows; ++row, a += columns, b += columns)
    for_each_vector<T>(columns, [=](int64_t j, auto count) {
      const Vector<T> term = load(a + j, count) * load(b + j, count);
      store(part + j, load(part + j, count) + term, count);
    });
}

// Returns <A_j, B_j> of every slice. Chunks of rows are added in order, whichever thread took them.
template <typename A, typename B>
std::vector<double> column_dots(const A* a, const B* b, const Columns& of) {
  using T = Wide<A>;
  const int64_t width = of.width(), blocks = (of.rows + kBlockOfRows - 1) / kBlockOfRows,
                chunks = std::clamp(of.rows * width / kChunk, int64_t{1}, std::min(blocks, kChunks));
  std::vector<double> all(chunks * width);
  for_each(chunks, of.rows * width / chunks, [&](int64_t chunk) {
    double* sums = all.data() + chunk * width;
    std::vector<T> part(width);
    for (int64_t block = chunk * blocks / chunks; block < (chunk + 1) * blocks / chunks; ++block) {
      const int64_t first = block * kBlockOfRows, at = first * width;
      std::fill(part.begin(), part.end(), T(0));
      add_dots(part.data(), a + at, b + at, std::min(kBlockOfRows, of.rows - first), width);
      for (int64_t j = 0; j < width; ++j) sums[j] += part[j];
    }
  });
  double* sums = all.data();
  for (int64_t at = width; at < chunks * width; at += width)
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[at + j];
  for (int64_t at = of.step(); at < width; at += of.step())
    for (int64_t j = 0; j < of.step(); ++j) sums[j] += sums[at + j];
  for (int64_t j = 0; of.inner > 1 && j < of.count; ++j)
    sums[j] = std::accumulate(sums + j * of.inner, sums + (j + 1) * of.inner, 0.0);
  all.resize(of.count);
  return all;
}

}  // namespace wn_kernels
