// Inner steps of the search for scales and ranges: kernels/search/operators.py says what they compute.

#include "ptx.cuh"

#define INFINITE __int_as_float(0x7f800000)

enum ScaleType { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

// How a range becomes a grid (kernels/search/grids.py).
struct Rule {
  int steps;       // the largest integer
  int symmetric;
  int scale_type;
  float two_steps; // 2 / steps
};

struct Grid {
  float scale, zero;
};

__device__ __forceinline__ float stored_scale(float scale, int type) {
  scale = Half::widen(Half::narrow(fminf(scale, 65280.0f)));
  if (type == BFLOAT16) scale = Bfloat::widen(Bfloat::narrow(scale));
  return scale > 0.0f ? scale : 1.0f;
}

// low <= 0 <= high but for symmetric grids, where the larger size counts.
__device__ __forceinline__ Grid fit(float low, float high, const Rule& rule) {
  if (rule.symmetric) {
    float size = fmaxf(fabsf(low), fabsf(high));
    return {stored_scale(__fmul_rn(size, rule.two_steps), rule.scale_type), float((rule.steps + 1) / 2)};
  }
  low = fminf(low, 0.0f);
  high = fmaxf(high, 0.0f);
  float scale = stored_scale(__fdiv_rn(__fsub_rn(high, low), float(rule.steps)), rule.scale_type);
  float zero = fminf(fmaxf(rintf(__fdiv_rn(-low, scale)), 0.0f), float(rule.steps));
  return {scale, zero};
}

__device__ __forceinline__ float nearest(float value, const Grid& grid, const Rule& rule) {
  float step = rintf(__fdiv_rn(value, grid.scale));
  return __fmul_rn(fminf(fmaxf(step, -grid.zero), float(rule.steps) - grid.zero), grid.scale);
}

__device__ __forceinline__ float as_error(float value, float*) { return value; }
__device__ __forceinline__ u16 as_error(float value, u16*) { return Bfloat::narrow(value); }

// One warp rounds one group of one row for one candidate.
template <int SIZE, typename Error>
__device__ void rounding_errors(const float* weight, const float* scales, Error* errors, int candidates,
                                int rows, int channels, float range_factor, const Rule& rule) {
  constexpr int PER_LANE = SIZE / 32;
  const int lane = threadIdx.x % 32;
  const long groups = channels / SIZE;
  const long warp = (long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= groups * rows * candidates) return;
  const long group = warp % groups, row = warp / groups % rows, candidate = warp / groups / rows;
  const long channel = group * SIZE + lane * PER_LANE;
  float w[PER_LANE], s[PER_LANE];
  float low = INFINITE, high = -INFINITE;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    w[i] = weight[row * channels + channel + i];
    s[i] = scales[candidate * channels + channel + i];
    const float scaled = __fmul_rn(w[i], s[i]);
    low = fminf(low, scaled);
    high = fmaxf(high, scaled);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) {
    low = fminf(low, __shfl_xor_sync(~0u, low, step));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
  }
  const Grid grid = fit(__fmul_rn(low, range_factor), __fmul_rn(high, range_factor), rule);
  Error* out = errors + (candidate * rows + row) * channels + channel;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const float rounded = nearest(__fmul_rn(w[i], s[i]), grid, rule);
    out[i] = as_error(__fsub_rn(__fdiv_rn(rounded, s[i]), w[i]), out);
  }
}

#define ROUNDING_ERRORS(SIZE, NAME, TYPE)                                                              \
  extern "C" __global__ void rounding_errors_##SIZE##_##NAME(                                          \
      const float* weight, const float* scales, TYPE* errors, int candidates, int rows, int channels,  \
      float range_factor, int steps, int symmetric, int scale_type, float two_steps) {                 \
    rounding_errors<SIZE, TYPE>(weight, scales, errors, candidates, rows, channels, range_factor,      \
                                {steps, symmetric, scale_type, two_steps});                            \
  }

ROUNDING_ERRORS(32, float, float)
ROUNDING_ERRORS(64, float, float)
ROUNDING_ERRORS(128, float, float)
ROUNDING_ERRORS(32, bfloat16, u16)
ROUNDING_ERRORS(64, bfloat16, u16)
ROUNDING_ERRORS(128, bfloat16, u16)

