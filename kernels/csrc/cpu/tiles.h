// Products on AMX: the weights are the left operand, 16 rows of 32 channels to a tile, and x is the right one.
// A tile product takes 16 cycles for up to 16 columns of x, so one column costs as much as sixteen.
//
// nibble_tiles_exact multiplies code - zero, exact in bfloat16, and scales sums of a group in float32.
// nibble_tiles multiplies weights that are scaled and rounded to bfloat16, so that sums stay in their tiles.

namespace {

constexpr int kTile = 1024;  // bytes: 16 rows of 64

// x (rows, stride) bfloat16 to tiles of 16 columns, in parts of at most `part` tiles of channels:
// [K/32/part][columns/16][part][16 pairs of channels][16 columns].
void pack_columns(const uint16_t* x, int64_t rows, int64_t stride, int64_t tiles, int64_t part, uint8_t* out,
                  int threads) {
  const int64_t groups = (rows + 15) / 16;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t row = group * 16 + i;
        r[i] = row < rows ? _mm512_loadu_si512(x + row * stride + tile * 32) : _mm512_setzero_si512();
      }
      transpose(r);
      const int64_t start = tile / part * part, length = std::min(part, tiles - start);
      uint8_t* place = out + (start * groups + group * length + tile - start) * kTile;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(place + i * 64, r[i]);
    }
  }
}

// ------------------------------------------------------------------------------------------------- exact sums

// One chunk of a block as code - zero: 4 tiles for each plane.
template <int GPC, int PLANES>
inline void codes_to_tiles(const Weight& w, int64_t block, int64_t chunk, uint8_t* out) {
  constexpr int kGroups = GPC ? GPC : 1;
  const uint8_t* codes = w.codes + (block * w.chunks + chunk) * kRows * PLANES * kPlane;
  const uint8_t* zero = zeros_of(w, block, chunk * GPC);
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    for (int p = 0; p < PLANES; ++p) {
      _mm_prefetch(codes + (row * PLANES + p) * kPlane + kPrefetch, _MM_HINT_T1);
      const __m512i words = _mm512_loadu_si512(codes + (row * PLANES + p) * kPlane);
      __m512i table[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        const int z = zero[g * kRows + row];
        table[g] = PLANES == 1 ? table_of(tables.bf16, z)
                   : p == 0    ? table_of(tables.bf16, z & 15)
                               : table_of(tables.bf16_high, z >> 4);
      }
      uint8_t* place = out + p * 4 * kTile + row * 64;
      _mm512_store_si512(place, reinterpret_cast<__m512i>(weights_at<0>(words, table[0])));
      _mm512_store_si512(place + kTile, reinterpret_cast<__m512i>(weights_at<1>(words, table[kGroups / 4])));
      _mm512_store_si512(place + 2 * kTile, reinterpret_cast<__m512i>(weights_at<2>(words, table[kGroups / 2])));
      _mm512_store_si512(place + 3 * kTile,
                         reinterpret_cast<__m512i>(weights_at<3>(words, table[kGroups * 3 / 4])));
    }
  }
}

constexpr int kBlocks = 4;  // of 16 rows, that a thread multiplies at once: a product waits long for its sum

// The sums of a group leave their tiles, which start again at zero.
template <bool ONE>
inline void store_sums(float* sums) {
  constexpr int kStride = ONE ? 4 : 64;
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 256, kStride);
  _tile_stored(2, sums + 512, kStride);
  _tile_stored(3, sums + 768, kStride);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  settle();
}

// Adds stored sums, times the scales of their group, to `total`.
template <bool ONE>
inline void add_sums(const Weight& w, int64_t first, int64_t group, const float* sums, float* total) {
  for (int b = 0; b < kBlocks; ++b, sums += 256, total += 256) {
    const __m512 scale = scales_of(w, first + b, group);
    if (ONE) {
      _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(sums), scale, _mm512_load_ps(total)));
      continue;
    }
    alignas(64) float factor[16];
    _mm512_store_ps(factor, scale);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums + 16 * i), _mm512_set1_ps(factor[i]));
      _mm512_store_ps(total + 16 * i, _mm512_add_ps(scaled, _mm512_load_ps(total + 16 * i)));
    }
  }
}

// 32 channels of each block; a block's tiles are `stride` bytes apart.
template <bool ONE>
inline void multiply(const uint8_t* weights, int64_t stride, const uint8_t* x) {
  settle();
  _tile_loadd(6, x, ONE ? 4 : 64);
  _tile_loadd(4, weights, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, weights + stride, 64);
  _tile_dpbf16ps(1, 5, 6);
  _tile_loadd(4, weights + 2 * stride, 64);
  _tile_dpbf16ps(2, 4, 6);
  _tile_loadd(5, weights + 3 * stride, 64);
  _tile_dpbf16ps(3, 5, 6);
}

constexpr int kMostGroups = 8;  // of 16 columns, that share one conversion of the weights

