// This file reads and writes memory of any dtype in vectors of the type that its elements are
// computed in, which is float32 for float16, bfloat16 and float32, and float64 for float64.
//
// A pass reads what it computes with by `load` and writes by `store`. Its loop is the same for all
// dtypes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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

// --- arithmetic ----------------------------------------------------------------------------------

// Returns a b + c, rounded once where the processor does so in one instruction. Of the sum of two
// products the compiler leaves either one unrounded, and another one at each place where it puts the
// same code. The bits of a result would then depend on which of these places ran.
template <typename Value>
inline Value multiply_add(Value a, Value b, Value c) {
#ifdef __FP_FAST_FMA
  if constexpr (std::is_floating_point_v<Value>) {
    return std::fma(a, b, c);
  } else {
    constexpr int64_t lanes = sizeof(Value) / sizeof(a[0]);
    for (int64_t i = 0; i < lanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
#else
  return a * b + c;
#endif
}
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif WN_VECTOR_BYTES == 32 && defined(__FMA__)
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#endif

// Returns v. It is in a register from here on, where the compiler would read memory for each use.
template <typename Value>
inline Value held(Value v) {
#ifdef __AVX2__
  __asm__("" : "+v"(v));
#endif
  return v;
}

// --- the bits of a vector, or of the part of one that is left ------------------------------------

// The bits of as many elements of T as are computed in one vector, as signed numbers.
template <typename T>
using RawNumber = std::conditional_t<
    sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;
template <typename T>
struct RawLanes {
  typedef RawNumber<T> Vector __attribute__((vector_size(sizeof(T) * Lanes<Wide<T>>::count)));
};
template <typename T>
using Raw = typename RawLanes<T>::Vector;

// Stands for all elements of a vector, where a number stands for the first few.
struct All {};

// The elements of a vector that a mask leaves out are neither read nor written. Those read are zero.
#if WN_VECTOR_BYTES == 64 && defined(__AVX512BW__) && defined(__AVX512VL__)
template <typename T>
constexpr bool has_masks = sizeof(T) < 8;
template <typename T>
inline Raw<T> load_first(const T* from, int64_t count) {
  const auto first = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 2)
    return (Raw<T>)_mm256_maskz_loadu_epi16(first, from);
  else
    return (Raw<T>)_mm512_maskz_loadu_epi32(first, from);
}
template <typename T>
inline void store_first(T* to, Raw<T> raw, int64_t count) {
  const auto first = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(to, first, (__m256i)raw);
  else
    _mm512_mask_storeu_epi32(to, first, (__m512i)raw);
}
#elif WN_VECTOR_BYTES == 32 && defined(__AVX2__)
template <typename T>
constexpr bool has_masks = sizeof(T) == 4;
inline __m256i first(int64_t count) {
  return _mm256_cmpgt_epi32(
      _mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <typename T>
inline Raw<T> load_first(const T* from, int64_t count) {
  return (Raw<T>)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first(count));
}
template <typename T>
inline void store_first(T* to, Raw<T> raw, int64_t count) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first(count), (__m256i)raw);
}
#else
template <typename T>
constexpr bool has_masks = false;
#endif

