// Products of rows of float32 with weights that are decoded in registers, on any processor with AVX-512. With VNNI
// packed weights are for lanes.h.
//
// A vector holds 16 channels of one row of the weight. The sum of an output adds the channels in the same order
// whatever the number of rows of x and of threads, so what a row gives does not depend on who else is there.

#pragma once

namespace {

// One linear: packed in blocks, or rows of numbers.
struct Linear {
  const Weight* packed;  // or null
  const void* dense;     // (out, in), or null
  int64_t type;          // of `dense`, a ScaleType
  int64_t in, out;
  const float* bias;  // or null
  int64_t fine;       // packed: x keeps what float32 holds of it, not only what bfloat16 does
};

constexpr int64_t kSplit = 32;
constexpr int64_t kAhead = 4096;  // bytes of weights, prefetched

// `count` channels, a multiple of 32.
inline void split_channels(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kSplit) {
    for (int j = 0; j < kLanes; ++j) {
      to[i + j] = from[i + 2 * j];
      to[i + kLanes + j] = from[i + 2 * j + 1];
    }
  }
}

// Packed weights and bfloat16 lie so that a vector reads every second channel.
inline bool reads_apart(const Linear& linear) { return linear.packed || linear.type == kBfloat; }

// The sums of each of 16 vectors.
inline Floats sums_of(const Floats* vectors) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = (__m512i)vectors[i];
  transpose(r);
  __m512 sum = _mm512_castsi512_ps(r[0]);
  for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(r[i]));
  return (Floats)sum;
}

__attribute__((always_inline)) inline Floats scales_at(const Weight& w, int64_t block, int64_t group) {
  return load_as(w.scale, w.scale_type, (block * w.groups + group) * kRows);
}

}  // namespace

#include "lanes.h"

namespace {

// Rows of x, and the forms in which weights read them: each is made when it is first asked for.
class Input {
 public:
  // Room for `rows` rows of a width that is a multiple of 32.
  void begin(int64_t rows, int64_t width) {
    count_ = rows, width_ = width, apart_ = false, in_digits_ = false;
    if (plain_.size() < size_t(rows * width)) plain_.resize(rows * width);
  }
  float* row(int64_t number) { return plain_.data() + number * width_; }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

  // The rows as they are, or with the even and the odd channels of each 32 apart.
  const float* rows(bool apart) {
    if (!apart) return plain_.data();
    if (!apart_) {
      if (split_.size() < size_t(count_ * width_)) split_.resize(count_ * width_);
      split_channels(plain_.data(), count_ * width_, split_.data());
      apart_ = true;
    }
    return split_.data();
  }

#ifdef __AVX512VNNI__
  DigitRows digits(bool fine) {
    if (!in_digits_) to_digits(plain_.data(), count_, width_, fine, digits_);
    in_digits_ = true;
    return {digits_.data(), count_, (width_ + kChunk - 1) / kChunk};
  }
#endif

 private:
  std::vector<float> plain_, split_;
  int64_t count_ = 0, width_ = 0;
  bool apart_ = false, in_digits_ = false;
#ifdef __AVX512VNNI__
  std::vector<ChunkDigits> digits_;
#endif
};

// ------------------------------------------------------------------------------------------------ packed weights

// The values of the 16 codes of a digit in a group of a row.
struct Values {
  __m512 of_codes;
  Values(float scale, float offset) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    of_codes = _mm512_fmadd_ps(codes, _mm512_set1_ps(scale), _mm512_set1_ps(offset));
  }
  // Of the nibbles at bit SHIFT of each word: the lookup reads no more than four bits.
  template <int SHIFT>
  Floats at(Words words) const {
    return (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, SHIFT), of_codes);
  }
};

// Of the 16 rows of a block, for the groups of a chunk.
struct Factors {
  alignas(64) float scale[4][kRows], offset[4][kRows];
  void fill(const Weight& w, int64_t block, int64_t group, int groups) {
    const uint8_t* zero = zeros_of(w, block, group);
    for (int g = 0; g < groups; ++g) {
      const Floats scales = scales_at(w, block, group + g);
      store(scale[g], scales);
      for (int row = 0; row < kRows; ++row) offset[g][row] = -float(zero[g * kRows + row]) * scale[g][row];
    }
  }
};

