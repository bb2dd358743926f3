// From packed words to the left operand of mma.m16n8k16, and the record that they come from.
//
// A record holds 16 output rows by 128 input channels: the weights of two halves of 64 channels, then per group of
// channels 16 scales, then per group 16 zero points. kernels/cuda/layout.py writes it and says which bit is which
// weight; tests/unit/kernels/test_cuda_layout.py follows the data through this file's arithmetic in Python.
#pragma once
#include "ptx.cuh"

#ifndef BITS
#define BITS 4
#endif
#ifndef ASYMMETRIC
#define ASYMMETRIC 0
#endif
#ifndef GROUP
#define GROUP 128
#endif
// Types of the activations and of the scales: 0 float16, 1 bfloat16, 2 float32 (scales only).
#ifndef TYPE
#define TYPE 1
#endif
#ifndef SCALE_TYPE
#define SCALE_TYPE TYPE
#endif

#if TYPE == 0
using Number = Half;
#else
using Number = Bfloat;
#endif

constexpr int TILE_ROWS = 16, UNIT_CHANNELS = 128, GROUPS_PER_UNIT = UNIT_CHANNELS / GROUP;
constexpr int SCALE_BYTES = SCALE_TYPE == 2 ? 4 : 2;
constexpr int WEIGHT_BYTES = TILE_ROWS * UNIT_CHANNELS * BITS / 8;
constexpr int SCALES_AT = WEIGHT_BYTES, ZEROS_AT = SCALES_AT + GROUPS_PER_UNIT * TILE_ROWS * SCALE_BYTES;
constexpr int RECORD_BYTES = ZEROS_AT + (ASYMMETRIC ? GROUPS_PER_UNIT * TILE_ROWS : 0);
constexpr int SYMMETRIC_ZERO = 1 << (BITS - 1);

// The bits of a small integer as float16 (below 2048) or bfloat16 (below 256), and those of a power of two.
__host__ __device__ constexpr u32 float_bits(int n, int mantissa, int bias) {
  if (n == 0) return 0;
  int exponent = 0;
  while ((n >> exponent) > 1) ++exponent;
  return u32((exponent + bias) << mantissa) | (u32(n << mantissa >> exponent) & ((1u << mantissa) - 1));
}
__host__ __device__ constexpr u32 pair_of(int n) {
  u32 bits = TYPE == 0 ? float_bits(n, 10, 15) : float_bits(n, 7, 127);
  return bits | bits << 16;
}
constexpr u32 NEGATIVE = 0x80008000u;
__host__ __device__ constexpr u32 pair_of_power(int exponent) {
  u32 bits = TYPE == 0 ? u32((exponent + 15) << 10) : u32((exponent + 127) << 7);
  return bits | bits << 16;
}
// An integer or-ed into the low mantissa bits of MAGIC adds itself to MAGIC_VALUE.
constexpr int MAGIC_VALUE = TYPE == 0 ? 1024 : 128;
constexpr u32 MAGIC = TYPE == 0 ? 0x64006400u : 0x43004300u;
constexpr u32 MAGIC_BYTES = TYPE == 0 ? 0x64646464u : 0x43434343u;

// Zero points of a lane's two rows, as pairs ready to subtract.
struct Zeros {
#if ASYMMETRIC
  u32 magic[2];  // MAGIC_VALUE + zero
  u32 bytes;
#endif
  __device__ __forceinline__ void set(u32 address, int row) {
#if ASYMMETRIC
    bytes = load_shared2(address + row * 2);
    magic[0] = permute_bytes(bytes, MAGIC_BYTES, 0x4040);
    magic[1] = permute_bytes(bytes, MAGIC_BYTES, 0x4141);
#endif
  }
  __device__ __forceinline__ u32 with_magic(int row) const {
#if ASYMMETRIC
    return magic[row];
#else
    return pair_of(MAGIC_VALUE + SYMMETRIC_ZERO);
#endif
  }
  // -(MAGIC_VALUE / 2^shift + zero)
  __device__ __forceinline__ u32 negative(int row, int shift) const {
#if ASYMMETRIC
    return Number::sub2(pair_of(MAGIC_VALUE - (MAGIC_VALUE >> shift)), magic[row]);
#else
    return pair_of((MAGIC_VALUE >> shift) + SYMMETRIC_ZERO) ^ NEGATIVE;
#endif
  }
  __device__ __forceinline__ float in_float(int row) const {
#if ASYMMETRIC
    return __uint_as_float(permute_bytes(bytes, 0x4b000000u, row ? 0x7541 : 0x7540));
#else
    return __uint_as_float(0x4b000000u | SYMMETRIC_ZERO);
#endif
  }
};

