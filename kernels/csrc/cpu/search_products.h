// The quadratic part of the clip step's loss, on tiles or on vectors.

#ifdef NIBBLE_AMX

// H' in tiles of 16 channels n by 32 channels k, rounded to bfloat16; those above the diagonal are left out. What
// rounding takes from the diagonal is kept: only there do errors of H add up.
struct Block {
  Block(const Rows& from, int64_t size) : blocks(size / 32) {
    for (int64_t n = 0; n < size; ++n)
      for (int64_t k = 0; k < (n / 32 + 1) * 32; ++k) {
        // Whole blocks of 32 on the diagonal are multiplied, so both their triangles count half.
        const float value = from.at[n * from.stride + k] * (n / 32 == k / 32 ? 0.5f : 1.0f);
        const uint16_t rounded = bfloat(value);
        tiles[place(n / 32, n % 32 / 16, k / 32)][n % 16 * 32 + k % 32] = rounded;
        if (n == k) diagonal[n] = value - widened(rounded);
      }
  }
  static int64_t place(int64_t n, int64_t upper, int64_t k) { return n * (n + 1) + 2 * k + upper; }
  const uint16_t* tile(int64_t n, int64_t upper, int64_t k) const { return tiles[place(n, upper, k)]; }

  const int64_t blocks;
  alignas(64) uint16_t tiles[20][512];
  float diagonal[kSize];
};

// Tiles 0-3: sums; 4, 5: H; 6, 7: errors.
struct ProductScope : TileScope {
  ProductScope() : TileScope(16) {}
};

// Errors of two neighbouring channels as pairs of bfloat16.
inline void keep_pairs(Panel& panel, int half, int64_t n, Floats first, Floats second) {
  const Words low = ((Words)first + 0x8000u) >> 16, high = ((Words)second + 0x8000u) & 0xffff0000u;
  *reinterpret_cast<Words*>(panel.pairs[half][n / 2]) = low | high;
}

inline void add_quadratic(Panel& panel, const Block& block, int64_t, Floats* loss) {
  settle();
  for (int64_t n = 0; n < block.blocks; ++n) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k <= n; ++k) {
      _tile_loadd(4, block.tile(n, 0, k), 64);
      _tile_loadd(5, block.tile(n, 1, k), 64);
      _tile_loadd(6, panel.pairs[0][16 * k], 64);
      _tile_loadd(7, panel.pairs[1][16 * k], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float(*sums)[kHalves][kLanes][kLanes] = panel.sums[n % 2];  // two buffers: stores need not wait for loads
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
    settle();
    for (int half = 0; half < kHalves; ++half)
      for (int64_t i = 0; i < 32; ++i) {
        const Floats error = load(&panel.error[32 * n + i][half * kLanes]);
        const Floats sum = fused(error, all(block.diagonal[32 * n + i]), load(sums[i / 16][half][i % 16]));
        loss[half] = fused(error, sum, loss[half]);
      }
  }
}

#else

constexpr int kColumns = 8;  // channels whose sums are made together

// H' in strips of eight channels n.
struct Block {
  Block(const Rows& from, int64_t size) {
    for (int64_t n = 0; n < size; ++n)
      for (int64_t k = 0; k < size; ++k)
        values[n / kColumns][k][n % kColumns] = k > n ? 0.0f : from.at[n * from.stride + k] * (k == n ? 0.5f : 1.0f);
  }
  alignas(64) float values[kSize / kColumns][kSize][kColumns];
};

struct ProductScope {
  ProductScope() {}
};

inline void keep_pairs(Panel&, int, int64_t, Floats, Floats) {}

inline void add_quadratic(Panel& panel, const Block& block, int64_t size, Floats* loss) {
  for (int half = 0; half < kHalves; ++half)
    for (int64_t n = 0; n < size; n += kColumns) {
      Floats sums[kColumns] = {};
      for (int64_t k = 0; k < n + kColumns; ++k) {
        const Floats error = load(&panel.error[k][half * kLanes]);
        for (int i = 0; i < kColumns; ++i) sums[i] = fused(error, all(block.values[n / kColumns][k][i]), sums[i]);
      }
      for (int i = 0; i < kColumns; ++i)
        loss[half] = fused(load(&panel.error[n + i][half * kLanes]), sums[i], loss[half]);
    }
}

#endif
