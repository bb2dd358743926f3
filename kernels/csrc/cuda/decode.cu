// y = x W^T + bias for few rows of x: W is packed, and every byte of it is read once.
//
// The weights are the left operand of the tensor core (16 output rows by 16 channels), so that the token side is its
// small side, 8 wide, and few tokens waste nothing. They arrive in fragment order (layout.py), which makes a lane's
// shared-memory read 16 bytes of its own and nothing else.
//
// A block has SPLITS groups of ROW_WARPS warps. A work unit is ROW_WARPS * ROW_TILES * 16 output rows by 128 channels;
// the units of all strips of rows, strip after strip, are dealt evenly to the blocks (stream-K) and within a block in
// turn to its groups. Each group has a ring of STAGES units in shared memory, filled ahead by the copy engine and
// guarded by barriers of its own: groups meet only at the end of a strip, where their sums are added. A strip that
// several blocks share is finished by the last of them to arrive, in a fixed order: results are reproducible.
#include "fragments.cuh"

#ifndef ROW_TILES
#define ROW_TILES 4
#endif
#ifndef TOKEN_TILES
#define TOKEN_TILES 1
#endif
#ifndef ROW_WARPS
#define ROW_WARPS 1
#endif
#ifndef SPLITS
#define SPLITS 8
#endif
#ifndef STAGES
#define STAGES 3
#endif
// Whether scales multiply weights (one rounding more, fewer registers) or the sums of a group.
#ifndef SCALE_WEIGHTS
#define SCALE_WEIGHTS 0
#endif
// Whether the copy engine brings the weights, and the activations too.
#ifndef BULK
#define BULK (__CUDA_ARCH__ >= 900)
#endif
#ifndef BULK_TOKENS
#define BULK_TOKENS BULK
#endif
// Whether tile indices are incremented instead of divided for, and tokens are fetched without a loop.
#ifndef LEAN_FILL
#define LEAN_FILL 0
#endif
// Tokens that the ring has room for: fewer than TOKENS where fewer are sure to come.
#ifndef HELD_TOKENS
#define HELD_TOKENS (TOKEN_TILES * 8)
#endif

constexpr int WARPS = ROW_WARPS * SPLITS, THREADS = WARPS * 32;
constexpr int STRIP_TILES = ROW_WARPS * ROW_TILES;
constexpr int TOKEN_STRIDE = UNIT_CHANNELS * 2 + 16;  // 16 bytes of padding: ldmatrix meets no bank twice
constexpr int STAGE_WEIGHTS = STRIP_TILES * RECORD_BYTES;
constexpr int STAGE_BYTES = STAGE_WEIGHTS + HELD_TOKENS * TOKEN_STRIDE;
constexpr int RING_BYTES = SPLITS * STAGES * STAGE_BYTES;
constexpr int SUMS = ROW_TILES * TOKEN_TILES;             // float4 of a lane
constexpr int ROUND = SUMS < 8 ? SUMS : 8;                // of which this many at once go through shared memory
constexpr int SUM_BYTES = SPLITS > 1 ? WARPS * ROUND * 512 : 0;
constexpr int BARRIERS_AT = RING_BYTES + SUM_BYTES;
constexpr int SHARED_BYTES = BARRIERS_AT + SPLITS * STAGES * 16 + 16;
#ifdef EXPECTED_SHARED_BYTES
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "kernels/cuda/decode.py counts shared memory differently");
#endif
constexpr u32 FULL_ARRIVALS = BULK ? (BULK_TOKENS ? 1 : 33) : ROW_WARPS * 32;

struct Arguments {
  const u8* records;
  const u16* x;
  const u16* bias;
  u16* y;
  float4* partial;
  u32* arrived;
  int tokens, channels, rows;
  u32 tiles, units;
};

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { Number::mma(d, a, b0, b1); }

// A unit of a group's turn: its number, and where it lies.
struct Place {
  u32 at, strip, unit;
  __device__ __forceinline__ void advance(u32 units) {
    at += SPLITS;
    unit += SPLITS;
    while (unit >= units) {
      unit -= units;
      ++strip;
    }
  }
};

struct Worker {
  const Arguments& args;
  u32 shared;
  int warp, lane, split, row_warp;
  u32 begin, end, total;

