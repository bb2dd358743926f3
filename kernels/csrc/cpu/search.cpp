// Inner steps of the search for scales and ranges: kernels/search/operators.py says what they compute.
//
// Compiled with AMX (-DNIBBLE_AMX) the products of the clip step run on tiles, in bfloat16 with sums in float32; else
// on the processor's vectors in float32. What is returned is computed in the order of the operators' PyTorch form:
// the same ranges give the same bytes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#ifdef NIBBLE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>

#include "registers.h"
#endif

#include "vectors.h"

namespace {

// ------------------------------------------------------------------------------------------------- grids

enum ScaleType { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

}  // namespace

extern "C" {

// How a range becomes a grid (kernels/search/grids.py).
struct Rule {
  int64_t steps;  // the largest integer
  int64_t symmetric;
  int64_t scale_type;
  float two_steps;     // 2 / steps
  float range_factor;  // of rounding_errors
};

// Rows of a matrix; `stride` counts values.
struct Rows {
  float* at;
  int64_t stride;
};

struct ClipStep {
  Rows weight, block, others, error, ranges;
  const float* factors;  // joint, then side
  int64_t joint, side, rows, size, threads;
};
}

namespace {

inline Floats to_float16(Floats values) {
#ifdef __AVX512F__
  return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) values[i] = float(_Float16(values[i]));
  return values;
#endif
}

inline Floats stored_scale(Floats scale, int64_t type) {
  scale = to_float16(smaller(scale, all(65280.0f)));
  if (type == kBfloat16) scale = (Floats)(((Words)scale + 0x7fffu + ((Words)scale >> 16 & 1u)) & 0xffff0000u);
  return scale > 0.0f ? scale : all(1.0f);
}

// A grid for each lane. Values are whole numbers from `bottom` to `top`, times the scale.
struct Grids {
  Floats scale, zero, bottom, top;
};

inline Grids fit(Floats low, Floats high, const Rule& rule) {
  Grids found;
  const Floats steps = all(float(rule.steps));
  if (rule.symmetric) {
    const Floats size = larger(larger(high, -high), larger(low, -low));
    found.scale = stored_scale(size * rule.two_steps, rule.scale_type);
    found.zero = all(float((rule.steps + 1) / 2));
  } else {
    low = smaller(low, Floats{});
    high = larger(high, Floats{});
    found.scale = stored_scale((high - low) / steps, rule.scale_type);
    // Clamped before it is rounded, which is the same since the bounds are whole.
    found.zero = nearest_whole(smaller(larger(-low / found.scale, Floats{}), steps));
  }
  found.bottom = -found.zero;
  found.top = steps - found.zero;
  return found;
}

// The step of a value that is already divided by the scale. What is not a number stays so.
inline Floats step_of(Floats value, const Grids& grid) {
  return nearest_whole(smaller(grid.top, larger(grid.bottom, value)));
}

// ------------------------------------------------------------------------------------------------- rounding

inline float least(Floats values) {
#ifdef __AVX512F__
  return _mm512_reduce_min_ps((__m512)values);
#else
  float found = values[0];
  for (int i = 1; i < kLanes; ++i) found = std::min(found, values[i]);
  return found;
#endif
}

inline float largest(Floats values) { return -least(-values); }

// a / b of IEEE floats, from the nearest number to 1 / b (Markstein's correction; at least two instructions less
// matter, since a division takes as long as sixteen products).
inline Floats quotient(Floats a, Floats b, Floats inverse) {
#ifdef __AVX512F__
  const Floats near = a * inverse;
  return fused(fused(-near, b, a), inverse, near);
#else
  return a / b;
#endif
}

inline void put(float* to, Floats values) { store(to, values); }

inline void put(uint16_t* to, Floats values) {
#ifdef __AVX512BF16__
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)values);
  std::memcpy(to, &narrow, 32);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = bfloat(values[i]);
#endif
}