// Scales of a lane's two rows.
struct Scales {
  float low, high;
  __device__ __forceinline__ void set(u32 address, int row) {
#if SCALE_TYPE == 2
    uint2 both = load_shared8(address + row * 8);
    low = __uint_as_float(both.x);
    high = __uint_as_float(both.y);
#else
    u32 both = load_shared4(address + row * 4);
#if SCALE_TYPE == 0
    low = Half::widen(u16(both));
    high = Half::widen(u16(both >> 16));
#else
    low = __uint_as_float(both << 16);
    high = __uint_as_float(both & 0xffff0000u);
#endif
#endif
  }
};

// A lane's words of one half (64 channels) of a record in shared memory.
__device__ __forceinline__ void load_words(u32 (&w)[BITS], u32 record, int half, int lane) {
#if BITS == 4
  uint4 v = load_shared16(record + (half * 32 + lane) * 16);
  w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
#elif BITS == 8
  uint4 v = load_shared16(record + (half * 64 + lane) * 16), u = load_shared16(record + (half * 64 + 32 + lane) * 16);
  w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w, w[4] = u.x, w[5] = u.y, w[6] = u.z, w[7] = u.w;
#else
  uint2 v = load_shared8(record + (half * 32 + lane) * 8);
  w[0] = v.x, w[1] = v.y;
#if BITS == 3
  w[2] = load_shared4(record + 512 + (half * 32 + lane) * 4);
#endif
#endif
}

// The fragment of k-step `step` (0..3) of a half: q - zero, exactly.
__device__ __forceinline__ void unpack_fragment(u32 (&a)[4], const u32 (&w)[BITS], int step, const Zeros& zeros) {
#if BITS == 4 && TYPE == 0
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    u32 word = pair ? w[step] >> 8 : w[step];
    a[pair] = Number::sub2(and_or(word, 0x000f000fu, MAGIC), zeros.with_magic(0));
    a[pair + 1] = Number::fma2(and_or(word, 0x00f000f0u, MAGIC), pair_of_power(-4), zeros.negative(1, 4));
  }
#elif BITS == 4
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = Number::sub2(and_or(w[step] >> (4 * i), 0x000f000fu, MAGIC), zeros.with_magic(i & 1));
#elif BITS == 8 && TYPE == 0
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 pair = permute_bytes(w[2 * step + (i >> 1)], MAGIC_BYTES, i & 1 ? 0x4342 : 0x4140);
    a[i] = Number::sub2(pair, zeros.with_magic(i & 1));
  }
#elif BITS == 8
  // 255 has more bits than bfloat16's mantissa beside a magic number: through float32, where 2^23 is one.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 word = w[2 * step + (i >> 1)], first = i & 1 ? 0x7542 : 0x7540;
    float low = __uint_as_float(permute_bytes(word, 0x4b000000u, first)) - zeros.in_float(i & 1);
    float high = __uint_as_float(permute_bytes(word, 0x4b000000u, first + 1)) - zeros.in_float(i & 1);
    a[i] = Number::narrow2(low, high);
  }
#else
  u32 low = w[step >> 1] >> (8 * (step & 1));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // bfloat16's mantissa holds three pairs at their places; the fourth is shifted to the first place.
    int away = TYPE == 1 && i == 3 ? 6 : 0, place = 2 * i - away;
    u32 v = and_or(low >> away, 0x00030003u << place, MAGIC);
#if BITS == 3
    // The third bit of pair i lies at 2i+2 of `w[2]`, shifted right by 0, 1, 8 or 9 with the step; the last one of
    // steps 2 and 3 would cross into the other half of the word and lies at bit 0 or 1 instead.
    int right = (step & 1) + (step & 2 ? 8 : 0) + away;
    u32 high = step >= 2 && i == 3 ? w[2] << (8 - (step & 1) - away) : w[2] >> right;
    v = and_or(high, 0x00040004u << place, v);
#endif
    a[i] = Number::fma2(v, pair_of_power(-place), zeros.negative(i & 1, place));
  }
#endif
}
