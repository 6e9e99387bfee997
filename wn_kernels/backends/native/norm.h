// This file defines the norms of a slice of V: how each is accumulated, and its slope.
//
//   norm   n               h = dn/dV = u / d
//   l2     sqrt(sum v^2)   u = V                  d = n
//   l1     sum |v|         u = sign V             d = 1
//   linf   max |v|         u = sign V [|V| = n]   d = the number of these elements (ties)
//
// While a norm is accumulated it is a `partial`: a sum of squares, a sum of magnitudes, or the largest
// magnitude. Zero is neutral to all of them. The functions of values serve scalars and vectors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace wn_kernels {

enum class Norm { l2, l1, linf };  // in the order of call.NORMS

// Which norm it is, and the smallest value that it takes.
struct NormOptions {
  double eps = 0;
  Norm norm = Norm::l2;
};

// Calls f with this norm as a constant of the compiler.
template <typename F>
inline void with_norm(Norm norm, const F& f) {
  switch (norm) {
    case Norm::l2: return f(std::integral_constant<Norm, Norm::l2>{});
    case Norm::l1: return f(std::integral_constant<Norm, Norm::l1>{});
    default: return f(std::integral_constant<Norm, Norm::linf>{});
  }
}

// The bits of a vector, as signed numbers, and one of these numbers.
template <typename Vector>
using Bits = decltype(Vector{} < Vector{});
template <typename Vector>
using Bit = std::remove_reference_t<decltype(Bits<Vector>{}[0])>;

// The bits of one number.
template <typename T>
using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <typename T>
inline Integer<T> bits(T number) {
  Integer<T> out;
  std::memcpy(&out, &number, sizeof out);
  return out;
}

// Returns |v|.
template <typename Value>
inline Value magnitude(Value v) {
  if constexpr (std::is_floating_point_v<Value>)
    return std::abs(v);
  else
    return (Value)((Bits<Value>)v & std::numeric_limits<Bit<Value>>::max());
}

// Returns c, or -c where the sign bit is set.
template <typename Value>
inline Value with_sign(Bits<Value> sign, Value c) {
  return (Value)((sign & std::numeric_limits<Bit<Value>>::min()) ^ (Bits<Value>)c);
}

// --- accumulation --------------------------------------------------------------------------------

// How two partial results of a reduction become one.
struct Sum {
  template <typename Value>
  static Value merge(Value a, Value b) {
    return a + b;
  }
};

// The larger of two magnitudes. A NaN is the largest. The bits of magnitudes have the same order.
struct Largest {
  template <typename Value>
  static Value merge(Value a, Value b) {
    if constexpr (std::is_floating_point_v<Value>) {
      return bits(a) > bits(b) ? a : b;
    } else {
      const auto x = (Bits<Value>)a, y = (Bits<Value>)b;
      return (Value)(x > y ? x : y);
    }
  }
};

template <Norm norm>
using Merge = std::conditional_t<norm == Norm::linf, Largest, Sum>;

// Returns the partial of one element.
template <Norm norm, typename Value>
inline Value norm_term(Value v) {
  return norm == Norm::l2 ? v * v : magnitude(v);
}

// Returns the partial of two parts of a slice.
inline double merged(Norm norm, double a, double b) {
  return norm == Norm::linf ? Largest::merge(a, b) : a + b;
}

// Returns the norm from the partial of a whole slice.
inline double finished(Norm norm, double partial) {
  return norm == Norm::l2 ? std::sqrt(partial) : partial;
}

// --- slope ---------------------------------------------------------------------------------------

// Returns 1 for each element with |v| = n, and else 0. `n` may be one number for all elements.
template <typename Value, typename N>
inline Value tied(Value v, N n) {
  return (Value)((Bits<Value>)(Value{} + 1) & (magnitude(v) == n));
}

// Returns c u. It is zero where u is, whatever c.
template <Norm norm, typename Value, typename C, typename N>
inline Value times_slope(C c, Value v, [[maybe_unused]] N n) {
  if constexpr (norm == Norm::l2) {
    return c * v;
  } else if constexpr (std::is_floating_point_v<Value>) {
    const bool has_slope = norm == Norm::l1 ? v != 0 : magnitude(v) == n;
    return has_slope ? (std::signbit(v) ? -c : c) : Value(0);
  } else {
    const auto signed_c = with_sign((Bits<Value>)v, c - Value{});
    if constexpr (norm == Norm::l1)
      return v != Value{} ? signed_c : Value{};
    else
      return magnitude(v) == n ? signed_c : Value{};
  }
}

// Returns d. A slice of zeros has no ties.
template <typename T>
inline T slope_divisor(Norm norm, T n, double ties) {
  return norm == Norm::l2 ? n : norm == Norm::l1 ? T(1) : std::max(static_cast<T>(ties), T(1));
}

}  // namespace wn_kernels
