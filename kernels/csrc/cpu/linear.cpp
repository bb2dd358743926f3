// W4A16 and W8A16 matrix products on AMX.
//
// A nibble becomes a bfloat16 by `vpermw`: it reads 5 bits of each word as an index into 32 entries, so with the
// 16 values of a code twice in the table no mask is needed, and a shift by 4 i picks the nibble. The table of a
// group's row is code - zero, which bfloat16 holds exactly; products are scaled in float32. Where the table is
// scaled itself (for the tiles of matrix products) its entries are rounded to bfloat16 as a dequantized weight is.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// A few rows of x are multiplied by digits.h. What it leaves is for tiles.h.
#include <sys/syscall.h>
#include <unistd.h>

#include "blocks.h"
#include "registers.h"

namespace {

constexpr int kPrefetch = 4096;  // bytes ahead

struct Tables {
  alignas(64) uint16_t bf16[48];       // -15 .. 15
  alignas(64) uint16_t bf16_high[48];  // the same times 16
  alignas(64) float f32[48];
  Tables() {
    for (int i = 0; i < 48; ++i) {
      const float value = float(i - 15);
      const float high = 16.0f * value;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bf16[i] = uint16_t(bits >> 16);
      std::memcpy(&bits, &high, 4);
      bf16_high[i] = uint16_t(bits >> 16);
      f32[i] = value;
    }
  }
};
const Tables tables;

inline __m512i twice(__m256i half) { return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1); }

// code - zero for the 16 codes of a digit, twice.
inline __m512i table_of(const uint16_t* values, int zero) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 15 - zero)));
}

// (code - zero) * scale, rounded to bfloat16, twice.
inline __m512i scaled_table(int zero, float scale) {
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(tables.f32 + 15 - zero), _mm512_set1_ps(scale));
  return twice(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __m512 scales_of(const Weight& w, int64_t block, int64_t group) {
  const int64_t start = (block * w.groups + group) * kRows;
  if (w.scale_type == kFloat) return _mm512_loadu_ps(static_cast<const float*>(w.scale) + start);
  const uint16_t* half = static_cast<const uint16_t*>(w.scale) + start;
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half));
  if (w.scale_type == kHalf) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <int I>
inline __m512bh weights_at(__m512i words, __m512i table) {
  const __m512i shifted = I ? _mm512_srli_epi16(words, 4 * I) : words;
  return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(shifted, table));
}

// ---------------------------------------------------------------------------------------------- dequantizing

// 32 weights in float32 from nibble i of the words of each plane.
inline void decode(const __m512i* words, int64_t planes, int i, int zero, float scale, __m512* out) {
  const __m512i mask = _mm512_set1_epi16(15);
  __m512i code = _mm512_and_si512(_mm512_srli_epi16(words[0], unsigned(4 * i)), mask);
  if (planes == 2) {
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(words[1], unsigned(4 * i)), mask);
    code = _mm512_or_si512(code, _mm512_slli_epi16(high, 4));
  }
  const __m512 shift = _mm512_set1_ps(float(zero)), factor = _mm512_set1_ps(scale);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(code));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(code, 1));
  out[0] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(low), shift), factor);
  out[1] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(high), shift), factor);
}

// Where dequantized weights go: bytes from row to row, and from 32 channels to the next 32.
struct Places {
  int64_t row, quarter;
};

// Chunks first .. last-1 of a block's 16 rows to bfloat16.
void dequantize_exact(const Weight& w, int64_t block, int64_t first, int64_t last, uint8_t* out, Places places) {
  alignas(64) float scale[4][kRows];
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int groups = w.per_chunk ? int(w.per_chunk) : 1;
    const int64_t group = chunk * w.per_chunk;
    const uint8_t* zero = zeros_of(w, block, group);
    for (int g = 0; g < groups; ++g) _mm512_store_ps(scale[g], scales_of(w, block, group + g));
    for (int row = 0; row < kRows; ++row) {
      const uint8_t* codes = w.codes + (((block * w.chunks + chunk) * kRows + row) * w.planes) * kPlane;
      const __m512i words[2] = {_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + (w.planes - 1) * kPlane)};
      uint8_t* place = out + row * places.row + (chunk - first) * 4 * places.quarter;
      for (int i = 0; i < 4; ++i) {
        const int g = i * groups / 4;
        __m512 values[2];
        decode(words, w.planes, i, zero[g * kRows + row], scale[g][row], values);
        _mm512_storeu_si512(place + i * places.quarter, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1], values[0])));
      }
    }
  }
}

// The same by tables: one lookup for 32 weights.
template <int GPC>
void dequantize_by_table(const Weight& w, int64_t block, int64_t first, int64_t last, uint8_t* out,
                         Places places) {
  constexpr int kGroups = GPC ? GPC : 1;
  constexpr int kQuarters = 4 / kGroups;
  alignas(64) float scale[kGroups][kRows];
  __m512i whole[kRows];
  if (!GPC) {
    _mm512_store_ps(scale[0], scales_of(w, block, 0));
    for (int row = 0; row < kRows; ++row) whole[row] = scaled_table(zeros_of(w, block, 0)[row], scale[0][row]);
  }
  const uint8_t* codes = w.codes + (block * w.chunks + first) * kRows * kPlane;
  for (int64_t chunk = first; chunk < last; ++chunk, out += 4 * places.quarter, codes += kRows * kPlane) {
    const int64_t group = chunk * GPC;
    const uint8_t* zero = zeros_of(w, block, group);
    if (GPC) {
      for (int g = 0; g < kGroups; ++g) _mm512_store_ps(scale[g], scales_of(w, block, group + g));
    }
    for (int row = 0; row < kRows; ++row) {
      _mm_prefetch(codes + row * kPlane + kPrefetch, _MM_HINT_T1);
      const __m512i words = _mm512_loadu_si512(codes + row * kPlane);
      uint8_t* place = out + row * places.row;
      __m512i table[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        table[g] = GPC ? scaled_table(zero[g * kRows + row], scale[g][row]) : whole[row];
      }
      const auto put = [&](int i, __m512bh weights) {
        _mm512_storeu_si512(place + i * places.quarter, reinterpret_cast<__m512i>(weights));
      };
      put(0, weights_at<0>(words, table[0]));
      put(1, weights_at<1>(words, table[1 / kQuarters]));
      put(2, weights_at<2>(words, table[2 / kQuarters]));
      put(3, weights_at<3>(words, table[3 / kQuarters]));
    }
  }
}

using Dequantize = void (*)(const Weight&, int64_t, int64_t, int64_t, uint8_t*, Places);

Dequantize to_bfloat(const Weight& w) {
  if (w.planes == 2) return dequantize_exact;
  switch (w.per_chunk) {
    case 0: return dequantize_by_table<0>;
    case 1: return dequantize_by_table<1>;
    case 2: return dequantize_by_table<2>;
    default: return dequantize_by_table<4>;
  }
}

}  // namespace

#include "output.h"

#include "digits.h"

#include "tiles.h"
