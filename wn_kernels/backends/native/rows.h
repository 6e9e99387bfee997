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

#include "norm.h"
#include "vectors.h"

namespace wn_kernels {

// A sum takes kBlock elements before it is added to a double. It is held in kLanes partial sums,
// which fill four vectors of 256 bits in float32.
constexpr int64_t kBlock = 4096;
constexpr int kLanes = kGroup;

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

// Merges `count` lanes. It halves them until one is left, within registers.
template <typename Merge, int64_t count, typename T>
T merged_lanes(const T* from) {
  if constexpr (count * sizeof(T) > 16) {
    typedef T Half __attribute__((vector_size(count / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, from, sizeof low);
    std::memcpy(&high, from + count / 2, sizeof high);
    low = Merge::merge(low, high);
    T all[count / 2];
    std::memcpy(all, &low, sizeof low);
    return merged_lanes<Merge, count / 2>(all);
  } else {
    typedef T Last __attribute__((vector_size(16)));
    Last last;
    std::memcpy(&last, from, sizeof last);
    using Order = decltype(last < last);
    if constexpr (count == 2) {
      return Merge::merge(last, __builtin_shuffle(last, Order{1, 0}))[0];
    } else {
      last = Merge::merge(last, __builtin_shuffle(last, Order{1, 0, 3, 2}));
      return Merge::merge(last, __builtin_shuffle(last, Order{2, 3, 0, 1}))[0];
    }
  }
}

// Merges each of some partial results with another one of its kind.
template <typename... Merges, typename Into, typename Value>
inline __attribute__((always_inline)) void merge_each(
    const Into& into, const std::array<Value, sizeof...(Merges)>& values) {
  size_t k = 0;
  ((into(k) = Merges::merge(into(k), values[k]), ++k), ...);
}

struct Ignore {
  template <typename... Arguments>
  void operator()(Arguments...) const {}
};

// Computes reductions over a row, each of which merges its terms. term(i, count) returns a vector of
// the terms of each, for the elements from i on. Vectors are numbered when the program is compiled,
// so that the partial results stay in registers. visit(i) is called for every whole group.
template <typename T, typename... Merges, typename Term, typename Visit = Ignore>
inline __attribute__((always_inline)) std::array<double, sizeof...(Merges)> reductions(
    int64_t length, const Term& term, const Visit& visit = {}) {
  constexpr size_t N = sizeof...(Merges);
  constexpr int64_t lanes = Lanes<T>::count, vectors = kLanes / lanes;
  std::array<double, N> all{};
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t end = std::min(length, start + kBlock);
    Vector<T> parts[N][vectors] = {};
    const auto add = [&](int64_t vector, const std::array<Vector<T>, N>& terms) {
      merge_each<Merges...>([&](size_t k) -> Vector<T>& { return parts[k][vector]; }, terms);
    };
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t l = 0; l < vectors; ++l) add(l, term(i + l * lanes, All{}));
      visit(i);
    }
#pragma GCC unroll 8
    for (int64_t l = 0; l < vectors; ++l, i += lanes) {
      if (i + lanes <= end)
        add(l, term(i, All{}));
      else if (i < end)
        add(l, term(i, end - i));
    }
    size_t k = 0;
    const auto fold = [&](auto merge) {
      using Merge = decltype(merge);
#pragma GCC unroll 8
      for (int64_t half = vectors / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l)
          parts[k][l] = Merge::merge(parts[k][l], parts[k][l + half]);
      const double part = merged_lanes<Merge, lanes>(reinterpret_cast<const T*>(&parts[k][0]));
      all[k] = Merge::merge(all[k], part);
      ++k;
    };
    (fold(Merges{}), ...);
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
  return reductions<T, Sum>(length, [=](int64_t i, auto count) {
    return std::array<Vector<T>, 1>{load(a + i, count) * load(b + i, count)};
  })[0];
}

// Returns the partial of v.
template <typename V>
double partial(Norm of, const V* v, int64_t length) {
  using T = Wide<V>;
  double out = 0;
  with_norm(of, [&](auto constant) {
    constexpr Norm norm = decltype(constant)::value;
    if (length <= kShort) {
      for (int64_t i = 0; i < length; ++i)
        out = Merge<norm>::merge(
            out, norm_term<norm>(static_cast<double>(static_cast<T>(v[i]))));
      return;
    }
    out = reductions<T, Merge<norm>>(length, [=](int64_t i, auto count) {
      if constexpr (norm == Norm::l2)
        return std::array<Vector<T>, 1>{norm_term<norm>(load(v + i, count))};
      else
        return std::array<Vector<T>, 1>{load_magnitudes(v + i, count)};
    })[0];
  });
  return out;
}

// A product with one row is bound by the memory, and the processor fetches ahead within a page alone. An
// instruction fetches what is read so many bytes later.
constexpr int64_t kBytesAhead = 1 << 14;

// Returns the partial of v and <v, x>, and reads v once.
template <typename V>
std::array<double, 2> partial_and_dot(Norm of, const V* v, const Wide<V>* x, int64_t length) {
  using T = Wide<V>;
  std::array<double, 2> out;
  with_norm(of, [&](auto constant) {
    constexpr Norm norm = decltype(constant)::value;
    out = reductions<T, Merge<norm>, Sum>(length, [=](int64_t i, auto count) {
      __builtin_prefetch(reinterpret_cast<const char*>(v + i) + kBytesAhead);
      const Vector<T> value = held(load(v + i, count));
      return std::array<Vector<T>, 2>{norm_term<norm>(value), value * load(x + i, count)};
    });
  });
  return out;
}

// Finds the ties of a row, which are the elements with |v| = n. Under linf they alone have a slope. In a
// long row they usually lie in few groups. These are noted, and the other groups are written before it is
// known how many ties there are. They are written in the same pass, unless that takes <a, v> in float32 or
// float64: it is bound by the memory, which is read more slowly while results are written. They are then
// written after it.
template <typename V>
class Ties {
  using T = Wide<V>;