// 32 channels of ROWS rows of the weight times R rows of x.
template <int R, int ROWS, int PLANES, int QUARTER>
inline void quarter_product(const uint8_t* codes, const Values* low, const Values* high, const float* x,
                            int64_t stride, Floats (*total)[R]) {
  constexpr int kShift = 4 * QUARTER;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Floats weights[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const Words words = load_words(codes + row * PLANES * kPlane);
      weights[row] = half ? low[row].template at<kShift + 16>(words) : low[row].template at<kShift>(words);
      if (PLANES == 2) {
        const Words more = load_words(codes + row * PLANES * kPlane + kPlane);
        weights[row] += half ? high[row].template at<kShift + 16>(more) : high[row].template at<kShift>(more);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats values = load(x + r * stride + kSplit * QUARTER + kLanes * half);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) total[row][r] = fused(weights[row], values, total[row][r]);
    }
  }
}

// Rows first .. first + ROWS - 1 of a block. GPC: groups of a chunk, 0: one for the row.
template <int R, int ROWS, int GPC, int PLANES>
inline void packed_rows(const Weight& w, int64_t block, int first, int64_t quarters, const float* x, int64_t stride,
                        const Factors* factors, Floats (*out)[R]) {
  constexpr int kGroups = GPC ? GPC : 1, kQuarters = 4 / kGroups;
  constexpr int64_t kChunkBytes = int64_t(kRows) * PLANES * kPlane;
  const uint8_t* codes = w.codes + block * w.chunks * kChunkBytes + first * PLANES * kPlane;
  Floats total[ROWS][R] = {};
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk, codes += kChunkBytes, x += kChunk) {
    const int live = int(std::min<int64_t>(4, quarters - 4 * chunk));
    const Factors& here = factors[GPC ? chunk : 0];
    for (int row = 0; row < ROWS; ++row) __builtin_prefetch(codes + row * PLANES * kPlane + 2 * kChunkBytes);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      if (g * kQuarters >= live) break;
      const auto values_of = [&](bool upper) {
        struct All {
          Values of[ROWS];
        };
        return [&]<size_t... ROW>(std::index_sequence<ROW...>) {
          return All{Values(upper ? 16 * here.scale[g][first + ROW] : here.scale[g][first + ROW],
                            upper ? 0.0f : here.offset[g][first + ROW])...};
        }(std::make_index_sequence<ROWS>());
      };
      const auto low = values_of(false), high = values_of(PLANES == 2);
      const auto quarter = [&]<int QUARTER>(std::integral_constant<int, QUARTER>) {
        if (QUARTER / kQuarters == g && QUARTER < live)
          quarter_product<R, ROWS, PLANES, QUARTER>(codes, low.of, high.of, x, stride, total);
      };
      quarter(std::integral_constant<int, 0>{});
      quarter(std::integral_constant<int, 1>{});
      quarter(std::integral_constant<int, 2>{});
      quarter(std::integral_constant<int, 3>{});
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[first + row][r] = total[row][r];
  }
}

// ------------------------------------------------------------------------------------------------- dense weights

template <class T>
struct Pair;  // 32 channels as two vectors, in the order of Input::rows

template <>
struct Pair<BFloat> {
  Floats first, second;
  explicit Pair(const BFloat* at) {
    const Words words = load_words(at);
    first = (Floats)(words << 16), second = (Floats)(words & 0xffff0000u);
  }
};

template <>
struct Pair<Half> {
  Floats first, second;
  explicit Pair(const Half* at) : first(load(at)), second(load(at + kLanes)) {}
};

template <>
struct Pair<float> {
  Floats first, second;
  explicit Pair(const float* at) : first(load(at)), second(load(at + kLanes)) {}
};

