// Products of rows of float32 with packed weights by dot products of bytes, an output to a lane, on processors with
// AVX-512 VNNI: codes are integers already, and x is written as integers.
//
// The channels of a chunk of x become integers of 16 bits times a power of two, each as two signed digits of 8 bits. Where one
// channel is so large that the usual ones would lose what bfloat16 holds of them, or where the model asks for it, they
// become integers of 24 bits, as three digits. Sums of a group are exact, and are scaled in float32. So what a row
// gives does not depend on the number of rows and threads: rows of two digits beside one of three get a digit of zeros.

#pragma once

#ifdef __AVX512VNNI__

namespace {

constexpr int kMostDigits = 3;
constexpr float kLargest[2] = {127 * 256 + 127, (127 * 256 + 127) * 256 + 127};  // of two digits, and of three
constexpr float kOutlier = 64;  // times the mean size of a chunk's channels
constexpr float kTiny = 0x1p-100f;  // chunks of smaller channels count as zeros: factors stay normal numbers
constexpr int64_t kSlab = 64;   // rows of x whose digits of a chunk stay in the first cache
constexpr int kLaneBlocks = 4;  // of 16 outputs, for which such a chunk is read in turn
constexpr int kAlone = 16;      // rows up to which a block is read to its end, as memory likes it
constexpr int kQuads = kChunk / 4;
constexpr int64_t kFactorsAhead = 512;  // bytes of scales and of zero points, prefetched

// A chunk of a row of x.
struct alignas(64) ChunkDigits {
  int8_t digits[kMostDigits][kChunk];  // highest first; of each four channels the middle ones are exchanged
  // By whether a third digit is read: the sums of the integers of each quarter, and what an integer counts.
  float sums[2][4], unit[2];
  bool fine;  // there is a third digit

  // x: channels of the chunk, of which `count` are there.
  void fill(const float* x, int64_t count, bool asked) {
    Floats values[8] = {}, largest{}, total{};
    for (int i = 0; i * kLanes < count; ++i) {
      values[i] = load(x + i * kLanes);
      const Floats size = (Floats)_mm512_abs_ps((__m512)values[i]);
      largest = larger(largest, size);  // of what is not a number the other one: sums tell
      total += size;
    }
    const float most = _mm512_reduce_max_ps((__m512)largest), sum = _mm512_reduce_add_ps((__m512)total);
    fine = asked || most * kChunk > kOutlier * sum;
    const bool usable = sum - sum == 0 && most >= kTiny;
    // The least power of two by which the largest channel fits its digits.
    int bits = fine ? 23 : 15, exponent = 0;
    std::frexp(most, &exponent);
    if (std::ldexp(most, bits - exponent) > kLargest[fine]) --bits;
    unit[0] = usable ? std::ldexp(1.0f, exponent - bits) : sum - sum == 0 ? 0.0f : NAN;
    const Floats factor = all(usable ? std::ldexp(1.0f, bits - exponent) : 0.0f);
    for (int quarter = 0; quarter < 4; ++quarter) {
      __m512i integers[2];
      for (int i = 0; i < 2; ++i)
        integers[i] = _mm512_cvtps_epi32((__m512)(usable ? values[2 * quarter + i] * factor : Floats{}));
      const __m512i both = _mm512_add_epi32(integers[0], integers[1]);
      sums[0][quarter] = float(_mm512_reduce_add_epi32(both));
      for (int digit = fine ? 2 : 1; digit >= 0; --digit) {
        for (int i = 0; i < 2; ++i) integers[i] = put(integers[i], &digits[digit][(2 * quarter + i) * kLanes]);
      }
      if (!fine) std::memset(&digits[2][quarter * kSplit], 0, kSplit);
    }
    // Integers of two digits count as much in units of the third.
    unit[1] = fine ? unit[0] : unit[0] / 256;
    for (int quarter = 0; quarter < 4; ++quarter) sums[1][quarter] = fine ? sums[0][quarter] : sums[0][quarter] * 256;
  }

 private:
  // The lowest digit of integers; what is left of them.
  static __m512i put(__m512i values, int8_t* to) {
    const __m128i low = _mm512_cvtepi32_epi8(values);
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(low, order));
    return _mm512_srai_epi32(_mm512_sub_epi32(values, _mm512_cvtepi8_epi32(low)), 8);
  }
};

// Rows of x in slabs, [chunks][rows of the slab] each.
struct DigitRows {
  const ChunkDigits* at;
  int64_t count, chunks;
  int64_t of_slab(int64_t first) const { return std::min(kSlab, count - first); }
};