template <typename T>
inline Raw<T> load_raw(const T* from, All) {
  Raw<T> out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
// The elements that are not there are zero.
template <typename T>
inline Raw<T> load_raw(const T* from, int64_t count) {
  if constexpr (has_masks<T>) {
    return load_first(from, count);
  } else {
    T all[Lanes<Wide<T>>::count] = {};
    std::copy_n(from, count, all);
    return load_raw(all, All{});
  }
}
template <typename T>
inline void store_raw(T* to, Raw<T> raw, All) {
  std::memcpy(to, &raw, sizeof raw);
}
template <typename T>
inline void store_raw(T* to, Raw<T> raw, int64_t count) {
  if constexpr (has_masks<T>) {
    store_first(to, raw, count);
  } else {
    T all[Lanes<Wide<T>>::count];
    store_raw(all, raw, All{});
    std::copy_n(all, count, to);
  }
}

// --- comparison of bits --------------------------------------------------------------------------

// Magnitudes are compared in groups of this many elements.
constexpr int64_t kGroup = 32;

// Returns the bits of the element whose magnitude is n. If there is none, it returns -1, which are the
// bits of no magnitude.
template <typename T>
inline RawNumber<T> raw_magnitude(Wide<T> n) {
  RawNumber<T> out = -1;
  if (const T narrow = static_cast<T>(n); static_cast<Wide<T>>(narrow) == n)
    std::memcpy(&out, &narrow, sizeof out);
  return out;
}

// As many numbers of T's size as fill a register.
template <typename T>
struct FullLanes {
  typedef RawNumber<T> Vector __attribute__((vector_size(kVectorBytes)));
};

// Marks the elements of a vector with |v| = x, where x has the bits of magnitudes: one for all elements,
// or one for each. marked() returns how many marks there are.
#if WN_VECTOR_BYTES == 64 && defined(__AVX512BW__) && defined(__AVX512VL__)
template <typename Numbers, typename X>
inline auto equal(Numbers v, X x) {
  using Number = std::remove_reference_t<decltype(v[0])>;
  const Numbers difference = v ^ x, all = Numbers{} + std::numeric_limits<Number>::max();
  if constexpr (sizeof(v) == 32)
    return _mm256_testn_epi16_mask((__m256i)difference, (__m256i)all);
  else if constexpr (sizeof(Number) == 8)
    return _mm512_testn_epi64_mask((__m512i)difference, (__m512i)all);
  else if constexpr (sizeof(Number) == 4)
    return _mm512_testn_epi32_mask((__m512i)difference, (__m512i)all);
  else
    return _mm512_testn_epi16_mask((__m512i)difference, (__m512i)all);
}
template <typename Marks>
inline int marked(Marks marks) {
  return __builtin_popcount(marks);
}
#else
template <typename Numbers, typename X>
inline auto equal(Numbers v, X x) {
  return (v & std::numeric_limits<std::remove_reference_t<decltype(v[0])>>::max()) == x;
}
template <typename Marks>
inline int marked(Marks marks) {
  constexpr int size = sizeof(marks[0]), count = sizeof(marks) / size;
#if WN_VECTOR_BYTES == 32 && defined(__AVX2__)
  unsigned int bytes;
  if constexpr (sizeof(marks) == 16)
    bytes = _mm_movemask_epi8((__m128i)marks);
  else
    bytes = _mm256_movemask_epi8((__m256i)marks);
  return __builtin_popcount(bytes) / size;
#else
  int sum = 0;
  for (int i = 0; i < count; ++i) sum -= marks[i];
  return sum;
#endif
}
#endif

// Returns the marks of the vector that starts at this element.
template <typename T>
inline auto equal_at(const T* from, RawNumber<T> x) {
  typename FullLanes<T>::Vector v;
  std::memcpy(&v, from, sizeof v);
  return equal(v, x);
}

// Returns whether a group has elements with |v| = x, and how many.
template <typename T>
inline bool any_equal(const T* group, RawNumber<T> x) {
  constexpr int64_t step = kVectorBytes / sizeof(T);
  auto all = equal_at(group, x);
#if WN_VECTOR_BYTES == 64 && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) return !_kortestz_mask16_u8(all, equal_at(group + step, x));
#endif
  for (int64_t i = step; i < kGroup; i += step) all |= equal_at(group + i, x);
  return marked(all) != 0;
}
template <typename T>
inline int count_equal(const T* group, RawNumber<T> x) {
  constexpr int64_t step = kVectorBytes / sizeof(T);
  int count = 0;
  for (int64_t i = 0; i < kGroup; i += step) count += marked(equal_at(group + i, x));
  return count;
}

// --- their conversion ----------------------------------------------------------------------------

typedef uint32_t WideBits __attribute__((vector_size(kVectorBytes)));
using Signed = Raw<float>;  // 32-bit numbers
using Short = Raw<Half>;    // as many 16-bit ones

// Returns the same numbers in 32 bits. Their signs are the signs of the halves.
inline Signed lengthened(Short raw) {
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Signed)_mm512_cvtepi16_epi32((__m256i)raw);
#elif WN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Signed)_mm256_cvtepi16_epi32((__m128i)raw);
#else
  return __builtin_convertvector(raw, Signed);
#endif
}
// Returns the upper halves.
inline Short upper(Signed raw) {
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Short)_mm512_cvtepi32_epi16((__m512i)(raw >> 16));
#elif WN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i shifted = (__m256i)(raw >> 16);
  return (Short)_mm_packs_epi32(
      _mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
#else
  return __builtin_convertvector(raw >> 16, Short);
#endif
}

