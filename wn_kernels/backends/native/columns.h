// Passes over a weight whose slices are its columns: its last dimension, such as the positions of a
// kernel. It is read as a matrix of rows, a row of one element of every slice.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace wn_kernels {

// Columns that are worth a vector.
constexpr int64_t kFewColumns = 16;

// Rows that a sum takes before it is added to a wider one.
constexpr int64_t kBlockOfRows = 64;

// <A_j, B_j> of every column. Blocks of rows are added in order, whoever took them.
template <typename T>
std::vector<double> column_dots(const T* a, const T* b, int64_t rows, int64_t columns) {
  const int64_t blocks = (rows + kBlockOfRows - 1) / kBlockOfRows;
  std::vector<T> parts(blocks * columns);
  for_each(blocks, kBlockOfRows * columns, [&](int64_t block) {
    T* part = parts.data() + block * columns;
    const int64_t end = std::min(rows, (block + 1) * kBlockOfRows);
    for (int64_t i = block * kBlockOfRows; i < end; ++i)
      for (int64_t j = 0; j < columns; ++j) part[j] += a[i * columns + j] * b[i * columns + j];
  });
  std::vector<double> sums(columns);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < columns; ++j) sums[j] += parts[block * columns + j];
  return sums;
}

}  // namespace wn_kernels
