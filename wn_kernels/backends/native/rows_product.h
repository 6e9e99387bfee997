// This file computes P = V B, the products of the rows of a weight. It reads V once, as it lies.
//
// An element of a row of V is multiplied by a vector of that element of B, for as many columns (Strips). A
// tile of rows and of a strip of columns has a vector of sums for each row. If few columns are left, a vector
// has several elements of each of them, and as many sums, which are added up at the end.

#pragma once

#include <optional>
#include <utility>

#include "panels.h"

namespace wn_kernels {

// Returns whether threads share the columns of B in a linear layer, and each takes all rows of V. Otherwise
// they share the rows.
inline bool shares_columns(int64_t columns, int64_t rows) {
  return columns > rows && columns >= 2 * kPartColumns;
}

// A stack of rows has at most so many.
template <typename T>
constexpr int64_t kStack = 2 * Lanes<T>::count;

// Calls f(first, count) for stacks of rows of V, each of which one thread takes. A row takes this many
// multiplications.
template <typename T, typename F>
void for_each_stack(int64_t rows, int64_t multiplications, const F& f) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, grains = grain(kTileRows * multiplications);
  at::parallel_for(0, tiles, grains, [&](int64_t begin, int64_t end) {
    constexpr int64_t most = kStack<T> / kTileRows;
    for (int64_t i = begin; i < end; i += most) {
      const int64_t last = std::min(std::min(i + most, end) * kTileRows, rows);
      f(i * kTileRows, last - i * kTileRows);
    }
  });
}

// Returns a vector of `run` numbers again and again.
template <int run, typename T>
inline Vector<T> repeated(const T* from) {
  constexpr int bytes = run * sizeof(T);
  if constexpr (run == 1) {
    return *from - Vector<T>{};
  } else if constexpr (bytes == kVectorBytes) {
    return load(from);
  } else if constexpr (bytes == 8) {
    typedef int64_t Numbers __attribute__((vector_size(kVectorBytes)));
    int64_t number;
    std::memcpy(&number, from, sizeof number);
    return (Vector<T>)(number - Numbers{});
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  } else if constexpr (bytes == 16) {
    return (Vector<T>)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  } else if constexpr (bytes == 32) {
    return (Vector<T>)_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif WN_VECTOR_BYTES == 32 && defined(__AVX2__)
  } else if constexpr (bytes == 16) {
    return (Vector<T>)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  } else {
    alignas(kVectorBytes) T all[Lanes<T>::count];
    for (int64_t i = 0; i < Lanes<T>::count; i += run) std::copy_n(from, run, all + i);
    return load(all);
  }
}

// Returns every second lane, from this one on, in the first half of a vector.
template <typename T, size_t... lane>
inline Vector<T> every_second(Vector<T> v, size_t from, std::index_sequence<lane...>) {
  constexpr size_t lanes = sizeof...(lane);
  return __builtin_shuffle(v, Raw<T>{static_cast<RawNumber<T>>((2 * lane + from) % lanes)...});
}

// Returns the sums of `run` neighbouring lanes, one after the other.
template <int run, typename Value>
inline Value sums_of_runs(Value v) {
  if constexpr (run == 1) {
    return v;
  } else {
    using T = std::remove_reference_t<decltype(v[0])>;
    constexpr auto all = std::make_index_sequence<Lanes<T>::count>{};
    return sums_of_runs<run / 2>(every_second<T>(v, 0, all) + every_second<T>(v, 1, all));
  }
}

// This struct says where C vectors of the columns of a matrix lie. From one element of the length to the next
// they are `step` numbers apart. What is read after them lies `ahead` of them.
template <typename B>
struct Strip {
  const B* data;
  int64_t step, ahead = 0;
};