 public:
  // Finds them, and calls write(i, count) for the groups of a long row that have none: for so many elements
  // from element i on.
  template <typename Write>
  void find(const V* v, T n, int64_t length, const Write& write) {
    find<true>(v, n, length, write, [=](const auto& look) {
      for (int64_t i = 0; i + kGroup <= length; i += kGroup) look(i);
    });
  }

  // Finds them, and returns <a, v> from the same pass. It calls write(i, count) likewise.
  template <typename A, typename Write>
  double dot(const A* a, const V* v, T n, int64_t length, const Write& write) {
    double sum = 0;
    find<sizeof(V) == 2>(v, n, length, write, [&](const auto& look) {
      const auto term = [=](int64_t i, auto count) {
        return std::array<Vector<T>, 1>{load(a + i, count) * load(v + i, count)};
      };
      sum = length <= kShort ? wn_kernels::dot(a, v, length)
                             : reductions<T, Sum>(length, term, look)[0];
    });
    return sum;
  }

  int64_t count() const { return count_; }

  // Calls f(begin, end) for the elements that write() was not called for.
  template <typename F>
  void for_each_rest(const V* v, int64_t length, const F& f) const {
    if (length < kLong) return f(0, length);
    for_each_noted(v, whole(length), [=](int64_t i) { f(i, i + kGroup); });
    f(whole(length), length);
  }

 private:
  static constexpr int64_t kLong = 4 * kGroup, kFewGroups = 128;

  static int64_t whole(int64_t length) { return length - length % kGroup; }

  // Calls f(i) for the groups with ties, in order.
  template <typename F>
  void for_each_noted(const V* v, int64_t whole, const F& f) const {
    if (size_ <= kFewGroups)
      for (int64_t k = 0; k < size_; ++k) f(groups_[k]);
    else
      for (int64_t i = 0; i < whole; i += kGroup)
        if (any_equal(v + i, x_)) f(i);
  }

