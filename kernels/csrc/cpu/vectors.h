// Vectors of 16 floats on any processor, and numbers of bfloat16.

#pragma once

namespace {

constexpr int kLanes = 16;  // values of a vector
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2)));

inline Floats all(float value) { return value - Floats{}; }
inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats values) { *reinterpret_cast<Floats*>(to) = values; }

// The second operand where either is not a number, as x86's instructions.
#ifdef __AVX512F__
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#else
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

// The nearest whole number, ties to even, of values below 2^22.
inline Floats nearest_whole(Floats values) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23
  return values + magic - magic;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widened(uint16_t value) { return float_of(uint32_t(value) << 16); }

inline Floats load(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Shorts*>(from), Words) << 16);
}

}  // namespace
