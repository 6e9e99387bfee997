// This file stores the factors of the products of a weight (products.h), in panels or in strips.
//
// A panel of a matrix (length, columns) holds kPanel elements of the length for every column, one column
// after the other. Each vector of a row of V is therefore multiplied by consecutive vectors. The last
// panel is padded with zeros.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "rows.h"

namespace wn_kernels {

#if WN_VECTOR_BYTES == 64
constexpr int kStackedRows = 8;  // each row takes two vectors, and the sums take two
#else
constexpr int kStackedRows = 6;
#endif

template <typename T>
constexpr int64_t kPanel = 2 * Lanes<T>::count;

constexpr int64_t kCacheLine = 64;  // bytes

// Picks lanes of two vectors. Runs of `run` lanes alternate between the two. The second pick has the other
// half of the lanes, in the same order.
template <typename T, size_t run, size_t... lane>
constexpr Raw<T> pick(bool second, std::index_sequence<lane...>) {
  constexpr size_t lanes = Lanes<T>::count;
  const auto from = [=](size_t i) {
    const size_t in = i % (2 * run), of = in < run ? 0 : lanes;
    return static_cast<RawNumber<T>>(of + i - in + in % run + (second ? run : 0));
  };
  return Raw<T>{from(lane)...};
}

// Transposes a square matrix whose elements are `size` numbers. A row fills a vector.
template <typename T, size_t size = 1, size_t run = size>
inline __attribute__((always_inline)) void transpose(Vector<T>* row) {
  constexpr size_t lanes = Lanes<T>::count, other = run / size;
  if constexpr (run < lanes) {
    constexpr auto all = std::make_index_sequence<lanes>{};
#pragma GCC unroll 16
    for (size_t i = 0; i < lanes / size; ++i) {
      if (i & other) continue;
      const Vector<T> a = row[i], b = row[i + other];
      row[i] = __builtin_shuffle(a, b, pick<T, run>(false, all));
      row[i + other] = __builtin_shuffle(a, b, pick<T, run>(true, all));
    }
    transpose<T, size, 2 * run>(row);
  }
}

// Calls f with a power of two from 1 to `most` as a constant.
template <int most, typename F>
void with_power(int64_t power, const F& f) {
  if constexpr (most > 1)
    if (power < most) return with_power<most / 2>(power, f);
  f(std::integral_constant<int, most>{});
}

// This struct describes a matrix in memory. Its rows or its columns lie next to each other.
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;  // the steps from a row to the next one, and from a column; one of them is 1

  const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  Strided below(int64_t i) const { return {at(i, 0), row, column}; }
};

// Returns the matrix (rows, columns) that is stored row by row. `turned` returns its transpose.
template <typename T>
Strided<T> by_rows(const T* data, int64_t columns) {
  return {data, columns, 1};
}
template <typename T>
Strided<T> turned(const T* data, int64_t columns) {
  return {data, 1, columns};
}

// A thread keeps at most this many bytes for the next block.
constexpr int64_t kKeptBytes = 1 << 21;

// This class holds memory that begins where a vector may. A thread keeps one of the blocks that it has freed.
// The C library would return it to the system, and the next one would have a page fault for every 4 KiB.
class Block {
 public:
  explicit Block(int64_t bytes) {
    if (bytes == 0) return;
    if (auto& kept = of_thread(); kept.bytes_ >= bytes) {
      swap(kept);
      return;
    }
    data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(kVectorBytes))));
    bytes_ = bytes;
  }
  Block(Block&& other) noexcept { swap(other); }
  ~Block() {
    if (auto& kept = of_thread(); bytes_ > kept.bytes_ && bytes_ <= kKeptBytes) swap(kept);
  }

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Delete {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t(kVectorBytes)); }
  };
  struct Kept {
    std::unique_ptr<char, Delete> data_;
    int64_t bytes_ = 0;
  };
  static Kept& of_thread() {
    static thread_local Kept kept;
    return kept;
  }

  template <typename Other>
  void swap(Other& other) {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
  }

  std::unique_ptr<char, Delete> data_;
  int64_t bytes_ = 0;
};

// This class stores a matrix (length, columns) in panels.
template <typename T>
class Panels {
 public:
  Panels(int64_t length, int64_t columns)
      : length(length), columns(columns), full(length / kPanel<T>),
        count((length + kPanel<T> - 1) / kPanel<T>),
        step(kPanel<T> * (columns | 1)), memory_(count * step * static_cast<int64_t>(sizeof(T))),
        data_(memory_.as<T>()) {}

  T* panel(int64_t i) { return data_ + i * step; }
  const T* panel(int64_t i) const { return data_ + i * step; }

  T* element(int64_t i, int64_t column) {
    return panel(i / kPanel<T>) + column * kPanel<T> + i % kPanel<T>;
  }
  const T* element(int64_t i, int64_t column) const {
    return const_cast<Panels*>(this)->element(i, column);
  }

  void zero() {
    for_each(count, columns * kPanel<T>, [&](int64_t i) { clear(i); });
  }
  // Zeroes the last panel if it is not full.
  void zero_rest() {
    if (full < count) clear(full);
  }

  const int64_t length, columns, full, count;
  // From a panel to the next one. An even number of columns may have a power of two of bytes, and all
  // panels would compete for the same lines of the cache.
  const int64_t step;