// One group of up to 16 rows for one candidate.
template <typename Error>
inline void group_errors(const float* weight, int64_t rows, int64_t stride, const float* scales,
                         const float* inverses, int64_t size, const Rule& rule, Error* out) {
  Floats low{}, high{};
  for (int64_t row = 0; row < rows; ++row) {
    Floats least_here = all(std::numeric_limits<float>::infinity()), largest_here = -least_here;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Floats scaled = load(weight + row * stride + i) * load(scales + i);
      least_here = smaller(least_here, scaled);
      largest_here = larger(largest_here, scaled);
    }
    low[row] = least(least_here);
    high[row] = largest(largest_here);
  }
  const Grids grids = fit(low * rule.range_factor, high * rule.range_factor, rule);
  const Floats steps_of_one = all(1.0f) / grids.scale;
  for (int64_t row = 0; row < rows; ++row) {
    const Grids grid = {all(grids.scale[row]), all(grids.zero[row]), all(grids.bottom[row]), all(grids.top[row])};
    const Floats inverse = all(steps_of_one[row]);
    for (int64_t i = 0; i < size; i += kLanes) {
      const Floats w = load(weight + row * stride + i), s = load(scales + i);
      const Floats rounded = step_of(quotient(w * s, grid.scale, inverse), grid) * grid.scale;
      put(out + row * stride + i, quotient(rounded, s, load(inverses + i)) - w);
    }
  }
}

template <typename Error>
void rounding_errors(const float* weight, const float* scales, int64_t candidates, int64_t rows, int64_t channels,
                     int64_t size, const Rule& rule, Error* errors, int threads) {
  std::vector<float> inverses(candidates * channels);
  for (int64_t i = 0; i < candidates * channels; ++i) inverses[i] = 1.0f / scales[i];
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t candidate = 0; candidate < candidates; ++candidate)
    for (int64_t row = 0; row < rows; row += kLanes)
      for (int64_t start = 0; start < channels; start += size)
        group_errors(weight + row * channels + start, std::min<int64_t>(kLanes, rows - row), channels,
                     scales + candidate * channels + start, inverses.data() + candidate * channels + start, size,
                     rule, errors + (candidate * rows + row) * channels + start);
}

// ------------------------------------------------------------------------------------------------- the clip step
//
// A panel is 32 rows, in vectors of 16: values lie channel by channel, so every row has a lane of its own, with its
// own grid and its own loss. H is symmetric, so of e H e^T only what lies on and below the diagonal is multiplied,
// with half of the diagonal: e H e^T / 2 + e o^T = sum over n of e_n (o_n + sum over k <= n of H'_nk e_k).

constexpr int kHalves = 2;
constexpr int kPanel = kHalves * kLanes;
constexpr int kSize = 128;  // the largest group

struct alignas(64) Panel {
  float weight[kSize][kPanel], others[kSize][kPanel], error[kSize][kPanel];
#ifdef NIBBLE_AMX
  uint32_t pairs[kHalves][kSize / 2][kLanes];  // of channels, in bfloat16
  float sums[2][2][kHalves][kLanes][kLanes];   // channel, row
#endif
};

#include "search_products.h"

// 16 rows of a panel, with the best range so far of each.
struct Half {
  int64_t row, count;  // the first one; how many there are
  Floats low, high;    // the range of the weights, with zero
  Floats factors[2], base[2], tried[2];  // of the lower and the upper bound: best, to start a list from, at hand
  Floats loss;

  Grids grid(const Floats* factor, const Rule& rule) const { return fit(low * factor[0], high * factor[1], rule); }
};

// Rows of a matrix to channels of lanes; rows that are not there are zeros.
void gather(const Rows& from, const Half& half, int64_t size, float* to) {
  for (int64_t first = 0; first < size; first += kLanes) {
    const float* at = from.at + half.row * from.stride + first;
#ifdef __AVX512F__
    __m512i r[kLanes];
    for (int i = 0; i < kLanes; ++i)
      r[i] = i < half.count ? _mm512_loadu_si512(at + i * from.stride) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(to + (first + i) * kPanel, r[i]);
#else
    for (int i = 0; i < kLanes; ++i)
      for (int c = 0; c < kLanes; ++c) to[(first + c) * kPanel + i] = i < half.count ? at[i * from.stride + c] : 0.0f;
#endif
  }
}