void to_digits(const float* x, int64_t count, int64_t width, bool fine, std::vector<ChunkDigits>& out) {
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  if (out.size() < size_t(count * chunks)) out.resize(count * chunks);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t first = row / kSlab * kSlab, rows = std::min(kSlab, count - first);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      out[first * chunks + chunk * rows + row - first].fill(x + row * width + chunk * kChunk,
                                                            std::min<int64_t>(kChunk, width - chunk * kChunk), fine);
  }
}

// Low and high nibbles of codes, each in a byte: of one quarter of a chunk, and of the next.
template <int PLANES>
inline void nibbles_of(const __m512i* bytes, __m512i* first, __m512i* second) {
  const __m512i nibble = _mm512_set1_epi8(15);
  *first = _mm512_and_si512(bytes[0], nibble);
  *second = _mm512_and_si512(_mm512_srli_epi32(bytes[0], 4), nibble);
  if (PLANES == 2) {
    *first = _mm512_or_si512(*first, _mm512_slli_epi32(_mm512_and_si512(bytes[1], nibble), 4));
    *second = _mm512_or_si512(*second, _mm512_andnot_si512(nibble, bytes[1]));
  }
}

// The 16 rows of a chunk of a block, four channels of one row in each lane: a vector for each four channels.
template <int PLANES>
inline void to_lanes(const uint8_t* codes, __m512i* quads) {
  const __m512i even = _mm512_set1_epi32(0x00ff00ff);
  __m512i planes[PLANES][16];
  for (int p = 0; p < PLANES; ++p) {
    for (int row = 0; row < kRows; ++row) planes[p][row] = _mm512_loadu_si512(codes + (row * PLANES + p) * kPlane);
    transpose(planes[p]);
  }
  // Word j of a row holds channels j and 32 + j in its low byte, 64 + j and 96 + j in its high one.
  for (int pair = 0; pair < 8; ++pair) {
    __m512i low[PLANES], high[PLANES];
    for (int p = 0; p < PLANES; ++p) {
      const __m512i first = planes[p][2 * pair], second = planes[p][2 * pair + 1];
      low[p] = _mm512_ternarylogic_epi32(even, first, _mm512_slli_epi32(second, 8), 0xca);
      high[p] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi32(first, 8), second, 0xca);
    }
    nibbles_of<PLANES>(low, &quads[pair], &quads[8 + pair]);
    nibbles_of<PLANES>(high, &quads[16 + pair], &quads[24 + pair]);
  }
}

// The same of codes that lie in lanes.
template <int PLANES>
inline void from_lanes(const uint8_t* codes, __m512i* quads) {
  for (int half = 0; half < 2; ++half) {
    for (int pair = 0; pair < 8; ++pair, codes += PLANES * kPlane) {
      __m512i bytes[PLANES];
      for (int p = 0; p < PLANES; ++p) bytes[p] = _mm512_loadu_si512(codes + p * kPlane);
      nibbles_of<PLANES>(bytes, &quads[16 * half + pair], &quads[16 * half + 8 + pair]);
    }
  }
}

// Scales and zero points of a chunk of a block.
template <int GPC>
struct LaneFactors {
  static constexpr int kGroups = GPC ? GPC : 1;
  Floats scale[kGroups], zero[kGroups];
  LaneFactors(const Weight& w, int64_t block, int64_t chunk) {
    const uint8_t* bytes = zeros_of(w, block, chunk * GPC);
    const int64_t at = (block * w.groups + chunk * GPC) * kRows * (w.scale_type == kFloat ? 4 : 2);
    __builtin_prefetch(bytes + kFactorsAhead);
    __builtin_prefetch(static_cast<const uint8_t*>(w.scale) + at + kFactorsAhead);
    for (int g = 0; g < kGroups; ++g) {
      scale[g] = scales_at(w, block, chunk * GPC + g);
      const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + g * kRows));
      zero[g] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros));
    }
  }
};

// sum += codes times four digits, of each lane. GCC's intrinsic takes three instructions for it.
inline void add_products(__m512i& sum, __m512i codes, const int8_t* digits) {
  typedef int8_t Four[4];
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Four*>(digits)));
}

