// Passes over a weight whose slices are not its rows: slices along any other dimension, such as the
// positions of a kernel, or the whole of it. It is read as a matrix, of whose columns each slice has
// a few neighbours.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace wn_kernels {

// Columns that are worth a vector, and that fit the caches a few times.
constexpr int64_t kFewColumns = 16;
constexpr int64_t kManyColumns = 1 << 14;

// Rows that a sum takes before it is added to a wider one.
constexpr int64_t kBlockOfRows = 64;

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

// <A_j, B_j> of every slice, of `inner` columns each. Blocks of rows are added in order, whoever
// took them.
template <typename T>
std::vector<double> column_dots(
    const T* a, const T* b, int64_t rows, int64_t count, int64_t inner) {
  const int64_t columns = count * inner, blocks = (rows + kBlockOfRows - 1) / kBlockOfRows;
  std::vector<T> parts(blocks * columns);
  for_each(blocks, kBlockOfRows * columns, [&](int64_t block) {
    const int64_t first = block * kBlockOfRows, at = first * columns;
    add_dots(
        parts.data() + block * columns, a + at, b + at, std::min(kBlockOfRows, rows - first),
        columns);
  });
  std::vector<double> sums(columns), dots(count);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < columns; ++j) sums[j] += parts[block * columns + j];
  for (int64_t j = 0; j < columns; ++j) dots[j / inner] += sums[j];
  return dots;
}

}  // namespace wn_kernels
