// y = x W^T + bias for many rows of x, on Hopper: W is packed, and its fragments go from registers into wgmma, which
// takes only its left operand from there. The tokens are the right operand, swizzled in shared memory by the copy
// engine. Warpgroups compute, one thread feeds the ring of stages. Two of them share a tile's rows; where unpacking
// bounds, further pairs (SPLITS) take units in turn, and their sums are added at the end of a tile.
//
// A tile is 128 * ROW_BLOCKS output rows by TOKENS tokens. Tiles go to the blocks whole, or (`split`) their units of 128
// channels are dealt evenly: then the last block to arrive at a tile adds the parts, in a fixed order.
#include "fragments.cuh"
#include "wgmma.cuh"

#ifndef ROW_BLOCKS
#define ROW_BLOCKS 2
#endif
#ifndef TOKENS
#define TOKENS 128
#endif
#ifndef SPLITS
#define SPLITS 1
#endif
#ifndef STAGES
#define STAGES 4
#endif

struct alignas(64) TensorMap {
  u64 words[16];
};

// Small tiles leave registers for a second block on the processor: with overlapping launches it is the next kernel's,
// which fetches its first weights while this one ends. Large ones take registers from the warps that feed.
constexpr bool SMALL = ROW_BLOCKS == 1 && TOKENS <= 32 && SPLITS == 1, LARGE = ROW_BLOCKS * TOKENS > 128;
constexpr int WARPGROUPS = 2, PAIR = WARPGROUPS * 128, CONSUMERS = SPLITS * PAIR;
constexpr int THREADS = CONSUMERS + (LARGE ? 128 : 32);
constexpr int GROUP_RECORDS = 4 * ROW_BLOCKS, TILE_RECORDS = WARPGROUPS * GROUP_RECORDS;
constexpr int HALF_TOKENS = TOKENS * 128;  // bytes of 64 channels
constexpr int STAGE_BYTES = (2 * HALF_TOKENS + TILE_RECORDS * RECORD_BYTES + 1023) / 1024 * 1024;
constexpr int STAGED_TOKENS = TOKENS < 32 ? TOKENS : 32, STAGED_STRIDE = 144;
constexpr int STAGING_AT = STAGES * STAGE_BYTES, SUMS_AT = STAGING_AT + WARPGROUPS * STAGED_TOKENS * STAGED_STRIDE;
constexpr int BARRIERS_AT = SUMS_AT + (SPLITS - 1) * PAIR * ROW_BLOCKS * TOKENS / 2 * 4;
[[maybe_unused]] constexpr int SHARED_BYTES = BARRIERS_AT + STAGES * 16 + 16 + 1024;  // 1024 to align
[[maybe_unused]] constexpr int BATCH = 4 / ROW_BLOCKS;                                 // k-steps whose fragments are made at once
[[maybe_unused]] constexpr int SUMS = TOKENS / 2;
#ifdef EXPECTED_SHARED_BYTES
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "kernels/cuda/wide.py counts shared memory differently");
#endif

struct Task {
  u32 tile, first, last;  // units
};

// The same sequence of tasks for the thread that feeds and for those that compute.
struct Schedule {
  u32 tiles, units, at, end, step;
  bool split;
  __device__ __forceinline__ bool next(Task& task) {
    if (at >= end) return false;
    if (!split) {
      task = {at, 0, units};
      at += step;
      return true;
    }
    u32 first = at % units, count = min(units - first, end - at);
    task = {at / units, first, first + count};
    at += count;
    return true;
  }
};

#if __CUDA_ARCH__ == 900
__device__ __forceinline__ u32 first_unit(u32 block, u32 total) { return u32(u64(block) * total / gridDim.x); }
__device__ __forceinline__ u32 owner(u32 at, u32 total) { return u32(((at + u64(1)) * gridDim.x - 1) / total); }

__device__ __forceinline__ Schedule schedule_of(u32 tiles, u32 units, bool split) {
  u32 total = tiles * units;
  if (!split) return {tiles, units, blockIdx.x, tiles, gridDim.x, false};
  return {tiles, units, first_unit(blockIdx.x, total), first_unit(blockIdx.x + 1, total), 0, true};
}