// Adds a chunk of a block times R rows of x to their totals.
template <int R, int DIGITS, int GPC>
__attribute__((noinline)) void add_chunk(const __m512i* quads, const LaneFactors<GPC>& factors, const ChunkDigits* x, Floats* total) {
  constexpr int kGroups = GPC ? GPC : 1, kOfGroup = kQuads / kGroups;
  constexpr int kStreams = R == 1 ? 4 : R == 2 ? 2 : 1;  // a sum waits for the one before it
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    __m512i sums[kStreams][R][DIGITS];
    for (auto& stream : sums)
      for (auto& row : stream)
        for (auto& sum : row) sum = _mm512_setzero_si512();
    for (int quad = g * kOfGroup; quad < (g + 1) * kOfGroup; quad += kStreams) {
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        const __m512i codes = quads[quad + s];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
          for (int d = 0; d < DIGITS; ++d) {
            add_products(sums[s][r][d], codes, &x[r].digits[d][4 * (quad + s)]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Floats whole{};
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d) {
        __m512i sum = sums[0][r][d];
        for (int s = 1; s < kStreams; ++s) sum = _mm512_add_epi32(sum, sums[s][r][d]);
        const Floats digit = (Floats)_mm512_cvtepi32_ps(sum);
        whole = d ? fused(whole, all(256.0f), digit) : digit;
      }
      const ChunkDigits& here = x[r];
      float of_group = 0;
      for (int quarter = 0; quarter < 4 / kGroups; ++quarter) of_group += here.sums[DIGITS == 3][g * 4 / kGroups + quarter];
      whole = fused(factors.zero[g], all(-of_group), whole);
      total[r] = fused(whole * here.unit[DIGITS == 3], factors.scale[g], total[r]);
    }
  }
}

template <int R, int GPC>
inline void add_rows(const __m512i* quads, const LaneFactors<GPC>& factors, const ChunkDigits* x, Floats* total) {
  bool fine = false;
  for (int r = 0; r < R; ++r) fine |= x[r].fine;
  if (fine) return add_chunk<R, 3, GPC>(quads, factors, x, total);
  add_chunk<R, 2, GPC>(quads, factors, x, total);
}

// Blocks first .. last - 1 of 16 outputs times a slab of x.
struct SlabProduct {
  const Weight& w;
  int64_t first, last;
  const ChunkDigits* x;
  int64_t chunks, rows;

  // Calls put(row of the slab, first of 16 outputs, values).
  template <int GPC, int PLANES, bool IN_LANES, class PUT>
  void run(const PUT& put) const {
    alignas(64) __m512i quads[kQuads];
    alignas(64) Floats total[kLaneBlocks][kSlab];
    const int64_t at_once = rows > kAlone ? kLaneBlocks : 1;
    for (int64_t block = first; block < last; block += at_once) {
      const int64_t blocks = std::min(at_once, last - block);
      for (int64_t b = 0; b < blocks; ++b) std::fill_n(total[b], rows, Floats{});
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t b = 0; b < blocks; ++b) {
          const uint8_t* codes = w.codes + ((block + b) * w.chunks + chunk) * kRows * PLANES * kPlane;
          for (int line = 0; line < kRows * PLANES; ++line) __builtin_prefetch(codes + line * kPlane + kAhead);
          IN_LANES ? from_lanes<PLANES>(codes, quads) : to_lanes<PLANES>(codes, quads);
          const LaneFactors<GPC> factors(w, block + b, chunk);
          const ChunkDigits* here = x + chunk * rows;
          int64_t row = 0;
          const auto take = [&](auto count) {
            constexpr int R = decltype(count)::value;
            for (; row + R <= rows; row += R) add_rows<R, GPC>(quads, factors, here + row, total[b] + row);
          };
          take(std::integral_constant<int, 8>{});
          take(std::integral_constant<int, 4>{});
          take(std::integral_constant<int, 2>{});
          take(std::integral_constant<int, 1>{});
        }
      }
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t row = 0; row < rows; ++row) put(row, (block + b) * kRows, total[b][row]);
    }
  }

  template <int GPC, class PUT>
  void run(const PUT& put) const {
    if (w.planes == 2) return w.in_lanes ? run<GPC, 2, true>(put) : run<GPC, 2, false>(put);
    return w.in_lanes ? run<GPC, 1, true>(put) : run<GPC, 1, false>(put);
  }

  template <class PUT>
  void run(const PUT& put) const {
    switch (w.per_chunk) {
      case 0: return run<0>(put);
      case 1: return run<1>(put);
      case 2: return run<2>(put);
      default: return run<4>(put);
    }
  }
};

// Calls put(row of x, first of 16 outputs, values) for blocks first .. last - 1.
template <class PUT>
void lane_product(const Weight& w, int64_t first, int64_t last, const DigitRows& x, const PUT& put) {
  for (int64_t start = 0; start < x.count; start += kSlab) {
    const SlabProduct slab{w, first, last, x.at + start * x.chunks, x.chunks, x.of_slab(start)};
    slab.run([&](int64_t row, int64_t output, Floats values) { put(start + row, output, values); });
  }
}

}  // namespace

#endif
