// Columns of a weight in turn, each rounded after what the ones before it leave: kernels/search/columns.py.

#pragma once

extern "C" {

// All but the coefficients have a row of values, one for each row of the weight, for each column (scale, low: group).
struct ColumnBlock {
  Rows target, before, rounded, change;  // `before` may be absent
  Rows coefficients;                     // (columns, columns)
  Rows scale, low;
  const int64_t* group;  // of each column
  int64_t columns, rows, threads;
  float steps;  // the largest integer
};
}

namespace {

constexpr int kTurns = 128;  // the most columns of a block
constexpr int kStrip = 8;    // columns whose sums are made together

inline Floats load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Floats values{};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return values;
}

inline void store_some(float* to, Floats values, int64_t count) {
  if (count >= kLanes) return store(to, values);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// What lies above the diagonal; zeros elsewhere.
struct alignas(64) Coefficients {
  explicit Coefficients(const ColumnBlock& block) {
    for (int64_t k = 0; k < block.columns; ++k)
      for (int64_t n = k + 1; n < block.columns; ++n) values[k][n] = block.coefficients.at[k * block.coefficients.stride + n];
  }
  float values[kTurns][kTurns] = {};
};

// One column of up to 16 rows, with its sum complete: rounded, and what that changes.
inline Floats turn(const ColumnBlock& block, int64_t column, int64_t row, int64_t count, Floats target) {
  const int64_t group = block.group[column];
  const Floats scale = count < kLanes ? larger(load_some(block.scale.at + group * block.scale.stride + row, count), all(1e-30f))
                                      : load(block.scale.at + group * block.scale.stride + row);
  const Floats low = load_some(block.low.at + group * block.low.stride + row, count);
  const Floats steps = nearest_whole(smaller(low + all(block.steps), larger(low, target / scale)));
  const Floats rounded = steps * scale;
  store_some(block.rounded.at + column * block.rounded.stride + row, rounded, count);
  const Floats change = block.before.at
                            ? rounded - load_some(block.before.at + column * block.before.stride + row, count)
                            : target - rounded;
  store_some(block.change.at + column * block.change.stride + row, change, count);
  return change;
}

void round_panel(const ColumnBlock& block, const Coefficients& coefficients, int64_t row) {
  alignas(64) float changes[kTurns][kPanel];
  int64_t counts[kHalves];
  for (int half = 0; half < kHalves; ++half)
    counts[half] = std::max<int64_t>(0, std::min<int64_t>(kLanes, block.rows - row - half * kLanes));
  for (int64_t first = 0; first < block.columns; first += kStrip) {
    const int64_t strip = std::min<int64_t>(kStrip, block.columns - first);
    Floats sums[kStrip][kHalves] = {};
    for (int64_t i = 0; i < strip; ++i)
      for (int half = 0; half < kHalves; ++half)
        sums[i][half] = load_some(block.target.at + (first + i) * block.target.stride + row + half * kLanes, counts[half]);
    for (int64_t k = 0; k < first; ++k) {
      const Floats change[kHalves] = {load(&changes[k][0]), load(&changes[k][kLanes])};
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half)
          sums[i][half] = fused(change[half], all(coefficients.values[k][first + i]), sums[i][half]);
    }
    for (int64_t i = 0; i < strip; ++i)
      for (int half = 0; half < kHalves; ++half) {
        const Floats change = turn(block, first + i, row + half * kLanes, counts[half], sums[i][half]);
        store(&changes[first + i][half * kLanes], change);
        for (int64_t later = i + 1; later < strip; ++later)
          sums[later][half] = fused(change, all(coefficients.values[first + i][first + later]), sums[later][half]);
      }
  }
}

}  // namespace