__device__ __forceinline__ void load_tokens(u32 to, const TensorMap* map, int channel, int token, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(channel), "r"(token), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void group_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

[[maybe_unused]] constexpr int PAIR_BARRIER = 3, ALL_BARRIER = 4;  // 1 and 2 are the warpgroups' own

struct Places {
  u32 shared;
  __device__ __forceinline__ u32 stage(u32 turn) const { return shared + turn % STAGES * STAGE_BYTES; }
  __device__ __forceinline__ u32 full(u32 turn) const { return shared + BARRIERS_AT + turn % STAGES * 16; }
  __device__ __forceinline__ u32 empty(u32 turn) const { return full(turn) + 8; }
};

// The units of a schedule, one after the other.
struct Cursor {
  Schedule schedule;
  Task task;
  u32 unit;
  __device__ __forceinline__ bool next() {
    if (++unit < task.last) return true;
    if (!schedule.next(task)) return false;
    unit = task.first;
    return true;
  }
};

struct Feeder {
  const Places& at;
  const u8* records;
  const TensorMap* map;
  u32 row_tiles, token_tiles;

  __device__ __forceinline__ void weights(const Cursor& cursor, u32 turn) const {
    u32 first = cursor.task.tile / token_tiles * TILE_RECORDS;
    u32 bytes = min(u32(TILE_RECORDS), row_tiles - first) * RECORD_BYTES;
    barrier_expect(at.full(turn), bytes + 2 * HALF_TOKENS);
    bulk_copy(at.stage(turn) + 2 * HALF_TOKENS, records + (u64(cursor.unit) * row_tiles + first) * RECORD_BYTES, bytes,
              at.full(turn));
  }
  __device__ __forceinline__ void tokens(const Cursor& cursor, u32 turn) const {
    u32 token = cursor.task.tile % token_tiles * TOKENS, channel = cursor.unit * UNIT_CHANNELS;
    load_tokens(at.stage(turn), map, channel, token, at.full(turn));
    load_tokens(at.stage(turn) + HALF_TOKENS, map, channel + 64, token, at.full(turn));
  }
  // Weights depend on nobody: the first of them are under way before the previous kernel has ended.
  __device__ void run(const Schedule& schedule) const {
    Cursor ahead{schedule, {0, 0, 0}, 0}, behind = ahead;
    u32 turn = 0;
    for (; turn < STAGES && ahead.next(); ++turn) weights(ahead, turn);
    wait_for_previous_grid();
    for (u32 early = 0; early < turn && behind.next(); ++early) tokens(behind, early);
    for (; turn >= STAGES && ahead.next(); ++turn) {
      barrier_wait(at.empty(turn), turn / STAGES - 1 & 1);
      weights(ahead, turn);
      tokens(ahead, turn);
    }
  }
};

// The fragments of BATCH k-steps from `first` of a half, scaled.
__device__ __forceinline__ void make_fragments(u32 (&a)[ROW_BLOCKS][BATCH][4], const u32 (&words)[ROW_BLOCKS][BITS],
                                               Scales (&scales)[ROW_BLOCKS], Zeros (&zeros)[ROW_BLOCKS], u32 record,
                                               int half, int first, int lane) {
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    int channel = half * 64 + (first + i) * 16;
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
      if (channel % GROUP == 0) {
        u32 at = record + block * 4 * RECORD_BYTES, group = channel / GROUP;
        scales[block].set(at + SCALES_AT + group * TILE_ROWS * SCALE_BYTES, lane / 4);
        zeros[block].set(at + ZEROS_AT + group * TILE_ROWS, lane / 4);
      }
      unpack_fragment(a[block][i], words[block], first + i, zeros[block]);
      u32 low = Number::narrow2(scales[block].low, scales[block].low);
      u32 high = Number::narrow2(scales[block].high, scales[block].high);
#pragma unroll
      for (int c = 0; c < 4; ++c) a[block][i][c] = Number::mul2(a[block][i][c], c & 1 ? high : low);
    }
  }
}

