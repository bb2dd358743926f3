// Weights to numbers of few bits in two passes: the range of each group, then the nearest number of every weight.
//
// Between them the caller makes scales of the ranges. Weights are read in the dtype of the checkpoint, so nothing is
// written but numbers. Quotients are IEEE's and nothing is contracted: the same bytes as PyTorch's operators give.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

enum DType { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };
enum Kind { kFp8 = 0, kFp4 = 1, kInteger = 2 };

typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

struct Bfloat {
  uint16_t bits;
  float number() const { return widened(bits); }
};
struct Half {
  uint16_t bits;
  float number() const {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
};
struct Single {
  float value;
  float number() const { return value; }
};

inline Floats load(const Bfloat* from) { return load(&from->bits); }
inline Floats load(const Single* from) { return load(&from->value); }
inline Floats load(const Half* from) {
#ifdef __AVX512F__
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  Floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = from[i].number();
  return values;
#endif
}

// The first `count` of a vector, the rest zeros.
template <typename T>
inline Floats load_few(const T* from, int64_t count) {
  T values[kLanes] = {};
  std::copy_n(from, count, values);
  return load(values);
}

inline float least_of(Floats values) {
#ifdef __AVX512F__
  return _mm512_reduce_min_ps((__m512)values);
#else
  float least = values[0];
  for (int i = 1; i < kLanes; ++i) least = std::min(least, values[i]);
  return least;
#endif
}

inline bool any(Ints mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

template <typename T>
void range_of(const T* from, int64_t size, float* low, float* high) {
  const float infinity = std::numeric_limits<float>::infinity();
  Floats least = all(infinity), most = all(-infinity);
  Ints broken{};  // what is not a number
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats values = load(from + i);
    least = smaller(values, least);
    most = larger(values, most);
    broken |= values != values;
  }
  *low = least_of(least), *high = -least_of(-most);
  bool whole = !any(broken);
  for (; i < size; ++i) {
    const float value = from[i].number();
    *low = std::min(*low, value);
    *high = std::max(*high, value);
    whole = whole && value == value;
  }
  if (!whole) *low = *high = std::numeric_limits<float>::quiet_NaN();
}

// Numbers with an exponent: `mantissa` bits stored, the exponent of `bias`; what is not a number has the code `broken`.
template <int mantissa, int bias>
inline Words float_codes(Floats values, float largest, uint32_t broken) {
  constexpr int kDropped = 23 - mantissa;
  constexpr uint32_t kHalf = (1u << (kDropped - 1)) - 1;
  const Words size = (Words)smaller(all(largest), (Floats)((Words)values & 0x7fffffffu));
  // Sums of floats round to nearest even at this one's last place: the smallest number above zero.
  const Floats even = all(float_of(uint32_t(kDropped + 1 - bias + 127) << 23));
  const Words small = (Words)((Floats)size + even) - (Words)even;
  const Words normal = ((size + kHalf + (size >> kDropped & 1u)) >> kDropped) - (uint32_t(127 - bias) << mantissa);
  const Words codes = (Floats)size < float_of(uint32_t(128 - bias) << 23) ? small : normal;
  return values != values ? broken - Words{} : codes;
}

struct Fp8 {
  Words operator()(Floats values) const {
    return float_codes<3, 7>(values, 448.0f, 0x7f) | ((Words)values & 0x80000000u) >> 24;
  }
};

struct Fp4 {
  Words operator()(Floats values) const {
    return float_codes<1, 1>(values, 6.0f, 7) | ((Words)(values < 0.0f) & 8u);
  }
};

struct Integer {
  float zero, top;

