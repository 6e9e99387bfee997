// This file makes passes over a weight whose slices are not its rows. The slices may lie along any
// other dimension, such as the positions of a kernel, or one slice may be the whole weight. The
// weight is read as a matrix, in which each slice occupies a few neighbouring columns.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "rows.h"

namespace wn_kernels {

// These are limits of the width. At least 16 columns fill a vector. Rows narrower than 512 columns
// are joined, and if enough blocks are left for all chunks, those narrower than 1024, so that a block is
// worth its merging. A row has at most 2^14 columns, so that several rows fit in the cache.
constexpr int64_t kFewColumns = 16;
constexpr int64_t kSomeColumns = 512;
constexpr int64_t kManyColumns = 1 << 14;

// A sum takes this many rows before it is added to a double.
constexpr int64_t kBlockOfRows = 64;

// A thread takes a chunk of blocks, of at least kChunk elements. There are at most kChunks chunks,
// because every chunk has its own sums, which another thread reads later.
constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kChunks = 8;

// A weight is viewed in the shape (rows, repeats, count, inner). It has `count` slices.
struct Columns {
  int64_t rows = 1, repeats = 1, count = 1, inner = 1;

  int64_t step() const { return count * inner; }  // distance to the slice's next run
  int64_t width() const { return repeats * step(); }

