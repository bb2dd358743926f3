// Products of one to four rows of x by integers: dot products of bytes take a third of the time that those of
// bfloat16 take, and codes are integers already.
//
// The channels of a chunk of x are written as integers of 22 bits and a sign times a power of two, each as three
// signed digits of 8 bits. What bfloat16 holds of a channel is kept whole unless it is smaller than the largest of
// its chunk by more than 2^14; then what is lost is below 2^-23 of that largest, as in a sum of float32. Sums of a
// group are exact, and are scaled in float32. Inputs that are not finite, or too small to be scaled, are left to
// the other kernels.

namespace {

constexpr int kDigits = 3;
constexpr int kDigitBits = 22;
constexpr int kSmallest = -90;  // of the exponents of a chunk: factors stay normal numbers
constexpr int kStreams = 4;     // blocks read in turns: one stream alone does not keep the memory busy
constexpr int kAhead = 2048;    // bytes of a stream, prefetched

// A chunk of a row of x as the groups of weights in it read it: the bytes that meet the low and the high nibbles of a
// plane, zeros where another group's channels lie.
template <int GPC>
struct Chunk {
  static constexpr int kGroups = GPC ? GPC : 1;
  static constexpr int kHalves = GPC == 4 ? 1 : 2;  // of a plane's nibbles, that a group has channels in
  alignas(64) uint8_t bytes[kGroups][kDigits][kHalves][64];
  float sum[kGroups];  // of the integers
  float unit;          // that the integers count

  static constexpr bool low(int group, int half) { return GPC == 4 ? group % 2 == 0 : half == 0; }
};

// Digits of 128 integers, lowest first.
inline void split(const __m512i* values, int8_t (*digits)[kChunk]) {
  for (int i = 0; i < 8; ++i) {
    __m512i rest = values[i];
    for (int d = 0; d < kDigits; ++d) {
      const __m128i low = _mm512_cvtepi32_epi8(rest);
      _mm_store_si128(reinterpret_cast<__m128i*>(digits[d] + 16 * i), low);
      rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, _mm512_cvtepi8_epi32(low)), 8);
    }
  }
}

inline __m512i words_of(const int8_t* digits) {
  return _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(digits)));
}

// False if the chunk can't be written so.
template <int GPC>
bool to_digits(const uint16_t* x, Chunk<GPC>& out) {
  __m512 values[8];
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * i));
    values[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    // As integers, so that what is not a number is larger than all numbers.
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(values[i])));
  }
  const int bits = _mm512_reduce_max_epi32(largest);
  const int exponent = (bits >> 23) - 126;  // the largest is below 2^exponent
  if (bits && (exponent < kSmallest || exponent > 127)) return false;
  const int shift = bits ? kDigitBits - exponent : 0;
  const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32((shift + 127) << 23));
  __m512i integers[8];
  for (int i = 0; i < 8; ++i) integers[i] = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor));
  out.unit = std::ldexp(1.0f, -shift);
  for (int g = 0; g < out.kGroups; ++g) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 8 / out.kGroups * g; i < 8 / out.kGroups * (g + 1); ++i) sum = _mm512_add_epi32(sum, integers[i]);
    out.sum[g] = float(_mm512_reduce_add_epi32(sum));
  }
  alignas(64) int8_t digits[kDigits][kChunk];
  split(integers, digits);
  for (int d = 0; d < kDigits; ++d) {
    // Bytes of even places hold channels j and 32 + j in their nibbles, those of odd places 64 + j and 96 + j.
    const __m512i even[2] = {words_of(digits[d]), words_of(digits[d] + 32)};
    const __m512i odd[2] = {_mm512_slli_epi16(words_of(digits[d] + 64), 8), _mm512_slli_epi16(words_of(digits[d] + 96), 8)};
    for (int g = 0; g < out.kGroups; ++g) {
      for (int h = 0; h < out.kHalves; ++h) {
        const int half = out.low(g, h) ? 0 : 1;
        __m512i both = _mm512_or_si512(even[half], odd[half]);
        if (GPC == 2) both = g ? odd[half] : even[half];
        if (GPC == 4) both = g / 2 ? odd[half] : even[half];
        _mm512_store_si512(out.bytes[g][d][h], both);
      }
    }
  }
  return true;
}

