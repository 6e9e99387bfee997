// This file makes passes over a weight whose slices are its rows. Each pass reads a row once.
//
// One thread processes a whole row and adds its elements in blocks of a fixed size. The result
// therefore does not depend on the number of threads.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>

#include "vectors.h"

namespace wn_kernels {

// A sum takes kBlock elements before it is added to a double. It is held in kLanes partial sums,
// which fill four vectors of 256 bits in float32.
constexpr int64_t kBlock = 4096;
constexpr int kLanes = 32;

// A row of at most kShort elements is added up without partial sums. Depthwise convolutions have
// such rows.
constexpr int64_t kShort = 16;

// A thread takes at least this many elements.
constexpr int64_t kGrain = 32768;

// Returns how many items of `length` elements a thread takes at least.
inline int64_t grain(int64_t length) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
}

template <typename F>
void for_each(int64_t count, int64_t length, const F& f) {
  at::parallel_for(0, count, grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) f(j);
  });
}

// Adds `count` lanes. It halves them until one is left, within registers.
template <int64_t count, typename T>
T total(const T* from) {
  if constexpr (count == 1) {
    return *from;
  } else if constexpr (count * sizeof(T) <= 16) {
    return total<count / 2>(from) + total<count / 2>(from + count / 2);
  } else {
    typedef T Half __attribute__((vector_size(count / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, from, sizeof low);
    std::memcpy(&high, from + count / 2, sizeof high);
    low += high;
    T sums[count / 2];
    std::memcpy(sums, &low, sizeof low);
    return total<count / 2>(sums);
  }
}

// Computes N sums over a row. term(i, count) returns a vector of the terms of each sum, for the
// elements from i on. Vectors are numbered when the program is compiled, so that the partial sums stay in
// registers.
template <typename T, size_t N, typename Term>
inline __attribute__((always_inline)) std::array<double, N> sums(
    int64_t length, const Term& term) {
  constexpr int64_t lanes = Lanes<T>::count, vectors = kLanes / lanes;
  std::array<double, N> all{};
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t end = std::min(length, start + kBlock);
    Vector<T> parts[N][vectors] = {};
    const auto add = [&](int64_t vector, const std::array<Vector<T>, N>& terms) {
      for (size_t k = 0; k < N; ++k) parts[k][vector] += terms[k];
    };
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t l = 0; l < vectors; ++l) add(l, term(i + l * lanes, All{}));
#pragma GCC unroll 8
    for (int64_t l = 0; l < vectors; ++l, i += lanes) {
      if (i + lanes <= end)
        add(l, term(i, All{}));
      else if (i < end)
        add(l, term(i, end - i));
    }
    for (size_t k = 0; k < N; ++k) {
#pragma GCC unroll 8
      for (int64_t half = vectors / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) parts[k][l] += parts[k][l + half];
      all[k] += total<lanes>(reinterpret_cast<const T*>(&parts[k][0]));
    }
  }
  return all;
}

// Returns <a, b>.
template <typename A, typename B>
double dot(const A* a, const B* b, int64_t length) {
  using T = Wide<A>;
  if (length <= kShort) {
    double sum = 0;
    for (int64_t i = 0; i < length; ++i)
      sum += static_cast<double>(static_cast<T>(a[i])) * static_cast<T>(b[i]);
    return sum;
  }
  return sums<T, 1>(length, [=](int64_t i, auto count) {
    return std::array<Vector<T>, 1>{load(a + i, count) * load(b + i, count)};
  })[0];
}

// Returns <v, v> and <v, x>, and reads v once.
template <typename V>
std::array<double, 2> square_and_dot(const V* v, const Wide<V>* x, int64_t length) {
  using T = Wide<V>;
  return sums<T, 2>(length, [=](int64_t i, auto count) {
    const Vector<T> value = load(v + i, count);
    return std::array<Vector<T>, 2>{value * value, value * load(x + i, count)};
  });
}

// This class stores the norms n = max(||V_j||, eps). If eps = 0, the norm of a slice of zeros is
// stored as infinity, so that its scale g / n is zero.
template <typename T>
class Norms {
 public:
  Norms(T* n, double eps) : n_(n), eps_(static_cast<T>(eps)) {}

  // Sets n_j from the slice's sum of squares. is_zero() returns whether the slice is all zeros.
  template <typename F>
  T set(int64_t j, double square, const F& is_zero) {
    T n = from(square);
    if (!is_usual(n)) {
      if (eps_ != 0 || !is_zero()) in_range_.store(false, std::memory_order_relaxed);
      n = std::numeric_limits<T>::infinity();
    }
    return n_[j] = n;
  }

  // Sets n_j of a slice that is a row.
  template <typename V>
  T set(int64_t j, double square, const V* row, int64_t length) {
    return set(j, square, [=] {
      return std::all_of(row, row + length, [](V v) { return static_cast<T>(v) == 0; });
    });
  }

  // Sets the norms of all slices. is_zero(j) returns whether slice j is all zeros.
  template <typename F>
  void set_all(const std::vector<double>& squares, const F& is_zero) {
    const int64_t count = squares.size();
    bool usual = true;
    for (int64_t j = 0; j < count; ++j) {
      n_[j] = from(squares[j]);
      usual &= is_usual(n_[j]);
    }
    if (!usual)
      for (int64_t j = 0; j < count; ++j) set(j, squares[j], [&] { return is_zero(j); });
  }

  // Returns whether the formulas of the fast paths hold for all norms.
  bool in_range() const { return in_range_.load(); }

 private:
  T from(double square) const { return std::max(static_cast<T>(std::sqrt(square)), eps_); }
  static bool is_usual(T n) { return n >= kLeast<T> && n <= kMost<T>; }  // false for NaN

  T* n_;
  T eps_;
  std::atomic<bool> in_range_{true};
};

// Computes w_j = s_j v_j.
template <typename W, typename V>
void scale(W* w, const V* v, Wide<V> s, int64_t length) {
  for_each_vector<Wide<V>>(
      length, [=](int64_t i, auto count) { store(w + i, s * load(v + i, count), count); });
}

// Computes dg_j and the factors s and c of dV_j = s dW_j - c V_j from a = <dW_j, V_j>.
template <typename T>
struct Slope {
  Slope(double a, T g, T n, double eps) : dg(static_cast<T>(a) / n), s(g / n) {
    // Where n was clamped, the norm is a constant.
    c = eps > 0 && n <= static_cast<T>(eps) ? T(0) : s * dg / n;
  }

  T dg, s, c;
};

// Computes to = s a - c b. `to` may overwrite a.
template <typename To, typename A, typename B>
void difference(To* to, const A* a, const B* b, Wide<A> s, Wide<A> c, int64_t length) {
  for_each_vector<Wide<A>>(length, [=](int64_t i, auto count) {
    store(to + i, s * load(a + i, count) - c * load(b + i, count), count);
  });
}

// Writes dV_j and returns dg_j. dV_j may overwrite dW_j.
template <typename W, typename V>
Wide<V> weight_grad(
    V* dv, const W* dw, const V* v, Wide<V> g, Wide<V> n, double eps, int64_t length) {
  const Slope<Wide<V>> slope(dot(dw, v, length), g, n, eps);
  difference(dv, dw, v, slope.s, slope.c, length);
  return slope.dg;
}

}  // namespace wn_kernels