  // Joins two short rows into one, in which every slice occurs twice, until the row is wide enough.
  void widen() {
    const auto widest = [&] { return (rows > 2 * kChunks * kBlockOfRows ? 2 : 1) * kSomeColumns; };
    while (rows % 2 == 0 && width() < widest()) rows /= 2, repeats *= 2;
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

// Calls f(row) for all rows, in blocks from the last one to the first: the cache still has what the pass
// before has read last. The rows of a block come in order, because the processor fetches ahead.
template <typename F>
void for_each_row_again(const Columns& of, const F& f) {
  at::parallel_for(0, of.rows, grain(of.width()), [&](int64_t begin, int64_t end) {
    for (int64_t last = end, first; last > begin; last = first) {
      first = std::max(begin, last - kBlockOfRows);
      for (int64_t row = first; row < last; ++row) f(row);
    }
  });
}

// So many rows of a matrix in the cache are taken at once, because every pass loads and stores the
// results. The rows that are left are taken one by one.
constexpr int64_t kRowsAtOnce = 4;
template <int64_t rows>
using Rows = std::integral_constant<int64_t, rows>;

// Returns the terms of one row, or the merged ones of several.
template <int64_t rows, typename... Merges, typename Term>
auto merged_terms(const Term& term) {
  if constexpr (rows == 1) {
    return term(0);
  } else {
    auto terms = merged_terms<rows / 2, Merges...>(term);
    merge_each<Merges...>(
        [&](size_t k) -> auto& { return terms[k]; },
        merged_terms<rows / 2, Merges...>([&](int64_t r) { return term(rows / 2 + r); }));
    return terms;
  }
}

// Merges the terms of some rows, which start at element `at`, into the partial results of each
// column. take(at, rows) returns a function of (j, count), which returns the merged terms of the rows
// that start at element `at`, in the columns from j on. It is called for `at_once` rows, and for single
// ones that are left.
template <int64_t at_once, typename T, typename... Merges, typename Take>
void merge_rows(T* parts, int64_t at, int64_t rows, int64_t columns, const Take& take) {
  constexpr size_t N = sizeof...(Merges);
  const auto merge = [=](int64_t at, auto rows) {
    const auto terms = take(at, rows);
    for_each_vector<T>(columns, [=](int64_t j, auto count) {
      std::array<Vector<T>, N> all;
      const auto found = terms(j, count);
      for (size_t k = 0; k < N; ++k) all[k] = load(parts + k * columns + j, count);
      merge_each<Merges...>([&](size_t k) -> Vector<T>& { return all[k]; }, found);
      for (size_t k = 0; k < N; ++k) store(parts + k * columns + j, all[k], count);
    });
  };
  int64_t row = 0;
  for (; row + at_once <= rows; row += at_once, at += at_once * columns) merge(at, Rows<at_once>{});
  for (; row < rows; ++row, at += columns) merge(at, Rows<1>{});
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
  const std::unique_ptr<double[]> all(new double[chunks * N * width]);
  // Merges the results of `count` columns into those of other ones.
  const auto merge_into = [=](double* to, const auto* from, int64_t count) {
    const auto merge_one = [=](auto merge, size_t k) {
      for (int64_t j = k * width; j < int64_t(k) * width + count; ++j)
        to[j] = decltype(merge)::merge(to[j], static_cast<double>(from[j]));
    };
    size_t k = 0;
    (merge_one(Merges{}, k++), ...);
  };
  for_each(chunks, of.rows * width / chunks, [&](int64_t chunk) {
    double* results = all.get() + chunk * N * width;
    std::fill_n(results, N * width, 0.0);
    std::vector<T> parts(N * width);
    for (int64_t block = chunk * blocks / chunks; block < (chunk + 1) * blocks / chunks; ++block) {
      const int64_t first = block * kBlockOfRows;
      std::fill(parts.begin(), parts.end(), T(0));
      take(parts.data(), first * width, std::min(kBlockOfRows, of.rows - first));
      merge_into(results, parts.data(), width);
    }
  });
  double* results = all.get();
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    merge_into(results, results + chunk * N * width, width);
  for (int64_t at = of.step(); at < width; at += of.step()) merge_into(results, results + at, of.step());
  std::array<std::vector<double>, N> out;
  size_t k = 0;
  const auto finish = [&](auto merge) {
    const double* from = results + k * width;
    if (of.inner == 1) return out[k++].assign(from, from + of.count);
    for (int64_t j = 0; j < of.count; ++j, from += of.inner) {
      double all = *from;
      for (int64_t i = 1; i < of.inner; ++i) all = decltype(merge)::merge(all, from[i]);
      out[k].push_back(all);
    }
    ++k;
  };
  (finish(Merges{}), ...);
  return out;
}

// Matrices of more bytes do not stay in the caches. The processor fetches one row after the other ahead,
// but not several at once. It is told what comes so many bytes later, because it does not look as far
// beyond what it computes.
constexpr int64_t kCachedBytes = 1 << 23;
constexpr int64_t kFetchedBytes = 1 << 14;

// The same, where each reduction merges its terms. term(i, j, count) returns a vector of the terms of
// each, for the elements from i on of the given matrices, which lie in the columns from j on.
template <typename T, typename... Merges, typename Term, typename... Elements>
std::array<std::vector<double>, sizeof...(Merges)> column_reductions(
    const Columns& of, const Term& term, const Elements*... matrices) {
  const int64_t width = of.width();
  const bool is_cached = of.rows * width * int64_t((sizeof(Elements) + ...)) <= kCachedBytes;
  return merged_columns<T, Merges...>(of, [=](T* parts, int64_t at, int64_t rows) {
    if (is_cached)
      return merge_rows<kRowsAtOnce, T, Merges...>(parts, at, rows, width, [=](int64_t at, auto rows) {
        return [=](int64_t j, auto count) {
          return merged_terms<decltype(rows)::value, Merges...>(
              [=](int64_t r) { return term(at + r * width + j, j, count); });
        };
      });
    merge_rows<1, T, Merges...>(parts, at, rows, width, [=](int64_t at, auto) {
      return [=](int64_t j, auto count) {
        (__builtin_prefetch(matrices + at + j + kFetchedBytes / sizeof(Elements)), ...);
        return term(at + j, j, count);
      };
    });
  });
}

// Returns <A_j, B_j> of every slice.
template <typename A, typename B>
std::vector<double> column_dots(const A* a, const B* b, const Columns& of) {
  using T = Wide<A>;
  const auto product = [=](int64_t i, int64_t, auto count) {
    return std::array<Vector<T>, 1>{load(a + i, count) * load(b + i, count)};
  };
  return column_reductions<T, Sum>(of, product, a, b)[0];
}

// Finds the ties of all columns, which are the elements with |v| = n. Under linf they alone have a slope.
// They are noted in tiles: one vector of each of kRowsAtOnce rows, or of one that is left.
template <typename V>
class ColumnTies {
  using T = Wide<V>;

 public:
  // The norms of all columns are given.
  ColumnTies(const V* v, const std::vector<T>& n, const Columns& of)
      : v_(v), n_(n), of_(of), width_(of.width()), whole_(of.rows / kRowsAtOnce),
        vectors_((width_ + kLanes - 1) / kLanes),
        noted_((whole_ + of.rows % kRowsAtOnce) * vectors_), x_(width_ + kLanes) {
    std::memset(x_.data(), -1, x_.size() * sizeof(V));
    for_each_vector<T>(width_, [&](int64_t j, auto count) {
      store_raw(&x_[j], raw_magnitudes<V>(load(&n[j], count)), count);
    });
  }

  // Returns <A_j, V_j> of every slice and how many ties it has. It writes to = s a in the tiles without
  // ties. `to` may overwrite a.
  template <typename A>
  std::array<std::vector<double>, 2> dots_and_scale(V* to, const T* s, const A* a) {
    return merged_columns<T, Sum, Sum>(of_, [&](T* parts, int64_t at, int64_t rows) {
      merge_rows<kRowsAtOnce, T, Sum>(parts, at, rows, width_, [&](int64_t at, auto rows) {
        constexpr int64_t count_of_rows = decltype(rows)::value;
        auto* noted = &noted_[tile_of(at / width_) * vectors_];
        return [=, ties_of = parts + width_, v = v_ + at, a = a + at, to = to + at, x = x_.data(),
                n = n_.data(), width = width_](int64_t j, auto count) {
          Raw<V> raw[count_of_rows];
          Vector<T> as[count_of_rows];
          const Raw<V> xs = load_raw(x + j, All{});
          auto ties = equal(raw[0] = load_raw(v + j, count), xs);
          for (int64_t r = 1; r < count_of_rows; ++r)
            ties |= equal(raw[r] = load_raw(v + r * width + j, count), xs);
          for (int64_t r = 0; r < count_of_rows; ++r) as[r] = load(a + r * width + j, count);
          if (__builtin_expect(marked(ties) != 0, 0)) {
            noted[j / kLanes] = true;
            Vector<T> sum = load(ties_of + j, count);
            for (int64_t r = 0; r < count_of_rows; ++r)
              sum += tied(widened<V>(raw[r]), load(n + j, count));
            store(ties_of + j, sum, count);
          } else {
            const Vector<T> scales = load(s + j, count);
            for (int64_t r = 0; r < count_of_rows; ++r)
              store(to + r * width + j, scales * as[r], count);
          }
          return merged_terms<count_of_rows, Sum>([&](int64_t r) {
            return std::array<Vector<T>, 1>{as[r] * widened<V>(raw[r])};
          });
        };
      });
    });
  }

  // Calls f(i, j, count) for each row of the tiles with ties.
  template <typename F>
  void for_each_row(const F& f) const {
    for_each(noted_.size() / vectors_, kRowsAtOnce * width_, [=](int64_t tile) {
      const int64_t first = first_row(tile), end = first_row(tile + 1);
      const auto* noted = &noted_[tile * vectors_];
      for_each_vector<T>(width_, [=](int64_t j, auto count) {
        if (noted[j / kLanes])
          for (int64_t row = first; row < end; ++row) f(row * width_ + j, j, count);
      });
    });
  }

 private:
  static constexpr int64_t kLanes = Lanes<T>::count;

  int64_t tile_of(int64_t row) const {
    return row < whole_ * kRowsAtOnce ? row / kRowsAtOnce : row - whole_ * (kRowsAtOnce - 1);
  }
  int64_t first_row(int64_t tile) const {
    return tile < whole_ ? tile * kRowsAtOnce : tile + whole_ * (kRowsAtOnce - 1);
  }

  const V* v_;
  const std::vector<T>& n_;
  Columns of_;
  int64_t width_, whole_, vectors_;
  std::vector<uint8_t> noted_;
  std::vector<V> x_;  // one vector more, so that no element that is not there is a tie
};

// Returns the partial of every slice.
template <typename V>
std::vector<double> column_partials(Norm of_norm, const V* v, const Columns& of) {
  using T = Wide<V>;
  std::vector<double> out;
  with_norm(of_norm, [&](auto constant) {
    constexpr Norm norm = decltype(constant)::value;
    const auto merged_term = [=](int64_t i, int64_t, auto count) {
      return std::array<Vector<T>, 1>{norm_term<norm>(load(v + i, count))};
    };
    out = column_reductions<T, Merge<norm>>(of, merged_term, v)[0];
  });
  return out;
}

}  // namespace wn_kernels
