// Products by dot products of registers, where there is no AMX, of what digits.h leaves: the weights are decoded
// again for every four rows of x. code - zero is exact in bfloat16; sums of a group are scaled in float32.

namespace {

// One row of weights, one quarter (32 channels) of a chunk, R rows of x.
template <int I, int R>
inline void dot(__m512i words, __m512i table, const uint16_t* x, int64_t stride, __m512* sums) {
  const __m512bh weights = weights_at<I>(words, table);
  for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbf16_ps(sums[r], weights, load_x(x + r * stride + 32 * I));
}

// GPC: groups of a chunk (0: one for the row). Sums of a group are scaled, those of a whole row are not yet.
template <int R, int GPC, int PLANES>
inline void dot_chunk(const uint8_t* codes, const uint16_t* x, int64_t stride, const uint8_t* zero,
                      const float (*scale)[kRows], int row, __m512* total) {
  __m512i words[PLANES];
  for (int p = 0; p < PLANES; ++p) words[p] = _mm512_loadu_si512(codes + p * kPlane);
  constexpr int kGroups = GPC ? GPC : 1;
  constexpr int kQuarters = 4 / kGroups;
  __m512 sums[R];
  const auto digits = [&](auto index, int z) {
    constexpr int I = decltype(index)::value;
    dot<I, R>(words[0], table_of(tables.bf16, PLANES == 2 ? z & 15 : z), x, stride, sums);
    if (PLANES == 2) dot<I, R>(words[PLANES - 1], table_of(tables.bf16_high, z >> 4), x, stride, sums);
  };
  for (int g = 0; g < kGroups; ++g) {
    const int z = zero[g * kRows + row];
    for (int r = 0; r < R; ++r) sums[r] = GPC ? _mm512_setzero_ps() : total[r];
    if (kQuarters == 4) {
      digits(std::integral_constant<int, 0>{}, z);
      digits(std::integral_constant<int, 1>{}, z);
      digits(std::integral_constant<int, 2>{}, z);
      digits(std::integral_constant<int, 3>{}, z);
    } else if (kQuarters == 2) {
      if (g == 0) {
        digits(std::integral_constant<int, 0>{}, z);
        digits(std::integral_constant<int, 1>{}, z);
      } else {
        digits(std::integral_constant<int, 2>{}, z);
        digits(std::integral_constant<int, 3>{}, z);
      }
    } else {
      if (g == 0) digits(std::integral_constant<int, 0>{}, z);
      if (g == 1) digits(std::integral_constant<int, 1>{}, z);
      if (g == 2) digits(std::integral_constant<int, 2>{}, z);
      if (g == 3) digits(std::integral_constant<int, 3>{}, z);
    }
    for (int r = 0; r < R; ++r) {
      total[r] = GPC ? _mm512_fmadd_ps(sums[r], _mm512_set1_ps(scale[g][row]), total[r]) : sums[r];
    }
  }
}

// Rows first .. first + ROWS - 1 of a block times R rows of x.
template <int R, int ROWS, int GPC, int PLANES>
void few_rows(const Weight& w, int64_t block, int first, const uint16_t* x, int64_t stride, float (*out)[kRows]) {
  __m512 total[ROWS][R];
  for (auto& row : total)
    for (auto& value : row) value = _mm512_setzero_ps();
  constexpr int kGroups = GPC ? GPC : 1;
  constexpr int64_t kChunkBytes = int64_t(kRows) * PLANES * kPlane;
  const uint8_t* codes = w.codes + block * w.chunks * kChunkBytes + first * PLANES * kPlane;
  alignas(64) float scale[kGroups][kRows];
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk, codes += kChunkBytes, x += kChunk) {
    const int64_t group = GPC ? chunk * GPC : 0;
    if (GPC) {
      for (int g = 0; g < kGroups; ++g) _mm512_store_ps(scale[g], scales_of(w, block, group + g));
    }
    const uint8_t* zero = zeros_of(w, block, group);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const uint8_t* here = codes + row * PLANES * kPlane;
      for (int p = 0; p < PLANES; ++p) _mm_prefetch(here + p * kPlane + kPrefetch, _MM_HINT_T0);
      dot_chunk<R, GPC, PLANES>(here, x, stride, zero, scale, first + row, total[row]);
    }
  }
  alignas(64) float whole[kRows];
  if (!GPC) _mm512_store_ps(whole, scales_of(w, block, 0));
  for (int row = 0; row < ROWS; ++row) {
    for (int r = 0; r < R; ++r) {
      const float sum = _mm512_reduce_add_ps(total[row][r]);
      out[r][first + row] = GPC ? sum : sum * whole[first + row];
    }
  }
}

template <int R, int GPC, int PLANES>
void few_rows_block(const Weight& w, int64_t block, const uint16_t* x, int64_t stride, int64_t column,
                    const Output& output) {
  constexpr int ROWS = R == 1 ? 16 : R == 2 ? 8 : 4;  // sums stay in registers
  if (block * kRows >= output.rows) return;
  alignas(64) float sums[R][kRows];
  for (int first = 0; first < kRows; first += ROWS)
    few_rows<R, ROWS, GPC, PLANES>(w, block, first, x, stride, sums);
  for (int r = 0; r < R; ++r) output.put(_mm512_load_ps(sums[r]), block * kRows, column + r);
}

using FewRows = void (*)(const Weight&, int64_t, const uint16_t*, int64_t, int64_t, const Output&);

template <int R, int GPC>
FewRows few_rows_of(const Weight& w) {
  return w.planes == 2 ? few_rows_block<R, GPC, 2> : few_rows_block<R, GPC, 1>;
}

template <int R>
FewRows few_rows_of(const Weight& w) {
  switch (w.per_chunk) {
    case 0: return few_rows_of<R, 0>(w);
    case 1: return few_rows_of<R, 1>(w);
    case 2: return few_rows_of<R, 2>(w);
    default: return few_rows_of<R, 4>(w);
  }
}

}  // namespace

extern "C" {

// out (rows of x, out_features) float32 (type 2) or bfloat16 (1) = x (rows, stride) bfloat16, filled up to whole
// chunks, times the weight, plus bias.
void nibble_few_rows(const Weight* weight, const void* x, int64_t rows, int64_t stride, const float* bias, void* out,
                     int64_t type, int64_t out_features, int threads) {
  const Weight w = *weight;
  const Output output{out, type, out_features, out_features, rows, bias};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < w.blocks; ++block) {
    int64_t row = 0;
    const auto take = [&](int64_t count, FewRows few) {
      for (; row + count <= rows; row += count)
        few(w, block, static_cast<const uint16_t*>(x) + row * stride, stride, row, output);
    };
    take(4, few_rows_of<4>(w));
    take(2, few_rows_of<2>(w));
    take(1, few_rows_of<1>(w));
  }
}

}  // extern "C"
