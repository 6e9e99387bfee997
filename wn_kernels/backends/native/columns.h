// Passes over a weight whose slices are not its rows: slices along any other dimension, such as the
// positions of a kernel, or the whole of it. It is read as a matrix, of whose columns each slice has
// a few neighbours.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "rows.h"

namespace wn_kernels {

// Columns that are worth a vector, that are worth a row of their own, and that fit the caches a few
// times.
constexpr int64_t kFewColumns = 16;
constexpr int64_t kSomeColumns = 512;
constexpr int64_t kManyColumns = 1 << 14;

// Rows that a sum takes before it is added to a wider one.
constexpr int64_t kBlockOfRows = 64;

// Elements that are worth a chunk of blocks, which a thread takes, and the most chunks: every one has
// sums of its own, which another thread reads.
constexpr int64_t kChunk = 1 << 16;
constexpr int64_t kChunks = 8;

// A weight as (rows, repeats, count, inner), of `count` slices.
struct Columns {
  int64_t rows = 1, repeats = 1, count = 1, inner = 1;

  int64_t step() const { return count * inner; }  // to where a slice goes on
  int64_t width() const { return repeats * step(); }

  // Two short rows are a longer one, with every slice twice.
  void widen() {
    while (rows % 2 == 0 && width() < kSomeColumns) rows /= 2, repeats *= 2;
  }
};

// A number f(j) of each slice, for each of its columns.
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

// Whether slice j is all zeros.
template <typename T>
bool is_zero(const T* v, int64_t j, const Columns& of) {
  for (int64_t at = j * of.inner; at < of.rows * of.width(); at += of.step())
    for (int64_t i = 0; i < of.inner; ++i)
      if (v[at + i] != 0) return false;
  return true;
}

// part_j += <a_j, b_j>. Of four rows at once, as every sum is loaded and stored.
template <typename T>
void add_dots(T* __restrict part, const T* a, const T* b, int64_t rows, int64_t columns) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *a0 = a + i * columns, *a1 = a0 + columns, *a2 = a1 + columns, *a3 = a2 + columns;
    const T *b0 = b + i * columns, *b1 = b0 + columns, *b2 = b1 + columns, *b3 = b2 + columns;
    for (int64_t j = 0; j < columns; ++j)
      part[j] += (a0[j] * b0[j] + a1[j] * b1[j]) + (a2[j] * b2[j] + a3[j] * b3[j]);
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) part[j] += a[i * columns + j] * b[i * columns + j];
}

// <A_j, B_j> of every slice. Chunks of rows are added in order, whoever took them.
template <typename T>
std::vector<double> column_dots(const T* a, const T* b, const Columns& of) {
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