__device__ __forceinline__ void store_matrices(u32 address, const u32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

struct Output {
  u16* y;
  const u16* bias;
  int tokens, rows;
};

// 64 rows by TOKENS tokens of one warpgroup, through shared memory, so that rows leave in lines.
__device__ __forceinline__ void store_block(const Output& out, const float (&sums)[SUMS], int row, int token, u32 staging,
                                            int group, int thread) {
  int warp = thread / 32, lane = thread % 32, mine = row + warp * 16 + lane / 4;
  float low = out.bias && mine < out.rows ? Number::widen(out.bias[mine]) : 0.f;
  float high = out.bias && mine + 8 < out.rows ? Number::widen(out.bias[mine + 8]) : 0.f;
  u32 to = staging + (lane / 16 * 8 + lane % 8) * STAGED_STRIDE + (warp * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int chunk = 0; chunk < TOKENS / STAGED_TOKENS; ++chunk) {
#pragma unroll
    for (int half = 0; half < STAGED_TOKENS / 16; ++half) {
      const float* s = sums + chunk * 16 + half * 8;
      u32 v[4] = {Number::narrow2(s[0] + low, s[1] + low), Number::narrow2(s[2] + high, s[3] + high),
                  Number::narrow2(s[4] + low, s[5] + low), Number::narrow2(s[6] + high, s[7] + high)};
      store_matrices(to + half * 16 * STAGED_STRIDE, v);
    }
    group_sync(group + 1, 128);
#pragma unroll
    for (int i = 0; i < STAGED_TOKENS / 16; ++i) {
      int index = thread + i * 128, t = index / 8, part = index % 8;
      int out_token = token + chunk * STAGED_TOKENS + t, out_row = row + part * 8;
      uint4 line = load_shared16(staging + t * STAGED_STRIDE + part * 16);
      if (out_token >= out.tokens) continue;
      u16* target = out.y + u64(out_token) * out.rows + out_row;
      if (out.rows % 8 == 0) {
        if (out_row < out.rows) *reinterpret_cast<uint4*>(target) = line;
      } else {
        u32 words[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (out_row + c < out.rows) target[c] = u16(words[c / 2] >> (c % 2 * 16));
      }
    }
    group_sync(group + 1, 128);
  }
}

__device__ __forceinline__ float4* partial_at(float4* partial, u32 block, bool first, int group, int thread) {
  return partial + ((u64(block) * 2 + !first) * WARPGROUPS + group) * (ROW_BLOCKS * SUMS / 4 * 128) + thread;
}

// Leaves this block's part of a tile; true for the last block to arrive, with the sum of all parts.
__device__ __forceinline__ bool add_parts(float (&sums)[ROW_BLOCKS][SUMS], const Schedule& schedule, u32 tile,
                                          float4* partial, u32* arrived, u32* last, int group, int thread) {
  u32 total = schedule.tiles * schedule.units;
  u32 begin = owner(tile * schedule.units, total), end = owner((tile + 1) * schedule.units - 1, total);
  if (begin == end) return true;
  float4* mine = partial_at(partial, blockIdx.x, first_unit(blockIdx.x, total) / schedule.units == tile, group, thread);
#pragma unroll
  for (int i = 0; i < ROW_BLOCKS * SUMS / 4; ++i) {
    float* s = &sums[i * 4 / SUMS][i * 4 % SUMS];
    __stcg(mine + i * 128, float4{s[0], s[1], s[2], s[3]});
  }
  __threadfence();
  group_sync(PAIR_BARRIER, PAIR);
  if (group == 0 && thread == 0) *last = atomicAdd(&arrived[tile], 1) == end - begin;
  group_sync(PAIR_BARRIER, PAIR);
  if (!*last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < ROW_BLOCKS * SUMS; ++i) sums[i / SUMS][i % SUMS] = 0.f;
  for (u32 block = begin; block <= end; ++block) {
    const float4* part = partial_at(partial, block, first_unit(block, total) / schedule.units == tile, group, thread);
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * SUMS / 4; ++i) {
      float4 v = __ldcg(part + i * 128);
      float* s = &sums[i * 4 / SUMS][i * 4 % SUMS];
      s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
    }
  }
  if (group == 0 && thread == 0) arrived[tile] = 0;
  return true;
}

// Adds the sums of the other pairs to the first one's.
__device__ __forceinline__ void add_splits(float (&sums)[ROW_BLOCKS][SUMS], u32 shared, int split, int thread) {
#if SPLITS > 1
  u32 to = shared + SUMS_AT + thread * 16;
  constexpr int COUNT = ROW_BLOCKS * SUMS / 4;
  if (split) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float* s = &sums[i * 4 / SUMS][i * 4 % SUMS];
      asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to + ((split - 1) * COUNT + i) * PAIR * 16), "f"(s[0]),
                   "f"(s[1]), "f"(s[2]), "f"(s[3])
                   : "memory");
    }
  }
  group_sync(ALL_BARRIER, CONSUMERS);
  if (!split) {
#pragma unroll
    for (int i = 0; i < (SPLITS - 1) * COUNT; ++i) {
      uint4 v = load_shared16(to + i * PAIR * 16);
      float* s = &sums[i % COUNT * 4 / SUMS][i % COUNT * 4 % SUMS];
      s[0] += __uint_as_float(v.x), s[1] += __uint_as_float(v.y), s[2] += __uint_as_float(v.z), s[3] += __uint_as_float(v.w);
    }
  }
  group_sync(ALL_BARRIER, CONSUMERS);
