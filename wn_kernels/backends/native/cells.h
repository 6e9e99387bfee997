// This file computes the units of recurrent cells, in vectors: the functions of their gates, and the
// derivatives of these.
//
//   lstm   i, f, o = σ(a_i), σ(a_f), σ(a_o),  g = tanh a_g,  c = f c' + i g,  h = o tanh c
//   gru    r, z = σ(a_r), σ(a_z),  n = tanh(p_n + r q),  h = n + z (h' - n)
//   tanh   h = tanh a
//   relu   h = max(a, 0)
//
// a = p + q is the sum of the products of the input and of the state before, h'. q is taken by itself
// where r scales it.

#pragma once

#include <cmath>

#include "vectors.h"

namespace wn_kernels {

enum class Cell { lstm, gru, tanh, relu };  // in the order of modules/sequences.py

// Returns how many gates a cell has.
constexpr int64_t gates_of(Cell cell) {
  return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
}

// Calls f with this kind of cell as a constant of the compiler.
template <typename F>
inline void with_cell(Cell cell, const F& f) {
  switch (cell) {
    case Cell::lstm: return f(std::integral_constant<Cell, Cell::lstm>{});
    case Cell::gru: return f(std::integral_constant<Cell, Cell::gru>{});
    case Cell::tanh: return f(std::integral_constant<Cell, Cell::tanh>{});
    default: return f(std::integral_constant<Cell, Cell::relu>{});
  }
}

// --- functions of gates --------------------------------------------------------------------------

// Returns e^x for x from -86 to 88, and the value at the nearer end for another one. A NaN stays.
//
// x = n ln 2 + r, with ln 2 in two parts, and e^r is the polynomial of Cephes' expf, whose largest
// error is 1 ulp.
inline Vector<float> exponential(Vector<float> given) {
  Vector<float> x = given;
  x = x < -86.0f ? Vector<float>{} - 86.0f : x;
  x = x > 88.0f ? Vector<float>{} + 88.0f : x;
  // Adding 1.5 * 2^23 rounds to a whole number, which is then in the lowest bits.
  const Vector<float> shift = Vector<float>{} + 12582912.0f;
  const Vector<float> shifted = multiply_add(x, Vector<float>{} + 1.44269504f, shift);
  const Vector<float> n = shifted - shift;
  Vector<float> r = multiply_add(n, Vector<float>{} - 0.693359375f, x);
  r = multiply_add(n, Vector<float>{} + 2.12194440e-4f, r);
  Vector<float> p = Vector<float>{} + 1.9875691500e-4f;
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(p, r, Vector<float>{} + c);
  p = multiply_add(p, r * r, r) + 1.0f;
  const auto scaled = (Vector<float>)((WideBits)p + ((WideBits)shifted << 23));
  return given == given ? scaled : given;
}

inline Vector<float> sigmoid(Vector<float> x) {
  return x < -88.0f ? Vector<float>{} : 1.0f / (1.0f + exponential(-x));
}

// Returns tanh x: near zero by the polynomial of Cephes' tanhf, and elsewhere as 1 - 2 / (e^2x + 1).
inline Vector<float> tangent(Vector<float> x) {
  const Vector<float> size = (Vector<float>)((Raw<float>)x & 0x7fffffff), square = x * x;
  Vector<float> p = Vector<float>{} - 5.70498872745e-3f;
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = multiply_add(p, square, Vector<float>{} + c);
  const Vector<float> near = multiply_add(p * square, x, x);
  const Vector<float> far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  const Raw<float> sign = (Raw<float>)x & std::numeric_limits<int32_t>::min();
  return size < 0.625f ? near : (Vector<float>)((Raw<float>)far | sign);
}

inline Vector<double> sigmoid(Vector<double> x) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) x[i] = 1.0 / (1.0 + std::exp(-x[i]));
  return x;
}
inline Vector<double> tangent(Vector<double> x) {
  for (int64_t i = 0; i < Lanes<double>::count; ++i) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace wn_kernels