// total[row] += sum over columns of left * right: one warp a row, columns in pairs.
__device__ __forceinline__ float2 pair_at(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 pair_at(const u16* from) {
  const u32 both = *reinterpret_cast<const u32*>(from);
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

template <typename Value>
__device__ void row_dots(const Value* left, long left_stride, const Value* right, long right_stride,
                         float* total, int rows, int columns) {
  const long row = (long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int column = threadIdx.x % 32 * 2; column < columns; column += 64) {
    const float2 a = pair_at(left + row * left_stride + column), b = pair_at(right + row * right_stride + column);
    sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
  }
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) total[row] += sum;
}

extern "C" __global__ void row_dots_float(const float* left, int left_stride, const float* right,
                                          int right_stride, float* total, int rows, int columns) {
  row_dots(left, left_stride, right, right_stride, total, rows, columns);
}

extern "C" __global__ void row_dots_bfloat16(const u16* left, int left_stride, const u16* right,
                                             int right_stride, float* total, int rows, int columns) {
  row_dots(left, left_stride, right, right_stride, total, rows, columns);
}

// --- the clip step
//
// One warp holds 16 rows. The products run on the matrix units in tf32, m16n8k8. H is symmetric, so of
// e H e^T only blocks of 8 on and above the diagonal are multiplied, the diagonal ones with half of H:
// e H e^T / 2 + e o^T = sum over n of e_n (o_n + sum over k <= n of e_k H'_kn).
//
// Lane (row = lane / 4, pair = lane % 4) holds columns 8 j + 2 pair and the next, of rows `row` and
// `row + 8`: the layout of the accumulator. An A fragment wants columns `pair` and `pair + 4`; the order of
// the inner index is free, so its two columns are named 2 pair and 2 pair + 1 in A and in B.

constexpr int PAD = 8;  // floats between rows of H in shared memory: eight rows then meet no bank twice

__device__ __forceinline__ void multiply(float4& sum, const float4& a, float2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(__float_as_uint(a.x)), "r"(__float_as_uint(a.z)), "r"(__float_as_uint(a.y)),
        "r"(__float_as_uint(a.w)), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

__device__ __forceinline__ float tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// Two columns of the first row, then of the second, for every block of 8 columns.
template <int SIZE>
using Tile = float4[SIZE / 8];

__device__ __forceinline__ float2 two(const float* from, long stride, long row, int rows, int column) {
  return row < rows ? *reinterpret_cast<const float2*>(from + row * stride + column) : float2{0.0f, 0.0f};
}

__device__ __forceinline__ float4 four(const float* from, long stride, long row, int rows, int column) {
  const float2 first = two(from, stride, row, rows, column), second = two(from, stride, row + 8, rows, column);
  return {first.x, first.y, second.x, second.y};
}

// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, faster than the instruction for it.
__device__ __forceinline__ float error_of(float weight, const Grid& grid, float inverse, int steps) {
  const float inside = fminf(fmaxf(weight * inverse, -grid.zero), float(steps) - grid.zero);
  return fmaf(__fsub_rn(__fadd_rn(inside, 12582912.0f), 12582912.0f), grid.scale, -weight);
}

// Half the losses of both rows on their grids. `others` and `moment` lie in shared memory.
template <int SIZE>
__device__ __forceinline__ float2 half_losses(const Tile<SIZE>& weight, const float4* others,
                                              const float* moment, const Grid (&grid)[2], int steps) {
  constexpr int BLOCKS = SIZE / 8;
  const int lane = threadIdx.x % 32;
  const float* column = moment + (lane / 4) * (SIZE + PAD) + 2 * (lane % 4);
  const float inverse[2] = {1.0f / grid[0].scale, 1.0f / grid[1].scale};
  Tile<SIZE> e;
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    e[j] = {error_of(weight[j].x, grid[0], inverse[0], steps), error_of(weight[j].y, grid[0], inverse[0], steps),
            error_of(weight[j].z, grid[1], inverse[1], steps), error_of(weight[j].w, grid[1], inverse[1], steps)};
  }
  float2 loss = {0.0f, 0.0f};
#pragma unroll
  for (int first = 0; first < BLOCKS; first += 4) {  // four chains of products at a time
    float4 sum[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) sum[n] = others[(first + n) * 32 + lane];
#pragma unroll
    for (int k = 0; k < first + 4; ++k)
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (k <= first + n)
          multiply(sum[n], e[k],
                   *reinterpret_cast<const float2*>(column + (first + n) * 8 * (SIZE + PAD) + 8 * k));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      loss.x += e[first + n].x * sum[n].x + e[first + n].y * sum[n].y;
      loss.y += e[first + n].z * sum[n].z + e[first + n].w * sum[n].w;
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    loss.x += __shfl_xor_sync(~0u, loss.x, step);
    loss.y += __shfl_xor_sync(~0u, loss.y, step);
  }
  return loss;
}

// H of the group as half_losses wants it.
template <int SIZE>
__device__ __forceinline__ void stage(float* moment, const float* block, long stride) {
  for (int at = threadIdx.x; at < SIZE * SIZE / 4; at += blockDim.x) {
    const int n = at / (SIZE / 4), k = at % (SIZE / 4) * 4;
    const float4 value = *reinterpret_cast<const float4*>(block + n * stride + k);
    const float share = n / 8 == k / 8 ? 0.5f : 1.0f;
    *reinterpret_cast<float4*>(moment + n * (SIZE + PAD) + k) = {
        tf32(share * value.x), tf32(share * value.y), tf32(share * value.z), tf32(share * value.w)};
  }
}

// weight, others, error: (rows, SIZE) with row strides; block: (SIZE, SIZE); ranges: (4, rows).
// `factors` holds `joint` and then `side`.
template <int SIZE>
__device__ void clip_step(const float* weight, long weight_stride, const float* block, long block_stride,
                          const float* others, long others_stride, float* error, long error_stride,
                          float* ranges, long ranges_stride, const float* factors, int joint, int side,
                          int rows, const Rule& rule) {
  extern __shared__ float4 shared[];
  float* moment = reinterpret_cast<float*>(shared);
  float4* o = shared + SIZE * (SIZE + PAD) / 4 + threadIdx.x / 32 * SIZE / 8 * 32;
  stage<SIZE>(moment, block, block_stride);
  const int lane = threadIdx.x % 32, pair = lane % 4;
  const long row = ((long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 16 + lane / 4;
  Tile<SIZE> w;
  float low[2] = {0.0f, 0.0f}, high[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < SIZE / 8; ++j) {
    w[j] = four(weight, weight_stride, row, rows, 8 * j + 2 * pair);
    o[j * 32 + lane] = four(others, others_stride, row, rows, 8 * j + 2 * pair);
    low[0] = fminf(low[0], fminf(w[j].x, w[j].y));
    high[0] = fmaxf(high[0], fmaxf(w[j].x, w[j].y));
    low[1] = fminf(low[1], fminf(w[j].z, w[j].w));
    high[1] = fmaxf(high[1], fmaxf(w[j].z, w[j].w));
  }
  __syncthreads();
  // Per row: factors of the best range so far and its loss; the factors that this stage starts from.
  float best[2][2], base[2][2], loss[2] = {INFINITE, INFINITE};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
      low[half] = fminf(low[half], __shfl_xor_sync(~0u, low[half], step));
      high[half] = fmaxf(high[half], __shfl_xor_sync(~0u, high[half], step));
    }
#pragma unroll
    for (int bound = 0; bound < 2; ++bound)
      base[half][bound] = best[half][bound] =
          row + 8 * half < rows ? ranges[bound * ranges_stride + row + 8 * half] : 1.0f;
  }
  const int stages = rule.symmetric ? 1 : 2;  // of one bound
  const int count = 1 + joint + stages * side;
  for (int candidate = 0; candidate < count; ++candidate) {
    const int sided = candidate - 1 - joint;  // from 0 on: one bound moves
    if (sided == 0 || sided == side) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int bound = 0; bound < 2; ++bound) base[half][bound] = best[half][bound];
    }
    const float factor =
        candidate == 0 ? 1.0f : factors[sided < 0 ? candidate - 1 : joint + sided % max(side, 1)];
    const bool moves_low = rule.symmetric || sided < side, moves_high = rule.symmetric || sided < 0 || sided >= side;
    float tried[2][2];
    Grid grid[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tried[half][0] = moves_low ? __fmul_rn(base[half][0], factor) : base[half][0];
      tried[half][1] = moves_high ? __fmul_rn(base[half][1], factor) : base[half][1];
      grid[half] = fit(__fmul_rn(low[half], tried[half][0]), __fmul_rn(high[half], tried[half][1]), rule);
    }
    const float2 found = half_losses<SIZE>(w, o, moment, grid, rule.steps);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float value = half ? found.y : found.x;
      if (value < loss[half]) {
        loss[half] = value;
        best[half][0] = tried[half][0];
        best[half][1] = tried[half][1];
      }
    }
  }
  __syncwarp();  // four lanes have read a row's ranges; one of them writes
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const long at = row + 8 * half;
    if (at >= rows) continue;
    const Grid grid = fit(__fmul_rn(low[half], best[half][0]), __fmul_rn(high[half], best[half][1]), rule);
    if (pair == 0) {
      ranges[at] = best[half][0];
      ranges[ranges_stride + at] = best[half][1];
      ranges[2 * ranges_stride + at] = grid.scale;
      ranges[3 * ranges_stride + at] = grid.zero;
    }
#pragma unroll
    for (int j = 0; j < SIZE / 8; ++j) {
      const float first = half ? w[j].z : w[j].x, second = half ? w[j].w : w[j].y;
      *reinterpret_cast<float2*>(error + at * error_stride + 8 * j + 2 * pair) = {
          __fsub_rn(nearest(first, grid, rule), first), __fsub_rn(nearest(second, grid, rule), second)};
    }
  }
}

#define CLIP_STEP(SIZE)                                                                                  \
  extern "C" __global__ void __launch_bounds__(128) clip_step_##SIZE(                                    \
      const float* weight, int weight_stride, const float* block, int block_stride,                    \
      const float* others, int others_stride, float* error, int error_stride, float* ranges,           \
      int ranges_stride, const float* factors, int joint, int side, int rows, int steps, int symmetric, \
      int scale_type, float two_steps) {                                                                 \
    clip_step<SIZE>(weight, weight_stride, block, block_stride, others, others_stride, error,            \
                    error_stride, ranges, ranges_stride, factors, joint, side, rows,                     \
                    {steps, symmetric, scale_type, two_steps});                                          \
  }

CLIP_STEP(32)
CLIP_STEP(64)
CLIP_STEP(128)