// Adds the products of R rows with C vectors of a strip to sums, which lie so far apart for two rows. So do
// the rows. A vector has `run` elements of the length.
template <int R, int C, int run, typename T, typename B>
inline void strip_tile(
    T* to, int64_t sums, const T* rows, int64_t row, const Strip<B>& strip, int64_t steps) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c] = load(to + r * sums + c * lanes);
  const B* from = strip.data;
  for (; steps > 0; --steps, from += strip.step, rows += run) {
    Vector<T> values[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) values[c] = load(from + c * lanes);
    for (int c = 0; C > 1 && c < C; ++c) __builtin_prefetch(from + strip.ahead + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> factor = repeated<run>(rows + r * row);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(factor, values[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) store(to + r * sums + c * lanes, sum[r][c]);
}

// Does the same for any number of rows.
template <int C, int run, int R = kTileRows, typename T, typename B>
void strip_product(
    int64_t count, T* to, int64_t sums, const T* rows, int64_t row, const Strip<B>& strip,
    int64_t steps) {
  for (; count >= R; count -= R, to += R * sums, rows += R * row)
    strip_tile<R, C, run>(to, sums, rows, row, strip, steps);
  if constexpr (R > 1)
    if (count) strip_product<C, run, R / 2>(count, to, sums, rows, row, strip, steps);
}

// This many bytes of each row of a stack are multiplied by all columns before the next ones. As many elements
// of a strip stay in the first-level cache.
constexpr int64_t kSegmentBytes = 1 << 9;

// Holds the terms of the norms of a stack of rows, in vectors that are merged after every block.
template <typename T>
class StackTerms {
 public:
  // Adds elements [at, at + size) of rows that lie so far apart.
  void add(Norm of, const T* rows, int64_t row, int64_t count, int64_t at, int64_t size) {
    if (at > 0 && at % kBlock == 0) merge(of, count);
    with_norm(of, [&](auto constant) {
      constexpr Norm norm = decltype(constant)::value;
      for (int64_t r = 0; r < count; ++r, rows += row) {
        Vector<T> parts[kParts_] = {terms_[r]};
        int64_t k = 0;
        for (; k + kParts_ * lanes_ <= size; k += kParts_ * lanes_)
#pragma GCC unroll 4
          for (int64_t i = 0; i < kParts_; ++i)
            parts[i] = Merge<norm>::merge(parts[i], norm_term<norm>(load(rows + k + i * lanes_)));
        for_each_vector<T>(size - k, [&](int64_t i, auto width) {
          parts[0] = Merge<norm>::merge(parts[0], norm_term<norm>(load(rows + k + i, width)));
        });
        terms_[r] = Merge<norm>::merge(
            Merge<norm>::merge(parts[0], parts[1]), Merge<norm>::merge(parts[2], parts[3]));
      }
    });
  }
  // Returns the partials of the rows. They are zero if nothing was added.
  const double* partials(Norm of, int64_t count) {
    merge(of, count);
    return partials_.data();
  }

 private:
  static constexpr int64_t lanes_ = Lanes<T>::count, kParts_ = 4;

  void merge(Norm of, int64_t count) {
    with_norm(of, [&](auto constant) {
      using Merge = wn_kernels::Merge<decltype(constant)::value>;
      for (int64_t r = 0; r < count; ++r) {
        const double part = merged_lanes<Merge, lanes_>(reinterpret_cast<const T*>(&terms_[r]));
        partials_[r] = merged(of, partials_[r], part);
        terms_[r] = Vector<T>{};
      }
    });
  }

  std::array<Vector<T>, kStack<T>> terms_{};
  std::array<double, kStack<T>> partials_{};
};

// Computes P = V B for a stack of rows and calls finish(products, partials of the rows). A row of products
// has b.sums() numbers, of which the first ones are those of the columns. The partials are zero if no norm
// is given.
template <typename V, typename Finish>
void rows_product(
    const V* v, int64_t first, int64_t count, const Strips<Wide<V>>& b, std::optional<Norm> norm,
    const Finish& finish) {
  using T = Wide<V>;
  constexpr int64_t lanes = Lanes<T>::count, segment = kSegmentBytes / sizeof(T);
  // The rows of a copy do not compete for the same lines of the cache.
  constexpr int64_t copied_row = segment + lanes;
  const int64_t sums = b.sums();
  const V* rows = v + first * b.length;
  std::vector<T> products(count * sums);
  StackTerms<T> terms;
  alignas(kVectorBytes) T copy[kStack<T> * copied_row];
  for (int64_t at = 0; at < b.length; at += segment) {
    const int64_t size = std::min(segment, b.length - at), steps = (size + b.run - 1) / b.run;
    const T* from = copy;
    int64_t row = copied_row;
    if constexpr (std::is_same_v<V, T>)
      if (size % b.run == 0) from = rows + at, row = b.length;
    if (from == copy)
      for (int64_t r = 0; r < count; ++r) {
        T* to = copy + r * copied_row;
        // Zeros follow the last element.
        for_each_vector<T>(size, [&](int64_t i, auto width) {
          store(to + i, load(rows + r * b.length + at + i, width));
        });
      }
    if (norm) terms.add(*norm, from, row, count, at, size);
    T* to = products.data();
    for (int64_t vector = 0, width; vector < b.vectors; vector += width, to += width * lanes) {
      width = b.width(vector);
      const int64_t step = width * lanes, ahead = vector + width < b.vectors ? step * b.length : 0;
      const Strip<T> strip{b.strip(vector) + at * step, step, ahead};
      if (width == 2)
        strip_product<2, 1>(count, to, sums, from, row, strip, size);
      else
        strip_product<1, 1>(count, to, sums, from, row, strip, size);
    }
    if (b.rest)
      with_power<lanes>(b.run, [&](auto run) {
        const Strip<T> strip{b.of_rest() + at / run * lanes, lanes};
        strip_product<1, run>(count, to, sums, from, row, strip, steps);
      });
  }
  if (b.run > 1)
    with_power<lanes>(b.run, [&](auto run) {
      T* to = products.data() + b.vectors * lanes;
      for (int64_t r = 0; r < count; ++r, to += sums) store(to, sums_of_runs<run>(load(to)));
    });
  finish(products.data(), terms.partials(norm.value_or(Norm::l2), count));
}

// Calls f(column, row, products, width) for vectors of `width` products of a column, from this row on.
template <typename T, typename F>
void for_each_column(
    const T* products, int64_t sums, int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t left = 0; left < columns; left += lanes)
    for (int64_t top = 0; top < rows; top += lanes) {
      Vector<T> t[lanes];
      for (int64_t r = 0; r < lanes; ++r)
        t[r] = load(products + std::min(top + r, rows - 1) * sums + left);
      transpose<T>(t);
      for (int64_t j = 0; j < std::min(lanes, columns - left); ++j)
        if (top + lanes <= rows)
          f(left + j, top, t[j], All{});
        else
          f(left + j, top, t[j], rows - top);
    }
}

// Calls f(i, first, count) for parts of the columns of B, which threads take if they are shared, and which
// otherwise come in turn. A part begins at a whole vector, so that the number of parts changes no bit.
template <typename T, typename F>
void for_each_part(int64_t columns, int64_t parts, bool is_shared, const F& f) {
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t vectors = (columns + lanes - 1) / lanes;
  const auto begin = [=](int64_t i) { return std::min(columns, vectors * i / parts * lanes); };
  const auto part = [&](int64_t i) { f(i, begin(i), begin(i + 1) - begin(i)); };
  if (is_shared)
    for_each(parts, kGrain, part);
  else
    for (int64_t i = 0; i < parts; ++i) part(i);
}

}  // namespace wn_kernels