void scatter(const float* from, const Half& half, int64_t size, const Rows& to) {
  for (int64_t first = 0; first < size; first += kLanes) {
    float* at = to.at + half.row * to.stride + first;
#ifdef __AVX512F__
    __m512i r[kLanes];
    for (int i = 0; i < kLanes; ++i) r[i] = _mm512_loadu_si512(from + (first + i) * kPanel);
    transpose(r);
    for (int i = 0; i < half.count; ++i) _mm512_storeu_si512(at + i * to.stride, r[i]);
#else
    for (int i = 0; i < half.count; ++i)
      for (int c = 0; c < kLanes; ++c) at[i * to.stride + c] = from[(first + c) * kPanel + i];
#endif
  }
}

// Half the loss of each row on these grids.
void half_losses(Panel& panel, const Block& block, const Grids* grids, int64_t size, Floats* loss) {
  for (int half = 0; half < kHalves; ++half) {
    const Grids grid = grids[half];
    const Floats inverse = all(1.0f) / grid.scale;
    const auto error_at = [&](int64_t n) {
      const Floats weight = load(&panel.weight[n][half * kLanes]);
      const Floats error = fused(step_of(weight * inverse, grid), grid.scale, -weight);
      store(&panel.error[n][half * kLanes], error);
      return error;
    };
    Floats linear{};
    for (int64_t n = 0; n < size; n += 2) {
      const Floats first = error_at(n), second = error_at(n + 1);
      linear = fused(first, load(&panel.others[n][half * kLanes]), linear);
      linear = fused(second, load(&panel.others[n + 1][half * kLanes]), linear);
      keep_pairs(panel, half, n, first, second);
    }
    loss[half] = linear;
  }
  add_quadratic(panel, block, size, loss);
}

void start(const ClipStep& step, int64_t row, int index, Panel& panel, Half& half) {
  half.row = row + index * kLanes;
  half.count = std::max<int64_t>(0, std::min<int64_t>(kLanes, step.rows - half.row));
  gather(step.weight, half, step.size, &panel.weight[0][index * kLanes]);
  gather(step.others, half, step.size, &panel.others[0][index * kLanes]);
  half.low = half.high = Floats{};
  for (int64_t n = 0; n < step.size; ++n) {
    half.low = smaller(half.low, load(&panel.weight[n][index * kLanes]));
    half.high = larger(half.high, load(&panel.weight[n][index * kLanes]));
  }
  for (int bound = 0; bound < 2; ++bound) {
    half.factors[bound] = all(1.0f);
    for (int i = 0; i < half.count; ++i)
      half.factors[bound][i] = step.ranges.at[bound * step.ranges.stride + half.row + i];
  }
  half.loss = all(std::numeric_limits<float>::infinity());
}

// Ranges, grids and errors that were found.
void finish(const ClipStep& step, const Rule& rule, int index, Panel& panel, const Half& half) {
  const Grids grid = half.grid(half.factors, rule);
  const Floats found[4] = {half.factors[0], half.factors[1], grid.scale, grid.zero};
  for (int kind = 0; kind < 4; ++kind)
    for (int i = 0; i < half.count; ++i) step.ranges.at[kind * step.ranges.stride + half.row + i] = found[kind][i];
  for (int64_t n = 0; n < step.size; ++n) {
    const Floats weight = load(&panel.weight[n][index * kLanes]);
    store(&panel.error[n][index * kLanes], step_of(weight / grid.scale, grid) * grid.scale - weight);
  }
  scatter(&panel.error[0][index * kLanes], half, step.size, step.error);
}

