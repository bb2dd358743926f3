// Vectors of 16 floats from numbers of 16 or 32 bits, and the functions of a decoder on them.

#pragma once

namespace {

struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline Words load_words(const void* from) { return *static_cast<const Words*>(from); }
inline Floats load(const BFloat* from) { return load(&from->bits); }

inline Floats load(const Half* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// 16 numbers from the one of index `at` on.
inline Floats load_as(const void* from, int64_t type, int64_t at) {
  switch (type) {
    case kHalf: return load(static_cast<const Half*>(from) + at);
    case kBfloat: return load(static_cast<const BFloat*>(from) + at);
    default: return load(static_cast<const float*>(from) + at);
  }
}

inline void put_number(float* to, float value) { *to = value; }
inline void put_number(BFloat* to, float value) { to->bits = bfloat(value); }
inline void put_number(Half* to, float value) { to->bits = uint16_t(_cvtss_sh(value, 0)); }

inline float sum_of(Floats values) {
  float sum = values[0];
  for (int i = 1; i < kLanes; ++i) sum += values[i];
  return sum;
}

// e^x within 2 units of the last place; what is not a number stays one.
inline Floats exponential(Floats x) {
  x = smaller(all(88.0f), larger(all(-87.0f), x));
  const Floats whole = nearest_whole(x * 1.44269504f);
  const Floats rest = fused(whole, all(2.12194440e-4f), fused(whole, all(-0.693359375f), x));
  Floats sum = all(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f})
    sum = fused(sum, rest, all(factor));
  const Ints power = __builtin_convertvector(whole, Ints) + 127;
  return sum * (Floats)(power << 23);
}

inline Floats silu(Floats x) { return x / (exponential(-x) + 1.0f); }

}  // namespace