#endif
}

__device__ __forceinline__ void compute(const Places& at, Schedule schedule, const Output& out, float4* partial,
                                        u32* arrived, u32* last, u32 token_tiles, int group, int thread) {
  int warp = thread / 32, lane = thread % 32, split = group / WARPGROUPS;
  group %= WARPGROUPS;
  u32 offset = 2 * HALF_TOKENS + (group * GROUP_RECORDS + warp) * RECORD_BYTES;
  u32 staging = at.shared + STAGING_AT + group * STAGED_TOKENS * STAGED_STRIDE;
  Task task;
  u32 turn = 0;
  while (schedule.next(task)) {
    float sums[ROW_BLOCKS][SUMS];
    // Splits may have nothing to do in a short task; without them the first product writes.
    if (SPLITS > 1)
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * SUMS; ++i) sums[i / SUMS][i % SUMS] = 0.f;
    bool started = false;
    u32 before = 0;
    for (u32 unit = task.first; unit < task.last; ++unit, ++turn) {
      if (SPLITS > 1 && turn % SPLITS != split) continue;
      barrier_wait(at.full(turn), turn / STAGES & 1);
      u32 stage = at.stage(turn), record = stage + offset;
      Scales scales[ROW_BLOCKS];
      Zeros zeros[ROW_BLOCKS];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 words[ROW_BLOCKS][BITS];
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
          load_words(words[block], record + block * 4 * RECORD_BYTES, half, lane);
#pragma unroll
        for (int batch = 0; batch < 4 / BATCH; ++batch) {
          u32 a[ROW_BLOCKS][BATCH][4];
          make_fragments(a, words, scales, zeros, record, half, batch * BATCH, lane);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < BATCH; ++i) {
            u64 tokens = swizzled_matrix(stage + half * HALF_TOKENS) + (batch * BATCH + i) * 2;
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block)
              Wgmma<Number, TOKENS>::run(sums[block], a[block][i], tokens,
                                         SPLITS > 1 || started || half || batch || i);
          }
          wgmma_commit();
          wgmma_wait<1>();
          if (half == 0 && batch == 0 && started && lane == 0) barrier_arrive(at.empty(before));
        }
      }
      started = true;
      before = turn;
    }
    wgmma_wait<0>();
    if (started && lane == 0) barrier_arrive(at.empty(before));
    add_splits(sums, at.shared, split, group * 128 + thread);
    if (split) continue;
    if (schedule.split && !add_parts(sums, schedule, task.tile, partial, arrived, last, group, thread)) continue;
    int row = (task.tile / token_tiles * WARPGROUPS + group) * 64 * ROW_BLOCKS;
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
      store_block(out, sums[block], row + block * 64, task.tile % token_tiles * TOKENS, staging, group, thread);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, SMALL ? 2 : 1)
wide(const __grid_constant__ TensorMap map, const u8* records, const u16* bias, u16* y, float4* partial, u32* arrived,
     int tokens, int channels, int rows, int split) {
#if __CUDA_ARCH__ == 900
  extern __shared__ u8 memory[];
  u32 shared = (shared_address(memory) + 1023) / 1024 * 1024;
  u32* last = reinterpret_cast<u32*>(memory + (shared - shared_address(memory)) + BARRIERS_AT + STAGES * 16);
  Places at{shared};
  u32 row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, token_tiles = (tokens + TOKENS - 1) / TOKENS;
  u32 units = (channels + UNIT_CHANNELS - 1) / UNIT_CHANNELS;
  u32 tiles = (row_tiles + TILE_RECORDS - 1) / TILE_RECORDS * token_tiles;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(at.full(i), 1);
      barrier_init(at.empty(i), PAIR / 32);
    }
    fence_before_bulk_copies();
  }
  __syncthreads();
  let_next_grid_start();
  Schedule schedule = schedule_of(tiles, units, split);
  int group = threadIdx.x / 128;
  if (group == WARPGROUPS * SPLITS) {
    if (LARGE) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS) Feeder{at, records, &map, row_tiles, token_tiles}.run(schedule);
  } else {
    if (LARGE) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_previous_grid();
    compute(at, schedule, Output{y, bias, tokens, rows}, partial, arrived, last, token_tiles, group, threadIdx.x % 128);
  }
#endif
}