void try_factors(const ClipStep& step, const Rule& rule, const Block& block, Panel& panel, Half* halves,
                 const float* factor) {
  Grids grids[kHalves];
  Floats found[kHalves];
  for (int half = 0; half < kHalves; ++half) {
    for (int bound = 0; bound < 2; ++bound) halves[half].tried[bound] = halves[half].base[bound] * factor[bound];
    grids[half] = halves[half].grid(halves[half].tried, rule);
  }
  half_losses(panel, block, grids, step.size, found);
  for (int half = 0; half < kHalves; ++half) {
    Half& each = halves[half];
    const auto better = found[half] < each.loss;
    each.loss = better ? found[half] : each.loss;
    for (int bound = 0; bound < 2; ++bound) each.factors[bound] = better ? each.tried[bound] : each.factors[bound];
  }
}

void clip_panel(const ClipStep& step, const Rule& rule, const Block& block, int64_t row, Panel& panel) {
  Half halves[kHalves];
  for (int half = 0; half < kHalves; ++half) start(step, row, half, panel, halves[half]);
  // Each factor is applied to what was best when its list began.
  const auto try_list = [&](const float* list, int64_t count, bool low, bool high) {
    for (Half& half : halves) std::copy_n(half.factors, 2, half.base);
    for (int64_t i = 0; i < count; ++i) {
      const float factor[2] = {low ? list[i] : 1.0f, high ? list[i] : 1.0f};
      try_factors(step, rule, block, panel, halves, factor);
    }
  };
  const float same = 1.0f, *side = step.factors + step.joint;
  try_list(&same, 1, true, true);
  try_list(step.factors, step.joint, true, true);
  try_list(side, step.side, true, rule.symmetric);
  if (!rule.symmetric) try_list(side, step.side, false, true);
  for (int half = 0; half < kHalves; ++half) finish(step, rule, half, panel, halves[half]);
}

}  // namespace

#include "columns.h"

extern "C" {

// Whether the system grants AMX's registers; true without AMX.
int nibble_search_ready() {
#ifdef NIBBLE_AMX
  return !syscall(SYS_arch_prctl, kPermission, kFeature);
#else
  return 1;
#endif
}

// errors: (candidates, rows, channels) of float32 (type 2) or bfloat16 (type 1).
void nibble_rounding_errors(const float* weight, const float* scales, int64_t candidates, int64_t rows,
                            int64_t channels, int64_t size, const Rule* rule, void* errors, int64_t type, int threads) {
  if (type == kFloat32)
    rounding_errors(weight, scales, candidates, rows, channels, size, *rule, static_cast<float*>(errors), threads);
  else
    rounding_errors(weight, scales, candidates, rows, channels, size, *rule, static_cast<uint16_t*>(errors), threads);
}

void nibble_clip_step(const ClipStep* step, const Rule* rule) {
  const Block block(step->block, step->size);
#pragma omp parallel num_threads(int(step->threads))
  {
    Panel* panel = new Panel;
    const ProductScope scope;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row += kPanel) clip_panel(*step, *rule, block, row, *panel);
    delete panel;
  }
}

void nibble_round_columns(const ColumnBlock* block) {
  const Coefficients coefficients(*block);
#pragma omp parallel for num_threads(int(block->threads)) schedule(static)
  for (int64_t row = 0; row < block->rows; row += kPanel) round_panel(*block, coefficients, row);
}

// total[row] += sum over columns of left * right, both bfloat16.
void nibble_row_dots(const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t right_stride,
                     float* total, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint16_t *a = left + row * left_stride, *b = right + row * right_stride;
    Floats sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= columns; i += 2 * kLanes)
      for (int half = 0; half < 2; ++half)
        sums[half] = fused(load(a + i + half * kLanes), load(b + i + half * kLanes), sums[half]);
    float sum = 0.0f;
    for (; i < columns; ++i) sum += widened(a[i]) * widened(b[i]);
    sums[0] += sums[1];
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[0][lane];
    total[row] += sum;
  }
}

}  // extern "C"