  Words operator()(Floats values) const {
    const Floats limit = all(1048576.0f);  // far beyond any integer, and rounded exactly
    const Floats steps = nearest_whole(smaller(limit, larger(-limit, values))) + zero;
    return (Words)(smaller(all(top), larger(Floats{}, steps)) + 8388608.0f) & 0xffu;  // 2^23: whole numbers as bits
  }
};

template <typename T, typename Number>
void round_group(const T* from, int64_t size, float scale, const Number& number, uint8_t* codes) {
  const Floats divisor = all(scale);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    *reinterpret_cast<Bytes*>(codes + i) = __builtin_convertvector(number(load(from + i) / divisor), Bytes);
  if (i < size) {
    const Bytes last = __builtin_convertvector(number(load_few(from + i, size - i) / divisor), Bytes);
    std::memcpy(codes + i, &last, size - i);
  }
}

}  // namespace

extern "C" {

// Groups of weights, one after another.
struct Groups {
  const void* weights;
  int64_t dtype, count, size, threads;
};

// What weights are rounded to: `zeros` and `top` are of integers.
struct Numbers {
  const float* scales;
  const float* zeros;
  int64_t kind;
  float top;
};

// Rows of numbers with the weights that they stand for: number n of a group is (table[n] - zero) * scale.
struct Rounded {
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;
  const float* table;
  int64_t rows, groups, every;  // groups of a row; every so many rows count
};
}

namespace {

template <typename T>
void ranges(const Groups& of, float* low, float* high) {
  const T* weights = static_cast<const T*>(of.weights);
#pragma omp parallel for num_threads(of.threads) schedule(static)
  for (int64_t group = 0; group < of.count; ++group)
    range_of(weights + group * of.size, of.size, low + group, high + group);
}

template <typename T>
void round_groups(const Groups& of, const Numbers& numbers, uint8_t* codes) {
  const T* weights = static_cast<const T*>(of.weights);
#pragma omp parallel for num_threads(of.threads) schedule(static)
  for (int64_t group = 0; group < of.count; ++group) {
    const T* from = weights + group * of.size;
    uint8_t* to = codes + group * of.size;
    const float scale = numbers.scales[group];
    switch (numbers.kind) {
      case kFp8: round_group(from, of.size, scale, Fp8{}, to); break;
      case kFp4: round_group(from, of.size, scale, Fp4{}, to); break;
      default: round_group(from, of.size, scale, Integer{numbers.zeros[group], numbers.top}, to);
    }
  }
}

template <typename T>
void squares(const Groups& of, const Rounded& rounded, double* sums) {
  const T* weights = static_cast<const T*>(of.weights);
  for (int64_t row = 0; row < rounded.rows; row += rounded.every)
    for (int64_t group = row * rounded.groups; group < (row + 1) * rounded.groups; ++group)
      for (int64_t i = group * of.size; i < (group + 1) * of.size; ++i) {
        const float weight = weights[i].number(), zero = rounded.zeros[group];
        const float error = (rounded.table[rounded.codes[i]] - zero) * rounded.scales[group] - weight;
        sums[0] += double(error) * error;
        sums[1] += double(weight) * weight;
      }
}

}  // namespace

extern "C" {

// low, high (count,): NaN where a group holds one.
void nibble_ranges(const Groups* of, float* low, float* high) {
  switch (of->dtype) {
    case kFloat16: return ranges<Half>(*of, low, high);
    case kBfloat16: return ranges<Bfloat>(*of, low, high);
    default: return ranges<Single>(*of, low, high);
  }
}

// codes (count, size)
void nibble_nearest(const Groups* of, const Numbers* numbers, uint8_t* codes) {
  switch (of->dtype) {
    case kFloat16: return round_groups<Half>(*of, *numbers, codes);
    case kBfloat16: return round_groups<Bfloat>(*of, *numbers, codes);
    default: return round_groups<Single>(*of, *numbers, codes);
  }
}

// sums (2,): of the squares of the errors and of the weights, added to what is there.
void nibble_squares(const Groups* of, const Rounded* rounded, double* sums) {
  switch (of->dtype) {
    case kFloat16: return squares<Half>(*of, *rounded, sums);
    case kBfloat16: return squares<Bfloat>(*of, *rounded, sums);
    default: return squares<Single>(*of, *rounded, sums);
  }
}
}