 private:
  void clear(int64_t i) { std::fill_n(panel(i), columns * kPanel<T>, T(0)); }

  Block memory_;
  T* data_;
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

// This class stores a matrix (length, columns) in strips. A vector holds one element of the length for as many
// columns as it has lanes, and a strip holds two such vectors, or one, for every element. The columns that are
// left share a vector. It holds `run` elements for each of them, one column after the other.
template <typename T>
class Strips {
 public:
  static constexpr int64_t lanes = Lanes<T>::count;

  Strips(int64_t length, int64_t columns)
      : length(length), columns(columns), vectors(columns / lanes), rest(columns % lanes),
        run(rest ? lanes / ceil_to_power(rest) : 1), steps((length + run - 1) / run),
        memory_((vectors * length + (rest ? steps : 0)) * kVectorBytes), data_(memory_.as<T>()) {}

  // The strip that starts at this vector has so many vectors for each element.
  int64_t width(int64_t vector) const { return std::min<int64_t>(2, vectors - vector); }
  // The sums of a row have so many numbers.
  int64_t sums() const { return (vectors + (rest > 0)) * lanes; }
  T* strip(int64_t vector) { return data_ + vector * length * lanes; }
  const T* strip(int64_t vector) const { return data_ + vector * length * lanes; }
  T* of_rest() { return strip(vectors); }
  const T* of_rest() const { return strip(vectors); }

  // Zeroes what set() leaves of the vectors of the rest.
  void zero_rest() { std::fill_n(of_rest(), rest ? steps * lanes : 0, T(0)); }
  // Sets element k of `count` columns from `first` on, which is the first one of a vector. They fill whole
  // vectors, unless they are the last ones.
  void set(int64_t k, int64_t first, int64_t count, const T* values) {
    int64_t vector = first / lanes;
    for (; count >= lanes; count -= lanes, values += lanes) store(place(k, vector++), load(values));
    T* to = of_rest() + k / run * lanes + k % run;
    for (int64_t j = 0; j < count; ++j) to[j * run] = values[j];
  }

  // Copies a matrix. from(k, j) points to elements of column j that lie next to each other, from element k
  // on, at least up to the next multiple of the lanes.
  template <typename From>
  void fill(const From& from) {
    for_each((length + lanes - 1) / lanes, lanes * columns, [&](int64_t block) {
      const int64_t k = block * lanes, size = std::min(lanes, length - k);
      const auto values = [&](int64_t j) {
        return size == lanes ? load(from(k, j)) : load(from(k, j), size);
      };
      for (int64_t vector = 0; vector < vectors; ++vector) {
        Vector<T> t[lanes];
        for (int64_t j = 0; j < lanes; ++j) t[j] = values(vector * lanes + j);
        transpose<T>(t);
        for (int64_t i = 0; i < size; ++i) store(place(k + i, vector), t[i]);
      }
      if (rest == 0) return;
      with_power<lanes>(run, [&](auto constant) {
        constexpr int run = constant;
        Vector<T> t[lanes / run] = {};
        for (int64_t j = 0; j < rest; ++j) t[j] = values(vectors * lanes + j);
        transpose<T, run>(t);
        T* to = of_rest() + k / run * lanes;
        for (int64_t i = 0; i * run < size; ++i) store(to + i * lanes, t[i]);
      });
    });
  }
  void fill(const Panels<T>& from) {
    fill([&](int64_t k, int64_t j) { return from.element(k, j); });
  }

  const int64_t length, columns;
  const int64_t vectors, rest;  // of columns
  const int64_t run, steps;     // of the rest

 private:
  static int64_t ceil_to_power(int64_t count) {
    int64_t power = 1;
    while (power < count) power *= 2;
    return power;
  }
  T* place(int64_t k, int64_t vector) {
    const int64_t first = vector / 2 * 2;
    return strip(first) + (k * width(first) + vector - first) * lanes;
  }

  Block memory_;
  T* data_;
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
  // Sets all rows, from `count` rows of D from `first` on. They may have factors.
  void fill(const Strided<T>& d, int64_t first, int64_t count, const T* factors) {
    std::vector<T> factor(count, T(1));
    if (factors) std::copy_n(factors + first, count, factor.data());
    if (d.column == 1) {
      for (int64_t r = 0; r < count; ++r) set(r, d.at(first + r, 0), factor[r]);
      return;
    }
    // The rows of a column are neighbours in memory, but the columns may lie a page apart. The processor
    // does not fetch ahead over such distances.
    constexpr int64_t ahead = 8;
    for (int64_t j = 0; j < columns_; ++j)
      for (int64_t top = 0; top < count; top += R) {
        T* to = data_.data() + top * columns_ + j * R;
        const T *from = d.at(first + top, j), *with = &factor[top];
        __builtin_prefetch(d.at(first + top, std::min(j + ahead, columns_ - 1)));
        if (top + R <= count)
          for (int64_t r = 0; r < R; ++r) to[r] = with[r] * from[r];
        else
          for (int64_t r = 0; r < count - top; ++r) to[r] = with[r] * from[r];
      }
  }
  // Returns the stack that starts at `row`.
  const T* stack(int64_t row) const { return data_.data() + row * columns_; }

 private:
  int64_t columns_;
  std::vector<T> data_;
};

}  // namespace wn_kernels
