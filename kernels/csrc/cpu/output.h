// Memory that a thread keeps, and the way out of sums.

namespace {

struct Scratch {
  uint8_t* at = nullptr;
  size_t size = 0;
  uint8_t* of(size_t wanted) {
    if (wanted > size) {
      std::free(at);
      size = (wanted + 4095) / 4096 * 4096;
      at = static_cast<uint8_t*>(std::aligned_alloc(4096, size));
    }
    return at;
  }
  ~Scratch() { std::free(at); }
};
thread_local Scratch packed_x, thread_scratch;

// Sums of 16 rows of weights by 16 columns of x, to out (columns, stride).
struct Output {
  void* at;
  int64_t type, stride, rows, columns;  // rows of the weight, columns of x
  const float* bias;                    // of `rows`, or null

  void store(const float* sums, int64_t row, int64_t column) const {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + 16 * i);
    transpose(r);
    const int64_t count = std::min<int64_t>(16, columns - column);
    for (int i = 0; i < count; ++i) put(_mm512_castsi512_ps(r[i]), row, column + i);
  }

  void put(__m512 values, int64_t row, int64_t column) const {
    const __mmask16 mask = rows - row >= 16 ? 0xffff : __mmask16((1u << (rows - row)) - 1);
    if (bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, bias + row));
    if (type == kFloat) {
      _mm512_mask_storeu_ps(static_cast<float*>(at) + column * stride + row, mask, values);
    } else {
      const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(at) + column * stride + row, mask, half);
    }
  }
};

}  // namespace