// The numbers with these bits. One of 16 bits may stand for a bfloat16 or a float16, so the type is
// given by its name.
template <typename T>
inline Vector<Wide<T>> widened(Raw<T> raw) {
  if constexpr (std::is_floating_point_v<T>) {
    return (Vector<T>)raw;
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of a float32
    return (Vector<float>)(lengthened(raw) << 16);
  } else {
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtph_ps((__m256i)raw);
#elif WN_VECTOR_BYTES == 32 && defined(__F16C__)
    return (Vector<float>)_mm256_cvtph_ps((__m128i)raw);
#else
    Half all[Lanes<float>::count];
    store_raw(all, raw, All{});
    Vector<float> out;
    for (int64_t i = 0; i < Lanes<float>::count; ++i) out[i] = static_cast<float>(all[i]);
    return out;
#endif
  }
}

// The bits of these numbers, rounded to the nearest of type T, and to the even one of two.
template <typename T>
inline Raw<T> narrowed(Vector<Wide<T>> value) {
  if constexpr (std::is_floating_point_v<T>) {
    return (Raw<T>)value;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const WideBits bits = (WideBits)value, nan = WideBits{} + 0x7fc00000u;
    const WideBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return upper((Signed)(value != value ? nan : rounded));
  } else {
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return (Raw<T>)_mm512_cvtps_ph((__m512)value, nearest);
#elif WN_VECTOR_BYTES == 32 && defined(__F16C__)
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return (Raw<T>)_mm256_cvtps_ph((__m256)value, nearest);
#else
    Half all[Lanes<float>::count];
    for (int64_t i = 0; i < Lanes<float>::count; ++i) all[i] = static_cast<Half>(value[i]);
    return load_raw(all, All{});
#endif
  }
}

// Returns the bits of the elements with these magnitudes, or -1, as raw_magnitude() does.
template <typename T>
inline Raw<T> raw_magnitudes(Vector<Wide<T>> n) {
  const Raw<T> raw = narrowed<T>(n);
  return raw | ~__builtin_convertvector(widened<T>(raw) == n, Raw<T>);
}

// --- a vector, or the part of one that is left ---------------------------------------------------

template <typename T, typename Count>
inline Vector<Wide<T>> load(const T* from, Count count) {
  return widened<T>(load_raw(from, count));
}
template <typename T, typename Count = All>
inline void store(T* to, Vector<Wide<T>> value, Count count = {}) {
  store_raw(to, narrowed<T>(value), count);
}

// Without a count these read a whole vector. c10 has a template of the same name for its own types.
template <typename T>
inline Vector<Wide<T>> load(const T* from) {
  return load(from, All{});
}
inline Vector<float> load(const BFloat16* from) { return load(from, All{}); }
inline Vector<float> load(const Half* from) { return load(from, All{}); }

// Reads magnitudes.
template <typename T, typename Count>
inline Vector<Wide<T>> load_magnitudes(const T* from, Count count) {
  return widened<T>(load_raw(from, count) & std::numeric_limits<RawNumber<T>>::max());
}

// Returns c with the signs of the elements from here on, and zero for those that are zero.
template <typename T>
inline Vector<Wide<T>> with_signs_of(const T* from, Vector<Wide<T>> c) {
  using W = Wide<T>;
  Raw<W> raw;  // the signs and the magnitudes of 16 bits are those of the same number of 32 bits
  if constexpr (sizeof(T) == 2)
    raw = lengthened(load_raw(from, All{}));
  else
    raw = load_raw(from, All{});
  const Raw<W> magnitudes = Raw<W>{} + std::numeric_limits<RawNumber<T>>::max(),
               sign = Raw<W>{} + std::numeric_limits<RawNumber<W>>::min();
#if WN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  constexpr int merge = 0x78;  // c ^ (raw & sign)
  const auto a = (__m512i)c, b = (__m512i)raw, s = (__m512i)sign, m = (__m512i)magnitudes;
  if constexpr (sizeof(W) == 8)
    return (Vector<W>)_mm512_maskz_ternarylogic_epi64(_mm512_test_epi64_mask(b, m), a, b, s, merge);
  else
    return (Vector<W>)_mm512_maskz_ternarylogic_epi32(_mm512_test_epi32_mask(b, m), a, b, s, merge);
#else
  return (Vector<W>)((((Raw<W>)c) ^ (raw & sign)) & ((raw & magnitudes) != 0));
#endif
}

// Returns how many elements a vector of T takes that has this count.
template <typename T>
inline int64_t width(All) {
  return Lanes<T>::count;
}
template <typename T>
inline int64_t width(int64_t count) {
  return count;
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
