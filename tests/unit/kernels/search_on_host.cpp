// The clip step's own CUDA source on the host: a thread for each thread of a block, a barrier for __syncthreads.
// test_search_cuda_source.py writes search_source.inc (the source without its two asm statements) and compiles this.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(count)
typedef uint16_t u16;
typedef uint32_t u32;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x; };

static inline float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline u32 __float_as_uint(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
static inline float __int_as_float(int bits) { return __uint_as_float(bits); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fadd_rn(float a, float b) { volatile float sum = a + b; return sum; }
static inline float __fsub_rn(float a, float b) { volatile float difference = a - b; return difference; }
using std::max;

struct Half {
  static float widen(u16 bits) { _Float16 half; memcpy(&half, &bits, 2); return half; }
  static u16 narrow(float f) { _Float16 half = f; u16 bits; memcpy(&bits, &half, 2); return bits; }
};
struct Bfloat {
  static float widen(u16 bits) { return __uint_as_float(u32(bits) << 16); }
  static u16 narrow(float f) { u32 bits = __float_as_uint(f); return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; }
};

// Lanes exchange values by atomics that order nothing else: what they share without a barrier shows as a race.
struct Warp {
  std::atomic<u32> slots[32][8];
  std::atomic<int> arrived{0}, turn{0};

  void meet() {
    const int now = turn.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_relaxed) == 31) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_relaxed);
    } else {
      while (turn.load(std::memory_order_relaxed) == now) std::this_thread::yield();
    }
  }
};

static thread_local Index threadIdx, blockIdx, blockDim;
static thread_local Warp* warp;
static thread_local float4* shared_memory;
static thread_local std::barrier<>* block_barrier;

static inline unsigned lane_of() { return threadIdx.x % 32; }
static inline void __syncthreads() { block_barrier->arrive_and_wait(); }
static inline void __syncwarp() {
  warp->slots[lane_of()][7].store(1, std::memory_order_release);
  warp->meet();
  for (auto& slots : warp->slots) slots[7].load(std::memory_order_acquire);
  warp->meet();
}
static inline float __shfl_xor_sync(u32, float value, int step) {
  warp->slots[lane_of()][0].store(__float_as_uint(value), std::memory_order_relaxed);
  warp->meet();
  const float other = __uint_as_float(warp->slots[lane_of() ^ step][0].load(std::memory_order_relaxed));
  warp->meet();
  return other;
}

static inline float cut(u32 bits) { return __uint_as_float(bits & ~0x1fffu); }  // as the matrix units read tf32
static inline float rounded(float f) { return cut(__float_as_uint(f) + 0x1000u); }

// m16n8k8 in the layout of PTX: lane (g = lane / 4, t = lane % 4) holds A (g | g + 8, t | t + 4), B (t | t + 4, g),
// and of the sums (g | g + 8, 2 t | 2 t + 1).
static inline void mma(float4& sum, const float4& a, float2 b) {
  const float mine[6] = {a.x, a.z, a.y, a.w, b.x, b.y};
  for (int i = 0; i < 6; ++i) warp->slots[lane_of()][i].store(__float_as_uint(mine[i]), std::memory_order_relaxed);
  warp->meet();
  const auto held = [](int lane, int i) { return cut(warp->slots[lane][i].load(std::memory_order_relaxed)); };
  float* sums[4] = {&sum.x, &sum.y, &sum.z, &sum.w};
  for (int i = 0; i < 4; ++i) {
    const int row = lane_of() / 4, upper = i / 2, column = 2 * (lane_of() % 4) + i % 2;
    double total = *sums[i];
    for (int k = 0; k < 8; ++k)
      total += double(held(row * 4 + k % 4, upper + 2 * (k / 4))) * held(column * 4 + k % 4, 4 + k / 4);
    *sums[i] = float(total);
  }
  warp->meet();
}

#include "search_source.inc"

struct Step {
  const float* weight;
  int weight_stride;
  const float* block;
  int block_stride;
  const float* others;
  int others_stride;
  float* error;
  int error_stride;
  float* ranges;
  int ranges_stride;
  const float* factors;
  int joint, side, rows, steps, symmetric, scale_type;
  float two_steps;
};

extern "C" void run(int size, int warps, const Step* s) {
  const auto kernel = size == 32 ? clip_step_32 : size == 64 ? clip_step_64 : clip_step_128;
  for (unsigned block = 0; block * 16 * warps < unsigned(s->rows); ++block) {
    std::barrier<> all(32 * warps);
    std::vector<Warp> exchanges(warps);
    const float nan = std::nanf("");
    std::vector<float4> memory(size * (size + PAD) / 4 + warps * 4 * size, float4{nan, nan, nan, nan});
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < unsigned(32 * warps); ++thread)
      threads.emplace_back([&, thread] {
        threadIdx = {thread}, blockIdx = {block}, blockDim = {unsigned(32 * warps)};
        warp = &exchanges[thread / 32], shared_memory = memory.data(), block_barrier = &all;
        kernel(s->weight, s->weight_stride, s->block, s->block_stride, s->others, s->others_stride, s->error,
               s->error_stride, s->ranges, s->ranges_stride, s->factors, s->joint, s->side, s->rows, s->steps,
               s->symmetric, s->scale_type, s->two_steps);
      });
    for (auto& each : threads) each.join();
  }
}

// For the sanitizer: size, rows, warps.
int main(int, char** words) {
  const int size = atoi(words[1]), rows = atoi(words[2]), warps = atoi(words[3]);
  std::mt19937 bits(1);
  std::normal_distribution<float> normal;
  std::vector<float> weight(rows * size), block(size * size), others(rows * size), error(rows * size);
  for (auto* values : {&weight, &block, &others})
    for (float& value : *values) value = normal(bits);
  std::vector<float> ranges(4 * rows, 1.0f), factors{0.9f, 0.7f, 1.1f, 0.9f};
  const Step step{weight.data(), size, block.data(), size, others.data(), size, error.data(), size,
                  ranges.data(), rows, factors.data(), 2, 2, rows, 3, 0, 0, 2.0f / 3};
  run(size, warps, &step);
  return 0;
}
