// Common to all kernels with 512-bit registers: transposing, and with AMX the shapes of tiles.

#pragma once

namespace {

// 16 rows of 16 words of 32 bits, transposed.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

#ifdef NIBBLE_AMX

constexpr int kFeature = 18;         // XFEATURE_XTILEDATA
constexpr int kPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM

// GCC's tile instructions don't tell the compiler what memory they read: what was written must be written by now.
inline void settle() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};

// Other libraries keep shapes for this thread and may rely on them: they are put back.
class TileScope {
 public:
  // Tiles 0-3: sums, 4-5: weights, 6-7: x with `columns` columns.
  explicit TileScope(int columns) {
    _tile_storeconfig(&before_);
    settle();
    TileShapes shapes{};
    shapes.palette = 1;
    for (int t = 0; t < 8; ++t) {
      shapes.rows[t] = 16;
      shapes.bytes[t] = uint16_t(t == 4 || t == 5 ? 64 : 4 * columns);
    }
    settle();
    _tile_loadconfig(&shapes);
  }
  ~TileScope() {
    settle();
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileShapes before_;
};

#endif

}  // namespace