// Codes of a row of a chunk: those in low and those in high nibbles, each in a byte.
template <int PLANES>
inline void codes_of(const uint8_t* codes, __m512i* halves) {
  const __m512i mask = _mm512_set1_epi8(15), words = _mm512_loadu_si512(codes);
  halves[0] = _mm512_and_si512(words, mask);
  halves[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), mask);
  if (PLANES == 2) {
    const __m512i high = _mm512_loadu_si512(codes + kPlane);
    halves[0] = _mm512_or_si512(halves[0], _mm512_slli_epi16(_mm512_and_si512(high, mask), 4));
    halves[1] = _mm512_or_si512(halves[1], _mm512_andnot_si512(mask, high));
  }
}

// Sixteen parts of the sum of codes times a group's integers. Four bits times 22, eight times, fit 32 bits; eight
// bits don't: their lowest digit joins in float32.
template <int GPC, int PLANES>
inline __m512 group_sum(const Chunk<GPC>& x, const __m512i* halves, int g) {
  const auto add = [&](__m512i sum, int digit) {
    for (int h = 0; h < x.kHalves; ++h)
      sum = _mm512_dpbusd_epi32(sum, halves[x.low(g, h) ? 0 : 1], _mm512_load_si512(x.bytes[g][digit][h]));
    return sum;
  };
  __m512i sum = add(_mm512_setzero_si512(), 2);
  sum = add(_mm512_slli_epi32(sum, 8), 1);
  if (PLANES == 1) return _mm512_cvtepi32_ps(add(_mm512_slli_epi32(sum, 8), 0));
  const __m512 lowest = _mm512_cvtepi32_ps(add(_mm512_setzero_si512(), 0));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(256.0f), lowest);
}

// One chunk of a block times R rows of x (`chunk_stride` Chunks apart), added to `total` (16 rows, R) and to what
// zero points take away (R).
template <int R, int GPC, int PLANES>
inline void digits_chunk(const Weight& w, int64_t block, int64_t chunk, const uint8_t* codes, const Chunk<GPC>* x,
                         int64_t x_stride, float* total, __m512* taken) {
  constexpr int kGroups = Chunk<GPC>::kGroups;
  const uint8_t* zeros = zeros_of(w, block, chunk * GPC);
  alignas(64) float factor[kGroups][R][kRows];
  for (int g = 0; g < kGroups; ++g) {
    const __m512 scale = GPC ? scales_of(w, block, chunk * GPC + g) : _mm512_set1_ps(1.0f);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + g * kRows));
    const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    for (int r = 0; r < R; ++r) {
      const Chunk<GPC>& here = x[r * x_stride];
      const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(here.unit));
      _mm512_store_ps(factor[g][r], scaled);
      taken[r] = _mm512_fmadd_ps(_mm512_mul_ps(zero, scaled), _mm512_set1_ps(here.sum[g]), taken[r]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    _mm_prefetch(codes + row * PLANES * kPlane + kAhead, _MM_HINT_T0);
    __m512i halves[2];
    codes_of<PLANES>(codes + row * PLANES * kPlane, halves);
    for (int r = 0; r < R; ++r) {
      float* at = total + (row * R + r) * 16;
      __m512 sum = _mm512_load_ps(at);
      for (int g = 0; g < kGroups; ++g)
        sum = _mm512_fmadd_ps(group_sum<GPC, PLANES>(x[r * x_stride], halves, g), _mm512_set1_ps(factor[g][r][row]), sum);
      _mm512_store_ps(at, sum);
    }
  }
}

