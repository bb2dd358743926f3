// Between packed weights and records: from the canonical layout (kernels/weight.py) when a weight is loaded, and to
// plain numbers where a matrix product of the vendor's is faster.
#include "fragments.cuh"

// Type of `dense`'s output is TYPE; one warp writes one record's 16 x 128 numbers.
constexpr int WORDS = WEIGHT_BYTES / 4, RECORD_WARPS = 4, DENSE_STRIDE = UNIT_CHANNELS * 2 + 16;

__device__ __forceinline__ u32 packed_value(const u32* row, int channel) {
  int word = channel * BITS / 32, shift = channel * BITS % 32;
  u32 bits = row[word] >> shift;
  if (shift + BITS > 32) bits |= row[word + 1] << (32 - shift);
  return bits & ((1u << BITS) - 1);
}

// The weight of a lane's k-step `step` of half `half`, pair `pair`, number `odd` of the pair.
__device__ __forceinline__ u32 weight_of(const u32* packed, int words, int tile, int unit, int half, int lane, int step,
                                         int pair, int odd, int rows, int channels) {
  int row = tile * TILE_ROWS + lane / 4 + 8 * (pair & 1);
  int channel = unit * UNIT_CHANNELS + half * 64 + step * 16 + lane % 4 * 2 + 8 * (pair >> 1) + odd;
  return row < rows && channel < channels ? packed_value(packed + u64(row) * words, channel) : 0;
}

__device__ __forceinline__ u32 record_word(const u32* packed, int words, int tile, int unit, int index, int rows,
                                           int channels) {
  u32 result = 0;
#if BITS == 4
  int half = index / 128, lane = index / 4 % 32, step = index % 4;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    result |= weight_of(packed, words, tile, unit, half, lane, step, i / 2, i % 2, rows, channels)
              << (4 * (i / 2) + 16 * (i % 2));
#elif BITS == 8
  int half = index / 256, word = index / 128 % 2 * 4 + index % 4, lane = index / 4 % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    result |= weight_of(packed, words, tile, unit, half, lane, word / 2, word % 2 * 2 + i / 2, i % 2, rows, channels)
              << (16 * (i / 2) + 8 * (i % 2));
#else
  if (index < 128) {
    int half = index / 64, lane = index / 2 % 32, word = index % 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      int step = word * 2 + i / 8, pair = i / 2 % 4, odd = i % 2;
      result |= (weight_of(packed, words, tile, unit, half, lane, step, pair, odd, rows, channels) & 3)
                << (8 * (step % 2) + 2 * pair + 16 * odd);
    }
  } else {
    int half = (index - 128) / 32, lane = index % 32;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      int step = i / 8, pair = i / 2 % 4, odd = i % 2;
      int place = step < 2 || pair < 3 ? 2 * pair + 2 + step % 2 + step / 2 * 8 : step % 2;
      result |= (weight_of(packed, words, tile, unit, half, lane, step, pair, odd, rows, channels) >> 2)
                << (place + 16 * odd);
    }
  }
#endif
  return result;
}

// One block makes one record. `groups` and `group_size` are the canonical weight's.
extern "C" __global__ void __launch_bounds__(128)
make_records(const u32* packed, const void* scales, const u8* zeros, u8* records, int rows, int channels, int words,
             int groups, int group_size) {
  int tile = blockIdx.x, unit = blockIdx.y;
  u8* record = records + (u64(unit) * gridDim.x + tile) * RECORD_BYTES;
  for (int i = threadIdx.x; i < WORDS; i += blockDim.x)
    reinterpret_cast<u32*>(record)[i] = record_word(packed, words, tile, unit, i, rows, channels);
  for (int i = threadIdx.x; i < GROUPS_PER_UNIT * TILE_ROWS; i += blockDim.x) {
    int place = i % TILE_ROWS, row = tile * TILE_ROWS + place / 2 + place % 2 * 8;
    int channel = unit * UNIT_CHANNELS + i / TILE_ROWS * GROUP;
    bool inside = row < rows && channel < channels;
    u64 source = inside ? u64(row) * groups + channel / group_size : 0;
#if SCALE_TYPE == 2
    reinterpret_cast<u32*>(record + SCALES_AT)[i] = inside ? static_cast<const u32*>(scales)[source] : 0;
#else
    reinterpret_cast<u16*>(record + SCALES_AT)[i] = inside ? static_cast<const u16*>(scales)[source] : 0;
#endif
#if ASYMMETRIC
    record[ZEROS_AT + i] = inside ? zeros[source] : 0;
#endif
  }
}

// Records to (rows, channels) in TYPE: (q - zero) * scale, rounded once.
extern "C" __global__ void __launch_bounds__(RECORD_WARPS * 32)
dense(const u8* records, u16* output, int rows, int channels, int tiles) {
  __shared__ __align__(16) u8 staged[RECORD_WARPS][RECORD_BYTES + TILE_ROWS * DENSE_STRIDE];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int tile = blockIdx.x * RECORD_WARPS + warp, unit = blockIdx.y;
  if (tile >= tiles) return;
  const u8* source = records + (u64(unit) * tiles + tile) * RECORD_BYTES;
  u32 record = shared_address(staged[warp]), plain = record + RECORD_BYTES;
  for (int i = lane; i < RECORD_BYTES / 16; i += 32) copy16(record + i * 16, source + i * 16, 16);
  copy_commit();
  copy_wait<0>();
  __syncwarp();
  Scales scales;
  Zeros zeros;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 words[BITS];
    load_words(words, record, half, lane);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      int channel = half * 64 + step * 16;
      if (channel % GROUP == 0) {
        scales.set(record + SCALES_AT + channel / GROUP * TILE_ROWS * SCALE_BYTES, lane / 4);
        zeros.set(record + ZEROS_AT + channel / GROUP * TILE_ROWS, lane / 4);
      }
      u32 a[4];
      unpack_fragment(a, words, step, zeros);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float scale = i & 1 ? scales.high : scales.low;
        u32 both = Number::narrow2(Number::widen(u16(a[i])) * scale, Number::widen(u16(a[i] >> 16)) * scale);
        u32 at = plain + (lane / 4 + 8 * (i & 1)) * DENSE_STRIDE + (channel + lane % 4 * 2 + 8 * (i >> 1)) * 2;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(both) : "memory");
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int row = i * 2 + lane / 16, channel = unit * UNIT_CHANNELS + lane % 16 * 8, global_row = tile * TILE_ROWS + row;
    uint4 v = load_shared16(plain + row * DENSE_STRIDE + lane % 16 * 16);
    if (global_row < rows && channel < channels)
      *reinterpret_cast<uint4*>(output + u64(global_row) * channels + channel) = v;
  }
}