  // pass(look) calls look(i) for every group.
  template <bool at_once, typename Write, typename Pass>
  void find(const V* v, T n, int64_t length, const Write& write, const Pass& pass) {
    // Local variables stay in registers during the pass.
    const auto x = x_ = raw_magnitude<V>(n);
    int64_t count = 0, size = 0;
    for_each_vector<T>(length - whole(length), [&](int64_t i, auto part) {
      count += marked(equal(load_raw(v + whole(length) + i, part), x));
    });
    const auto add = [v, x, &count](int64_t i) { count += count_equal(v + i, x); };
    if (length < kLong)
      pass(add);
    else
      pass([v, x, write, add, groups = groups_, &size](int64_t i) {
        if (__builtin_expect(!any_equal(v + i, x), 1)) {
          if constexpr (at_once) write(i, kGroup);
          return;
        }
        if (size < kFewGroups) groups[size] = i;
        ++size;
        add(i);
      });
    count_ = count, size_ = size;
    if (at_once || length < kLong) return;
    int64_t at = 0;
    for_each_noted(v, whole(length), [&](int64_t i) {
      write(at, i - at);
      at = i + kGroup;
    });
    write(at, whole(length) - at);
  }

  RawNumber<V> x_;
  int64_t count_ = 0, size_ = 0, groups_[kFewGroups];
};

// Calls f(begin, end) for the elements that are left to be written after the ties were found. Under
// another norm than linf, there are no ties, and these are all elements.
template <Norm norm, typename V, typename F>
void for_each_left(const Ties<V>& ties, const V* v, int64_t length, const F& f) {
  if constexpr (norm == Norm::linf)
    ties.for_each_rest(v, length, f);
  else
    f(0, length);
}

// Computes w_j = s_j v_j.
template <typename W, typename V>
void scale(W* w, const V* v, Wide<V> s, int64_t length) {
  for_each_vector<Wide<V>>(
      length, [=](int64_t i, auto count) { store(w + i, s * load(v + i, count), count); });
}

// Returns a function that writes to = s a in so many elements from element i on. `to` may be a.
template <typename To, typename A>
auto scale_part(To* to, Wide<To> s, const A* a) {
  return [=](int64_t i, int64_t count) { scale(to + i, a + i, s, count); };
}

// Returns <a, v>. If the norm is linf, it finds the ties of v, and writes to = s a in the groups without.
// `to` may be a.
template <Norm norm, typename To, typename A, typename V>
double dot_and_scale(
    To* to, Wide<V> s, const A* a, const V* v, Wide<V> n, Ties<V>& ties, int64_t length) {
  if constexpr (norm == Norm::linf)
    return ties.dot(a, v, n, length, scale_part(to, s, a));
  else
    return dot(a, v, length);
}

// This class stores the norms n = max(||V_j||, eps). If eps = 0, the norm of a slice of zeros is
// stored as infinity, so that its scale g / n is zero.
template <typename T>
class Norms {
 public:
  Norms(T* n, const NormOptions& options)
      : n_(n), eps_(static_cast<T>(options.eps)), norm_(options.norm) {}

  // Sets n_j from the slice's partial. is_zero() returns whether the slice is all zeros.
  template <typename F>
  T set(int64_t j, double partial, const F& is_zero) {
    T n = from(partial);
    if (!is_usual(n)) {
      if (eps_ != 0 || !is_zero()) in_range_.store(false, std::memory_order_relaxed);
      n = std::numeric_limits<T>::infinity();
    }
    return n_[j] = n;
  }

  // Sets n_j of a slice that is a row.
  template <typename V>
  T set(int64_t j, double partial, const V* row, int64_t length) {
    return set(j, partial, [=] {
      return std::all_of(row, row + length, [](V v) { return static_cast<T>(v) == 0; });
    });
  }

  // Sets the norms of all slices. is_zero(j) returns whether slice j is all zeros.
  template <typename F>
  void set_all(const std::vector<double>& partials, const F& is_zero) {
    const int64_t count = partials.size();
    bool usual = true;
    // The compiler makes vectors of loops that do one thing each.
    with_norm(norm_, [&](auto norm) {
      for (int64_t j = 0; j < count; ++j) n_[j] = static_cast<T>(finished(norm, partials[j]));
    });
    for (int64_t j = 0; j < count; ++j) n_[j] = std::max(n_[j], eps_);
    for (int64_t j = 0; j < count; ++j) usual &= is_usual(n_[j]);
    if (!usual)
      for (int64_t j = 0; j < count; ++j) set(j, partials[j], [&] { return is_zero(j); });
  }

