// This file reads and writes memory of any dtype in vectors of the type that its elements are
// computed in, which is float32 for float16, bfloat16 and float32, and float64 for float64.
//
// A pass reads what it computes with by `load` and writes by `store`. Its loop is the same for all
// dtypes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "limits.h"

namespace wn_kernels {

using c10::BFloat16;
using c10::Half;

// The type that elements of T are computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t count = kVectorBytes / sizeof(T);
};
template <typename T>
using Vector = typename Lanes<T>::Vector;

// Calls f with a zero of this dtype, which float64, float32, bfloat16 or float16 has to be.
template <typename F>
inline void with_dtype(c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::Double: return f(double{});
    case c10::ScalarType::Float: return f(float{});
    case c10::ScalarType::BFloat16: return f(BFloat16{});
    default: return f(Half{});
  }
}

// Calls f with zeros of both dtypes. If one of them is float64, then both are.
template <typename F>
inline void with_dtypes(c10::ScalarType first, c10::ScalarType second, const F& f) {
  with_dtype(first, [&](auto a) {
    using A = decltype(a);
    with_dtype(second, [&](auto b) {
      using B = decltype(b);
      if constexpr (std::is_same_v<A, double> == std::is_same_v<B, double>) f(A{}, B{});
    });
  });
}

// --- a whole vector ------------------------------------------------------------------------------

template <typename T, std::enable_if_t<std::is_floating_point_v<T>, int> = 0>
inline Vector<T> load(const T* from) {
  Vector<T> out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <typename T, std::enable_if_t<std::is_floating_point_v<T>, int> = 0>
inline void store(T* to, Vector<T> value) {
  std::memcpy(to, &value, sizeof value);
}

typedef uint16_t NarrowBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WideBits __attribute__((vector_size(kVectorBytes)));

// A bfloat16 is the upper half of a float32.
inline Vector<float> load(const BFloat16* from) {
  NarrowBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Vector<float>)(__builtin_convertvector(bits, WideBits) << 16);
}
// It is rounded to the nearest number, and to the even one of two.
inline void store(BFloat16* to, Vector<float> value) {
  const WideBits bits = (WideBits)value, is_nan = (WideBits)(value != value);
  const WideBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const NarrowBits out =
      __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), NarrowBits);
  std::memcpy(to, &out, sizeof out);
}

inline Vector<float> load(const Half* from) {
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif WN_VECTOR_BYTES == 32 && defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector<float> out;
  for (int64_t i = 0; i < Lanes<float>::count; ++i) out[i] = static_cast<float>(from[i]);
  return out;
#endif
}
inline void store(Half* to, Vector<float> value) {
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, nearest));
#elif WN_VECTOR_BYTES == 32 && defined(__F16C__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, nearest));
#else
  for (int64_t i = 0; i < Lanes<float>::count; ++i) to[i] = static_cast<Half>(value[i]);
#endif
}

// --- a vector, or the part of one that is left ---------------------------------------------------

// Stands for all elements of a vector, where a number stands for the first few.
struct All {};

// The numbers of a vector that a mask leaves out are neither read nor written. Those read are zero.
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define WN_HAS_MASKS 1
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vector<float> load_first(const float* from, int64_t count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first(count), from);
}
inline void store_first(float* to, Vector<float> value, int64_t count) {
  _mm512_mask_storeu_ps(to, first(count), (__m512)value);
}
#elif WN_VECTOR_BYTES == 32 && defined(__AVX2__)
#define WN_HAS_MASKS 1
inline __m256i first(int64_t count) {
  return _mm256_cmpgt_epi32(
      _mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector<float> load_first(const float* from, int64_t count) {
  return (Vector<float>)_mm256_maskload_ps(from, first(count));
}
inline void store_first(float* to, Vector<float> value, int64_t count) {
  _mm256_maskstore_ps(to, first(count), (__m256)value);
}
#else
#define WN_HAS_MASKS 0
#endif

template <typename T>
constexpr bool has_masks = WN_HAS_MASKS && std::is_same_v<T, float>;

template <typename T>
inline Vector<Wide<T>> load(const T* from, All) {
  return load(from);
}
// The elements that are not there are zero.
template <typename T>
inline Vector<Wide<T>> load(const T* from, int64_t count) {
  if constexpr (has_masks<T>) {
    return load_first(from, count);
  } else {
    T all[Lanes<Wide<T>>::count] = {};
    std::copy_n(from, count, all);
    return load(all);
  }
}
template <typename T>
inline void store(T* to, Vector<Wide<T>> value, All) {
  store(to, value);
}
template <typename T>
inline void store(T* to, Vector<Wide<T>> value, int64_t count) {
  if constexpr (has_masks<T>) {
    store_first(to, value, count);
  } else {
    T all[Lanes<Wide<T>>::count];
    store(all, value);
    std::copy_n(all, count, to);
  }
}

// Calls f(i, count) for each vector of `length` elements that are computed in T. It starts at
// element i.
template <typename T, typename F>
inline void for_each_vector(int64_t length, const F& f) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) f(i, All{});
  if (i < length) f(i, length - i);
}

}  // namespace wn_kernels