// kBlocks blocks from `first` on times `groups` groups of columns of x.
template <int GPC, int PLANES, bool ONE>
void exact_blocks(const Weight& w, int64_t first, const uint8_t* x, int64_t x_chunk, int64_t groups,
                  const Output& output, int64_t column) {
  constexpr int kBlock = PLANES * 4 * kTile, kPart = kBlocks * kBlock;
  constexpr int kX = ONE ? 64 : kTile;  // bytes of 32 channels of x
  // Sums of a whole row would have to stay in tiles for each group of columns: they are taken per chunk, too.
  constexpr int kGroups = GPC ? GPC : 1;
  // Sums are added one group later than they are stored, so that no load waits for a store. A second buffer of
  // weights was slower: both and the input are more than what is left of a first cache that two threads share.
  uint8_t* weights = thread_scratch.of(kPart + (2 + kMostGroups) * kBlocks * kTile);
  float* stored[2] = {reinterpret_cast<float*>(weights + kPart),
                      reinterpret_cast<float*>(weights + kPart + kBlocks * kTile)};
  float* total = stored[1] + kBlocks * 256;
  std::memset(total, 0, size_t(groups) * kBlocks * kTile);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t waiting_group = -1, waiting_columns = 0;
  int turn = 0;
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    for (int b = 0; b < kBlocks; ++b) codes_to_tiles<GPC, PLANES>(w, first + b, chunk, weights + b * kBlock);
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* here = x + chunk * x_chunk + g * 4 * kX;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        for (int p = 0; p < PLANES; ++p) multiply<ONE>(weights + (p * 4 + i) * kTile, kBlock, here + i * kX);
        if ((i + 1) * kGroups % 4) continue;
        store_sums<ONE>(stored[turn]);
        if (waiting_group >= 0)
          add_sums<ONE>(w, first, waiting_group, stored[1 - turn], total + waiting_columns * kBlocks * 256);
        waiting_group = chunk * GPC + i * kGroups / 4;
        waiting_columns = g;
        turn = 1 - turn;
      }
    }
  }
  add_sums<ONE>(w, first, waiting_group, stored[1 - turn], total + waiting_columns * kBlocks * 256);
  for (int64_t g = 0; g < groups; ++g) {
    for (int b = 0; b < kBlocks && (first + b) * kRows < output.rows; ++b) {
      const float* sums = total + (g * kBlocks + b) * 256;
      if (ONE) {
        output.put(_mm512_load_ps(sums), (first + b) * kRows, column);
      } else {
        output.store(sums, (first + b) * kRows, column + 16 * g);
      }
    }
  }
}

using Exact = void (*)(const Weight&, int64_t, const uint8_t*, int64_t, int64_t, const Output&, int64_t);

template <int PLANES, bool ONE>
Exact exact_of(const Weight& w) {
  switch (w.per_chunk) {
    case 0: return exact_blocks<0, PLANES, ONE>;
    case 1: return exact_blocks<1, PLANES, ONE>;
    case 2: return exact_blocks<2, PLANES, ONE>;
    default: return exact_blocks<4, PLANES, ONE>;
  }
}

// --------------------------------------------------------------------------------------------- rounded weights

constexpr int64_t kBlockN = 16;  // blocks of 16 rows of weights
constexpr int64_t kBlockM = 16;  // groups of 16 columns of x
constexpr int64_t kBlockK = 2;   // chunks: both strips of weights fit half of a small cache

// 2 x 2 tiles of sums over `tiles` tiles of channels. A second row or column that is not there repeats the first.
inline void quad(const uint8_t* weights, int64_t next_row, const uint8_t* x, int64_t next_column, int64_t tiles,
                 float* const* sums, bool fresh) {
  settle();
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0], 64);
    _tile_loadd(1, sums[1], 64);
    _tile_loadd(2, sums[2], 64);
    _tile_loadd(3, sums[3], 64);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const uint8_t *w = weights + t * kTile, *b = x + t * kTile;
    _tile_loadd(4, w, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, w + next_row, 64);
    _tile_loadd(7, b + next_column, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  settle();
}

// Blocks n .. n_end-1 of weights times the only group of columns: sums stay in their tiles all the way.
void rounded_column(const Weight& w, int64_t n, int64_t n_end, const uint8_t* x, Dequantize dequantize,
                    const Output& output) {
  constexpr int kBlock = 4 * kTile, kPart = kBlocks * kBlock;
  constexpr Places places{64, kTile};
  uint8_t* weights = thread_scratch.of(kPart + kBlocks * kTile);
  float* sums = reinterpret_cast<float*>(weights + kPart);
  for (int64_t first = n; first < n_end; first += kBlocks) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      for (int b = 0; b < kBlocks; ++b) dequantize(w, first + b, chunk, chunk + 1, weights + b * kBlock, places);
      for (int i = 0; i < 4; ++i) multiply<false>(weights + i * kTile, kBlock, x + (chunk * 4 + i) * kTile);
    }
    store_sums<false>(sums);
    for (int b = 0; b < kBlocks && (first + b) * kRows < output.rows; ++b)
      output.store(sums + b * 256, (first + b) * kRows, 0);
  }
}

