// Packs, unpacks and dequantizes integers of BITS bits that lie densely in 32-bit words (kernels/layouts.py).
//
// A line is one stream of values: a row of the canonical layout, a column of GPTQ's. Lines and words have strides of
// their own, and `by_line` says which of the two neighbouring threads walk along, so that accesses coalesce.
// ORDER holds, nibble by nibble, which value of eight lies at each place of a word (AutoAWQ interleaves).
#include "ptx.cuh"

#ifndef BITS
#define BITS 4
#endif
#ifndef ORDER
#define ORDER 0x76543210u
#endif
// Code type of dequantize's scales and output: 0 float16, 1 bfloat16, 2 float32.
#ifndef SCALE_TYPE
#define SCALE_TYPE 0
#endif
#ifndef OUTPUT_TYPE
#define OUTPUT_TYPE 0
#endif

struct Place {
  int line, word;
};

__device__ __forceinline__ Place place_of(u64 index, int lines, int words, int by_line) {
  return by_line ? Place{int(index % lines), int(index / lines)} : Place{int(index / words), int(index % words)};
}

__device__ __forceinline__ int source_of(int value) { return (value & ~7) | ((ORDER >> (4 * (value & 7))) & 7); }

extern "C" __global__ void __launch_bounds__(256)
pack(const u8* values, u32* packed, int lines, int count, int words, int line_step, int value_step, int packed_line_step,
     int word_step, int by_line) {
  u64 index = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= u64(lines) * words) return;
  Place at = place_of(index, lines, words, by_line);
  const u8* line = values + u64(at.line) * line_step;
  int first_bit = at.word * 32;
  u32 result = 0;
  for (int value = first_bit / BITS; value * BITS < first_bit + 32 && value < count; ++value) {
    u32 bits = line[u64(source_of(value)) * value_step];
    int shift = value * BITS - first_bit;
    result |= shift >= 0 ? bits << shift : bits >> -shift;
  }
  packed[u64(at.line) * packed_line_step + u64(at.word) * word_step] = result;
}

__device__ __forceinline__ u32 value_at(const u32* line, int value, int word_step) {
  int word = value * BITS / 32, shift = value * BITS % 32;
  u32 bits = line[u64(word) * word_step] >> shift;
  if (shift + BITS > 32) bits |= line[u64(word + 1) * word_step] << (32 - shift);
  return bits & ((1u << BITS) - 1);
}

extern "C" __global__ void __launch_bounds__(256)
unpack(const u32* packed, u8* values, int lines, int count, int line_step, int value_step, int packed_line_step,
       int word_step, int by_line) {
  u64 index = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= u64(lines) * count) return;
  Place at = place_of(index, lines, count, by_line);
  u32 bits = value_at(packed + u64(at.line) * packed_line_step, at.word, word_step);
  values[u64(at.line) * line_step + u64(source_of(at.word)) * value_step] = u8(bits);
}

__device__ __forceinline__ float scale_at(const void* scales, u64 index) {
#if SCALE_TYPE == 0
  return Half::widen(static_cast<const u16*>(scales)[index]);
#elif SCALE_TYPE == 1
  return Bfloat::widen(static_cast<const u16*>(scales)[index]);
#else
  return static_cast<const float*>(scales)[index];
#endif
}

// The canonical layout only: line = output row. Eight values for each thread, so that its stores are 16 bytes wide.
extern "C" __global__ void __launch_bounds__(256)
dequantize(const u32* packed, const void* scales, const u8* zeros, void* output, int lines, int count, int words,
           int groups, int group_size) {
  u64 index = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  int chunks = (count + 7) / 8 * 8;
  if (index >= u64(lines) * chunks) return;
  int line = int(index / chunks), first = int(index % chunks);
  float results[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int value = min(first + i, count - 1);
    u64 group = u64(line) * groups + value / group_size;
    float zero = zeros ? float(zeros[group]) : float(1 << (BITS - 1));
    results[i] = (float(value_at(packed + u64(line) * words, value, 1)) - zero) * scale_at(scales, group);
  }
  u64 at = u64(line) * count + first;
#if OUTPUT_TYPE == 2
  for (int i = 0; i < 8 && first + i < count; ++i) static_cast<float*>(output)[at + i] = results[i];
#else
#if OUTPUT_TYPE == 0
  using Number = Half;
#else
  using Number = Bfloat;
#endif
  if (count % 8 == 0) {
    uint4 line16 = {Number::narrow2(results[0], results[1]), Number::narrow2(results[2], results[3]),
                    Number::narrow2(results[4], results[5]), Number::narrow2(results[6], results[7])};
    *reinterpret_cast<uint4*>(static_cast<u16*>(output) + at) = line16;
  } else {
    for (int i = 0; i < 8 && first + i < count; ++i) static_cast<u16*>(output)[at + i] = Number::narrow(results[i]);
  }
#endif
}