  __device__ __forceinline__ u32 slot(int turn) const { return shared + (split * STAGES + turn % STAGES) * STAGE_BYTES; }
  __device__ __forceinline__ u32 full(int turn) const {
    return shared + BARRIERS_AT + (split * STAGES + turn % STAGES) * 16;
  }
  __device__ __forceinline__ u32 empty(int turn) const { return full(turn) + 8; }
  __device__ __forceinline__ u32 index(int turn) const { return begin + split + turn * SPLITS; }
  __device__ __forceinline__ Place place(int turn) const {
    u32 at = index(turn);
    return {at, at / args.units, at % args.units};
  }

  __device__ __forceinline__ int token_bytes(int unit) const {
    return min(UNIT_CHANNELS, args.channels - unit * UNIT_CHANNELS) * 2;
  }
  __device__ __forceinline__ void fill_weights(int turn, const Place& place) const {
    if (place.at >= end) return;
    int first = place.strip * STRIP_TILES, bytes = min(STRIP_TILES, int(args.tiles) - first) * RECORD_BYTES;
    const u8* source = args.records + (u64(place.unit) * args.tiles + first) * RECORD_BYTES;
#if BULK
    if (lane == 0) {
      barrier_expect(full(turn), bytes + (BULK_TOKENS ? args.tokens * token_bytes(place.unit) : 0));
      bulk_copy(slot(turn), source, bytes, full(turn));
    }
#else
    for (int i = row_warp * 32 + lane; i < bytes / 16; i += ROW_WARPS * 32) copy16(slot(turn) + i * 16, source + i * 16, 16);
#endif
  }
  __device__ __forceinline__ void fill_tokens(int turn, const Place& place) const {
    if (place.at >= end) return;
    int unit = place.unit, bytes = token_bytes(unit);
    const u16* source = args.x + unit * UNIT_CHANNELS;
    u32 to = slot(turn) + STAGE_WEIGHTS;
#if BULK_TOKENS
    __syncwarp();
#if LEAN_FILL
    static_assert(HELD_TOKENS <= 32 || !BULK_TOKENS, "a lane brings one token");
    if (lane < args.tokens) bulk_copy(to + lane * TOKEN_STRIDE, source + u64(lane) * args.channels, bytes, full(turn));
#else
    for (int m = lane; m < args.tokens; m += 32)
      bulk_copy(to + m * TOKEN_STRIDE, source + u64(m) * args.channels, bytes, full(turn));
#endif
#else
    int first = BULK ? lane : row_warp * 32 + lane;
    for (int i = first; i < args.tokens * 16; i += BULK ? 32 : ROW_WARPS * 32) {
      int m = i / 16, byte = i % 16 * 16;
      copy16(to + m * TOKEN_STRIDE + byte, source + u64(m) * args.channels + byte / 2, byte < bytes ? 16 : 0);
    }
    copy_arrive(full(turn));
#endif
  }
};

// Adds one unit, that lies in `slot`, to the sums.
__device__ __forceinline__ void add_unit(float (&sums)[ROW_TILES][TOKEN_TILES][4], u32 slot, int row_warp, int lane) {
  u32 records = slot + row_warp * ROW_TILES * RECORD_BYTES, tokens = slot + STAGE_WEIGHTS;
  int row = lane / 4;
  u32 matrix = TOKEN_TILES == 1 ? tokens + (lane % 8 < HELD_TOKENS ? lane % 8 : 0) * TOKEN_STRIDE + (lane / 8) * 16
                                : tokens + (lane / 16 * 8 + lane % 8) * TOKEN_STRIDE + (lane / 8 % 2) * 16;
  float parts[ROW_TILES][TOKEN_TILES][4];
  Scales scales[ROW_TILES];
  Zeros zeros[ROW_TILES];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 words[ROW_TILES][BITS];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) load_words(words[i], records + i * RECORD_BYTES, half, lane);
    u32 pairs[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      int channel = half * 64 + step * 16;
      if (channel % GROUP == 0) {
        int group = channel / GROUP;
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
          scales[i].set(records + i * RECORD_BYTES + SCALES_AT + group * TILE_ROWS * SCALE_BYTES, row);
          zeros[i].set(records + i * RECORD_BYTES + ZEROS_AT + group * TILE_ROWS, row);
#pragma unroll
          for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) parts[i][j][c] = 0.f;
        }
      }
      u32 b[TOKEN_TILES][2];
#if TOKEN_TILES == 1
      if (step % 2 == 0) load_matrices(pairs, matrix + channel * 2);
      b[0][0] = pairs[step % 2 * 2], b[0][1] = pairs[step % 2 * 2 + 1];