template <int R, int ROWS, class T>
inline void dense_rows(const Linear& linear, int64_t block, int first, const float* x, int64_t stride,
                       Floats (*out)[R]) {
  const T* rows[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    const int64_t at = std::min(block * kRows + first + row, linear.out - 1);  // what is beyond is not stored
    rows[row] = static_cast<const T*>(linear.dense) + at * linear.in;
  }
  Floats total[ROWS][R] = {};
  for (int64_t channel = 0; channel < linear.in; channel += kSplit) {
    for (int row = 0; row < ROWS; ++row) __builtin_prefetch(reinterpret_cast<const char*>(rows[row] + channel) + kAhead);
    const auto weights = [&]<size_t... ROW>(std::index_sequence<ROW...>) {
      struct All {
        Pair<T> of[ROWS];
      };
      return All{Pair<T>(rows[ROW] + channel)...};
    }(std::make_index_sequence<ROWS>());
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats values = load(x + r * stride + channel + kLanes * half);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
          total[row][r] = fused(half ? weights.of[row].second : weights.of[row].first, values, total[row][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[first + row][r] = total[row][r];
  }
}

// ---------------------------------------------------------------------------------------------------- any linear

constexpr int kMostRows = 8;  // of x, for which a weight is decoded once

constexpr int rows_at_once(int r) { return r == 1 ? 8 : r == 2 ? 8 : r == 4 ? 4 : 2; }  // sums stay in registers

// The 16 outputs of a block for R rows of x.
template <int R>
struct BlockProduct {
  Floats out[kRows][R];

  template <int GPC, int PLANES>
  void packed(const Linear& linear, int64_t block, const float* x, int64_t stride, const Factors* factors) {
    constexpr int ROWS = rows_at_once(R);
    const int64_t quarters = (linear.in + kSplit - 1) / kSplit;
    for (int first = 0; first < kRows; first += ROWS)
      packed_rows<R, ROWS, GPC, PLANES>(*linear.packed, block, first, quarters, x, stride, factors, out);
  }

  template <int GPC>
  void packed(const Linear& linear, int64_t block, const float* x, int64_t stride, const Factors* factors) {
    if (linear.packed->planes == 2) return packed<GPC, 2>(linear, block, x, stride, factors);
    packed<GPC, 1>(linear, block, x, stride, factors);
  }

  template <class T>
  void dense(const Linear& linear, int64_t block, const float* x, int64_t stride) {
    constexpr int ROWS = rows_at_once(R);
    for (int first = 0; first < kRows; first += ROWS)
      dense_rows<R, ROWS, T>(linear, block, first, x, stride, out);
  }

  void run(const Linear& linear, int64_t block, const float* x, int64_t stride, const Factors* factors) {
    if (linear.packed) {
      switch (linear.packed->per_chunk) {
        case 0: return packed<0>(linear, block, x, stride, factors);
        case 1: return packed<1>(linear, block, x, stride, factors);
        case 2: return packed<2>(linear, block, x, stride, factors);
        default: return packed<4>(linear, block, x, stride, factors);
      }
    }
    switch (linear.type) {
      case kHalf: return dense<Half>(linear, block, x, stride);
      case kBfloat: return dense<BFloat>(linear, block, x, stride);
      default: return dense<float>(linear, block, x, stride);
    }
  }
};

template <class PUT>
void block_product(const Linear& linear, int64_t block, Input& x, const PUT& put) {
  thread_local std::vector<Factors> factors;
  if (linear.packed) {
    const Weight& w = *linear.packed;
    factors.resize(w.per_chunk ? w.chunks : 1);
    for (size_t chunk = 0; chunk < factors.size(); ++chunk)
      factors[chunk].fill(w, block, chunk * w.per_chunk, w.per_chunk ? int(w.per_chunk) : 1);
  }
  const float* rows_of_x = x.rows(reads_apart(linear));
  int64_t row = 0;
  const auto take = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; row + R <= x.count(); row += R) {
      BlockProduct<R> product;
      product.run(linear, block, rows_of_x + row * x.width(), x.width(), factors.data());
      for (int r = 0; r < R; ++r) {
        Floats column[kRows];
        for (int i = 0; i < kRows; ++i) column[i] = product.out[i][r];
        put(row + r, block * kRows, sums_of(column));
      }
    }
  };
  take(std::integral_constant<int, 8>{});
  take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

// Calls put(row of x, first of 16 outputs, values) for blocks first .. last - 1 of 16 outputs, without the bias.
template <class PUT>
void product(const Linear& linear, int64_t first, int64_t last, Input& x, const PUT& put) {
#ifdef __AVX512VNNI__
  if (linear.packed) return lane_product(*linear.packed, first, last, x.digits(linear.fine), put);
#endif
  for (int64_t block = first; block < last; ++block) block_product(linear, block, x, put);
}

inline int64_t blocks_of(const Linear& linear) { return (linear.out + kRows - 1) / kRows; }

// Outputs of a block with their bias to `to`, which has room for `linear.out` of them.
inline void put_outputs(const Linear& linear, Floats values, int64_t first, float* to) {
  const int64_t count = std::min<int64_t>(kRows, linear.out - first);
  if (count == kRows) return store(to + first, linear.bias ? values + load(linear.bias + first) : values);
  for (int64_t i = 0; i < count; ++i) to[first + i] = values[i] + (linear.bias ? linear.bias[first + i] : 0.0f);
}

}  // namespace