// Blocks n .. n_end-1 of weights times column groups m .. m_end-1 of x.
void rounded_part(const Weight& w, int64_t n, int64_t n_end, const uint8_t* x, int64_t all_groups, int64_t m,
                  int64_t m_end, Dequantize dequantize, const Output& output) {
  const int64_t rows = n_end - n, columns = m_end - m;
  constexpr int64_t kStrip = kBlockK * 4 * kTile;  // a block's weights
  uint8_t* weights = thread_scratch.of(2 * kStrip + (kBlockN * kBlockM + 4) * kTile);
  float* sums = reinterpret_cast<float*>(weights + 2 * kStrip);
  float* spare = sums + kBlockN * kBlockM * 256;
  const auto sums_at = [&](int64_t i, int64_t j) {
    return i < rows && j < columns ? sums + (i * kBlockM + j) * 256 : spare;
  };
  for (int64_t chunk = 0; chunk < w.chunks; chunk += kBlockK) {
    const int64_t chunk_end = std::min(w.chunks, chunk + kBlockK), tiles = (chunk_end - chunk) * 4;
    const uint8_t* here = x + chunk * 4 * all_groups * kTile;
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t r = i; r < std::min(rows, i + 2); ++r)
        dequantize(w, n + r, chunk, chunk_end, weights + (r - i) * kStrip, Places{64, kTile});
      for (int64_t j = 0; j < columns; j += 2) {
        float* const four[4] = {sums_at(i, j), sums_at(i, j + 1), sums_at(i + 1, j), sums_at(i + 1, j + 1)};
        quad(weights, i + 1 < rows ? kStrip : 0, here + (m + j) * tiles * kTile, j + 1 < columns ? tiles * kTile : 0,
             tiles, four, chunk == 0);
      }
    }
  }
  for (int64_t i = 0; i < rows && (n + i) * kRows < output.rows; ++i)
    for (int64_t j = 0; j < columns; ++j) output.store(sums_at(i, j), (n + i) * kRows, (m + j) * 16);
}

}  // namespace

extern "C" {

// 1 if tiles may be used: the system gives their registers on request only.
int nibble_tiles_ready() { return syscall(SYS_arch_prctl, kPermission, kFeature) == 0; }

// out (rows of x, out_stride) float32 (type 2) or bfloat16 (1) = x (rows, stride) bfloat16, filled up to whole
// chunks, times the weight, plus bias.
void nibble_tiles_exact(const Weight* weight, const void* x, int64_t rows, int64_t stride, const float* bias,
                        void* out, int64_t type, int64_t out_features, int threads) {
  const Weight w = *weight;
  const int64_t tiles = w.chunks * 4, groups = (rows + 15) / 16;
  const int64_t x_chunk = rows == 1 ? kChunk * 2 : groups * 4 * kTile;
  const uint8_t* columns = static_cast<const uint8_t*>(x);
  if (rows > 1) {
    uint8_t* packed = packed_x.of(size_t(groups * tiles * kTile));
    pack_columns(static_cast<const uint16_t*>(x), rows, stride, tiles, 4, packed, threads);
    columns = packed;
  }
  const Output output{out, type, out_features, out_features, rows, bias};
  const Exact product = w.planes == 2 ? (rows == 1 ? exact_of<2, true>(w) : exact_of<2, false>(w))
                                      : (rows == 1 ? exact_of<1, true>(w) : exact_of<1, false>(w));
#pragma omp parallel num_threads(threads)
  {
    const TileScope scope(rows == 1 ? 1 : 16);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < w.blocks; first += kBlocks) {
      for (int64_t g = 0; g < groups; g += kMostGroups) {
        const int64_t count = std::min<int64_t>(kMostGroups, groups - g);
        product(w, first, columns + g * 4 * kTile, x_chunk, count, output, 16 * g);
      }
    }
  }
}

// The same with weights rounded to bfloat16.
void nibble_tiles(const Weight* weight, const void* x, int64_t rows, int64_t stride, const float* bias, void* out,
                  int64_t type, int64_t out_features, int threads) {
  const Weight w = *weight;
  const int64_t tiles = w.chunks * 4, groups = (rows + 15) / 16;
  uint8_t* packed = packed_x.of(size_t(groups * tiles) * kTile);
  pack_columns(static_cast<const uint16_t*>(x), rows, stride, tiles, kBlockK * 4, packed, threads);
  const Output output{out, type, out_features, out_features, rows, bias};
  const Dequantize dequantize = to_bfloat(w);
  const int64_t parts_n = (w.blocks + kBlockN - 1) / kBlockN, parts_m = (groups + kBlockM - 1) / kBlockM;
#pragma omp parallel num_threads(threads)
  {
    const TileScope scope(16);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t part_m = 0; part_m < parts_m; ++part_m) {
      for (int64_t part_n = 0; part_n < parts_n; ++part_n) {
        const int64_t n = part_n * kBlockN, m = part_m * kBlockM;
        const int64_t n_end = std::min(w.blocks, n + kBlockN), m_end = std::min(groups, m + kBlockM);
        if (groups == 1) {
          rounded_column(w, n, n_end, packed, dequantize, output);
        } else {
          rounded_part(w, n, n_end, packed, groups, m, m_end, dequantize, output);
        }
      }
    }
  }
}

}  // extern "C"