// Sums of each of 16 vectors that lie `stride` apart.
inline __m512 sums_of(const float* at, int64_t stride) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(at + i * stride);
  transpose(r);
  __m512 sum = _mm512_castsi512_ps(r[0]);
  for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(r[i]));
  return sum;
}

// Blocks first .. first + kStreams - 1, a chunk of each in turn.
template <int R, int GPC, int PLANES>
void digits_blocks(const Weight& w, int64_t first, const void* rows, int64_t column, const Output& output) {
  constexpr int64_t kChunkBytes = int64_t(kRows) * PLANES * kPlane;
  const Chunk<GPC>* x = static_cast<const Chunk<GPC>*>(rows);
  alignas(64) float total[kStreams][kRows * R * 16];
  __m512 taken[kStreams][R];
  std::memset(total, 0, sizeof total);
  for (auto& block : taken)
    for (auto& value : block) value = _mm512_setzero_ps();
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    for (int b = 0; b < kStreams; ++b) {
      const uint8_t* codes = w.codes + ((first + b) * w.chunks + chunk) * kChunkBytes;
      digits_chunk<R, GPC, PLANES>(w, first + b, chunk, codes, x + chunk, w.chunks, total[b], taken[b]);
    }
  }
  for (int b = 0; b < kStreams && (first + b) * kRows < output.rows; ++b) {
    for (int r = 0; r < R; ++r) {
      __m512 sum = _mm512_sub_ps(sums_of(total[b] + r * 16, R * 16), taken[b][r]);
      if (!GPC) sum = _mm512_mul_ps(sum, scales_of(w, first + b, 0));
      output.put(sum, (first + b) * kRows, column + r);
    }
  }
}

using DigitsBlocks = void (*)(const Weight&, int64_t, const void*, int64_t, const Output&);

template <int GPC, int PLANES>
bool digits_product(const Weight& w, const uint16_t* x, int64_t rows, int64_t stride, const Output& output, int threads) {
  auto* chunks = reinterpret_cast<Chunk<GPC>*>(packed_x.of(size_t(rows * w.chunks) * sizeof(Chunk<GPC>)));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk)
      if (!to_digits(x + row * stride + chunk * kChunk, chunks[row * w.chunks + chunk])) return false;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < w.blocks; first += kStreams) {
    int64_t row = 0;
    const auto take = [&](int64_t count, DigitsBlocks product) {
      for (; row + count <= rows; row += count) product(w, first, chunks + row * w.chunks, row, output);
    };
    take(4, digits_blocks<4, GPC, PLANES>);
    take(2, digits_blocks<2, GPC, PLANES>);
    take(1, digits_blocks<1, GPC, PLANES>);
  }
  return true;
}

template <int GPC>
bool digits_product(const Weight& w, const uint16_t* x, int64_t rows, int64_t stride, const Output& output, int threads) {
  return w.planes == 2 ? digits_product<GPC, 2>(w, x, rows, stride, output, threads)
                       : digits_product<GPC, 1>(w, x, rows, stride, output, threads);
}

}  // namespace

extern "C" {

// 1 if out (rows of x, out_features) bfloat16 = x (rows, stride) bfloat16, filled up to whole chunks, times the weight,
// plus bias; 0 if x holds what has no digits: nothing is written then.
int nibble_digits(const Weight* weight, const void* x, int64_t rows, int64_t stride, const float* bias, void* out,
                  int64_t type, int64_t out_features, int threads) {
  const Weight w = *weight;
  const Output output{out, type, out_features, out_features, rows, bias};
  const uint16_t* at = static_cast<const uint16_t*>(x);
  switch (w.per_chunk) {
    case 0: return digits_product<0>(w, at, rows, stride, output, threads);
    case 1: return digits_product<1>(w, at, rows, stride, output, threads);
    case 2: return digits_product<2>(w, at, rows, stride, output, threads);
    default: return digits_product<4>(w, at, rows, stride, output, threads);
  }
}

}  // extern "C"