#else
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; j += 2) {
        load_matrices(pairs, matrix + j * 8 * TOKEN_STRIDE + channel * 2);
        b[j][0] = pairs[0], b[j][1] = pairs[1], b[j + 1][0] = pairs[2], b[j + 1][1] = pairs[3];
      }
#endif
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        u32 a[4];
        unpack_fragment(a, words[i], step, zeros[i]);
#if SCALE_WEIGHTS
        u32 low = Number::narrow2(scales[i].low, scales[i].low), high = Number::narrow2(scales[i].high, scales[i].high);
#pragma unroll
        for (int c = 0; c < 4; ++c) a[c] = Number::mul2(a[c], c & 1 ? high : low);
#endif
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) multiply(SCALE_WEIGHTS ? sums[i][j] : parts[i][j], a, b[j][0], b[j][1]);
      }
      if (!SCALE_WEIGHTS && (channel + 16) % GROUP == 0) {
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
          for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
              sums[i][j][c] += (c < 2 ? scales[i].low : scales[i].high) * parts[i][j][c];
      }
    }
  }
}

__device__ __forceinline__ void store(const Arguments& args, int row, int token, float value) {
  if (row >= args.rows || token >= args.tokens) return;
  if (args.bias) value += Number::widen(args.bias[row]);
  args.y[u64(token) * args.rows + row] = Number::narrow(value);
}

// Four sums of a lane: rows r and r + 8, tokens t and t + 1.
__device__ __forceinline__ void store_sums(const Arguments& args, int tile, int token_tile, int lane, float4 v) {
  int row = tile * TILE_ROWS + lane / 4, token = token_tile * 8 + lane % 4 * 2;
  store(args, row, token, v.x);
  store(args, row, token + 1, v.y);
  store(args, row + 8, token, v.z);
  store(args, row + 8, token + 1, v.w);
}

__device__ __forceinline__ float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Where a block leaves its part of a strip: it shares at most its first and its last one.
__device__ __forceinline__ u64 partial_at(int block, bool first, int row_warp, int sum, int lane) {
  return (((u64(block) * 2 + !first) * ROW_WARPS + row_warp) * SUMS + sum) * 32 + lane;
}

// The block whose range holds unit `at`.
__device__ __forceinline__ int owner(u32 at, u32 total) { return int(((at + u64(1)) * gridDim.x - 1) / total); }
__device__ __forceinline__ u32 first_unit(int block, u32 total) { return u32(u64(block) * total / gridDim.x); }

__device__ __forceinline__ void finish_strip(const Worker& w, u32 strip, float (&sums)[ROW_TILES][TOKEN_TILES][4],
                                             u32* last) {
  const Arguments& args = w.args;
  int first_block = owner(strip * args.units, w.total), last_block = owner((strip + 1) * args.units - 1, w.total);
  int parts = last_block - first_block + 1;
  int first_tile = strip * STRIP_TILES + w.row_warp * ROW_TILES;
  bool is_first = strip == w.begin / args.units;
  u32 buffer = w.shared + RING_BYTES;
  __syncwarp();
#pragma unroll
  for (int base = 0; base < SUMS; base += ROUND) {
    if (SPLITS > 1) {
#pragma unroll
      for (int i = 0; i < ROUND && base + i < SUMS; ++i) {
        float(&s)[4] = sums[(base + i) / TOKEN_TILES][(base + i) % TOKEN_TILES];
        asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(buffer + ((w.warp * ROUND + i) * 32 + w.lane) * 16),
                     "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3])
                     : "memory");
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ROUND; ++i) {
      int sum = base + i;
      if (sum >= SUMS || (SPLITS > 1 && i % SPLITS != w.split)) continue;
      float4 v = {0.f, 0.f, 0.f, 0.f};
      if (SPLITS > 1) {
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
          uint4 bits = load_shared16(buffer + (((s * ROW_WARPS + w.row_warp) * ROUND + i) * 32 + w.lane) * 16);
          v = plus(v, {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)});
        }
      } else {
        float(&s)[4] = sums[sum / TOKEN_TILES][sum % TOKEN_TILES];
        v = {s[0], s[1], s[2], s[3]};
      }
      if (parts == 1) {
        store_sums(args, first_tile + sum / TOKEN_TILES, sum % TOKEN_TILES, w.lane, v);
      } else {
        __stcg(&args.partial[partial_at(blockIdx.x, is_first, w.row_warp, sum, w.lane)], v);
      }
    }
    if (SPLITS > 1) __syncthreads();
  }
  if (parts == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(&args.arrived[strip], 1) == u32(parts - 1);
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int sum = w.split; sum < SUMS; sum += SPLITS) {
    float4 v = {0.f, 0.f, 0.f, 0.f};
    for (int block = first_block; block <= last_block; ++block) {
      bool first = first_unit(block, w.total) / args.units == strip;
      v = plus(v, __ldcg(&args.partial[partial_at(block, first, w.row_warp, sum, w.lane)]));
    }
    store_sums(args, first_tile + sum / TOKEN_TILES, sum % TOKEN_TILES, w.lane, v);
  }
  if (threadIdx.x == 0) args.arrived[strip] = 0;
}