  // Returns whether the formulas of the fast paths hold for all norms.
  bool in_range() const { return in_range_.load(); }

 private:
  T from(double partial) const { return std::max(static_cast<T>(finished(norm_, partial)), eps_); }
  static bool is_usual(T n) { return n >= kLeast<T> && n <= kMost<T>; }  // false for NaN

  T* n_;
  T eps_;
  Norm norm_;
  std::atomic<bool> in_range_{true};
};

// Computes w = s v of numbers that each have their own s.
template <typename W, typename V>
void scale(W* w, const V* v, const Wide<V>* s, int64_t length) {
  for_each_vector<Wide<V>>(length, [=](int64_t i, auto count) {
    store(w + i, load(s + i, count) * load(v + i, count), count);
  });
}

// Whether n was clamped, and is therefore a constant.
template <typename T>
bool is_clamped(T n, double eps) {
  return eps > 0 && n <= static_cast<T>(eps);
}

// Computes dg_j and the factors s and c of dV_j = s dW_j - c u_j from a = <dW_j, V_j> and the ties.
template <typename T>
struct Slope {
  Slope(double a, double ties, T g, T n, const NormOptions& options)
      : dg(static_cast<T>(a) / n), s(g / n) {
    c = is_clamped(n, options.eps) ? T(0) : s * dg / slope_divisor(options.norm, n, ties);
  }

  T dg, s, c;
};

// Returns c u for the vector that starts at v. Under l1, nothing is needed of it but its signs and zeros.
template <Norm norm, typename V, typename N, typename Count>
inline Vector<Wide<V>> slope_at(Vector<Wide<V>> c, const V* v, N n, Count count) {
  if constexpr (norm == Norm::l1 && std::is_same_v<Count, All>) {
    return with_signs_of(v, c);
  }
  return times_slope<norm>(c, load(v, count), n);
}

// Computes to = s a - c u, where u is that of v. `to` may overwrite a. Under linf the groups that the
// ties left are written.
template <Norm norm, typename To, typename A, typename V>
void difference(
    To* to, const A* a, const V* v, Wide<V> n, Wide<V> s, Wide<V> c, const Ties<V>& ties,
    int64_t length) {
  using T = Wide<V>;
  const Vector<T> scales = Vector<T>{} + s, minus_c = Vector<T>{} - c;
  for_each_left<norm>(ties, v, length, [=](int64_t begin, int64_t end) {
    for_each_vector<T>(end - begin, [=](int64_t i, auto count) {
      const auto minus_cu = slope_at<norm>(minus_c, v + begin + i, n, count);
      store(to + begin + i, multiply_add(scales, load(a + begin + i, count), minus_cu), count);
    });
  });
}

// Computes to = c u, where u is that of v. Under linf the groups that the ties left are written.
template <Norm norm, typename To, typename V>
void scaled_slope(
    To* to, const V* v, Wide<V> n, Wide<V> c, const Ties<V>& ties, int64_t length) {
  for_each_left<norm>(ties, v, length, [=](int64_t begin, int64_t end) {
    for_each_vector<Wide<V>>(end - begin, [=](int64_t i, auto count) {
      store(to + begin + i, times_slope<norm>(c, load(v + begin + i, count), n), count);
    });
  });
}

// Writes dV_j and returns dg_j. dV_j may overwrite dW_j.
template <typename W, typename V>
Wide<V> weight_grad(
    V* dv, const W* dw, const V* v, Wide<V> g, Wide<V> n, const NormOptions& options,
    int64_t length) {
  Wide<V> dg;
  with_norm(options.norm, [&](auto constant) {
    constexpr Norm norm = decltype(constant)::value;
    Ties<V> ties;
    const double a = dot_and_scale<norm>(dv, g / n, dw, v, n, ties, length);
    const Slope<Wide<V>> slope(a, ties.count(), g, n, options);
    difference<norm>(dv, dw, v, n, slope.s, slope.c, ties, length);
    dg = slope.dg;
  });
  return dg;
}

}  // namespace wn_kernels