// Zeros where the copies of a ragged last unit write nothing: what lies there meets weights of zero, and must be finite.
__device__ __forceinline__ void clear_tokens(u32 shared) {
  for (int stage = 0; stage < SPLITS * STAGES; ++stage)
    for (int i = threadIdx.x; i < HELD_TOKENS * TOKEN_STRIDE / 16; i += THREADS)
      asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(shared + stage * STAGE_BYTES + STAGE_WEIGHTS + i * 16),
                   "r"(0)
                   : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(const u8* records, const u16* x, const u16* bias, u16* y, float4* partial, u32* arrived, int tokens, int channels,
       int rows) {
  extern __shared__ __align__(128) u8 memory[];
  u32 tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, units = (channels + UNIT_CHANNELS - 1) / UNIT_CHANNELS;
  u32 total = (tiles + STRIP_TILES - 1) / STRIP_TILES * units;
  Arguments args{records, x, bias, y, partial, arrived, tokens, channels, rows, tiles, units};
  int warp = threadIdx.x / 32;
  Worker w{args, shared_address(memory), warp, int(threadIdx.x % 32), warp / ROW_WARPS, warp % ROW_WARPS,
           first_unit(blockIdx.x, total), first_unit(blockIdx.x + 1, total), total};
  u32* last = reinterpret_cast<u32*>(memory + SHARED_BYTES - 16);

  if (threadIdx.x == 0) {
    for (int i = 0; i < SPLITS * STAGES; ++i) {
      barrier_init(w.shared + BARRIERS_AT + i * 16, FULL_ARRIVALS);
      barrier_init(w.shared + BARRIERS_AT + i * 16 + 8, ROW_WARPS);
    }
    fence_before_bulk_copies();
  }
  if (channels % UNIT_CHANNELS) {
    clear_tokens(w.shared);
    fence_before_bulk_copies();
  }
  __syncthreads();
  let_next_grid_start();
  bool fills = !BULK || w.row_warp == 0;
  Place next = w.place(0), first = next;
  for (int turn = 0; turn < STAGES; ++turn) {
    if (fills) w.fill_weights(turn, LEAN_FILL ? next : w.place(turn));
    next.advance(units);
  }
  wait_for_previous_grid();
  if (fills) {
    for (int turn = 0; turn < STAGES; ++turn) {
      w.fill_tokens(turn, LEAN_FILL ? first : w.place(turn));
      first.advance(units);
    }
  }

  int turn = 0;
  u32 at = w.index(0);
  for (u32 strip = w.begin / units; strip <= (w.end - 1) / units; ++strip) {
    float sums[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int i = 0; i < SUMS * 4; ++i) sums[i / 4 / TOKEN_TILES][i / 4 % TOKEN_TILES][i % 4] = 0.f;
    u32 stop = min(w.end, (strip + 1) * units);
    for (; at < stop; at += SPLITS, ++turn) {
      // The slot that was read in the turn before is refilled in this one, so that nobody waits for it to be empty.
      if (turn && (!BULK || turn % ROW_WARPS == w.row_warp)) {
        Place place = LEAN_FILL ? next : w.place(turn - 1 + STAGES);
        barrier_wait(w.empty(turn - 1), (turn - 1) / STAGES & 1);
        w.fill_weights(turn - 1 + STAGES, place);
        w.fill_tokens(turn - 1 + STAGES, place);
      }
      if (LEAN_FILL && turn) next.advance(units);
      barrier_wait(w.full(turn), turn / STAGES & 1);
      add_unit(sums, w.slot(turn), w.row_warp, w.lane);
      __syncwarp();
      if (w.lane == 0) barrier_arrive(w.empty(turn));
    }
    finish_strip(w, strip, sums, last);
  }
}
