// Attention of one token of a sequence over the columns of its row of the cache.

#pragma once

namespace {

// Keys and values of all layers: (rows, heads, columns, head size) each.
struct CacheRows {
  const void* const* keys;  // of each layer
  const void* const* values;
  int64_t row_stride, head_stride;  // in numbers; columns are head_size apart
  int64_t type;                     // a ScaleType
};

// The scores of a query for columns first .. last - 1, the largest of them.
template <class T, int VECTORS>
float scores_of(const float* query, const T* keys, int64_t count, float scaling, float* scores) {
  constexpr int kSize = VECTORS * kLanes;
  Floats q[VECTORS];
  for (int v = 0; v < VECTORS; ++v) q[v] = load(query + v * kLanes) * scaling;
  Floats largest = all(-INFINITY);
  for (int64_t column = 0; column < count; column += kLanes) {
    Floats sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* key = keys + std::min(column + i, count - 1) * kSize;
      sums[i] = q[0] * load(key);
#pragma GCC unroll 16
      for (int v = 1; v < VECTORS; ++v) sums[i] = fused(q[v], load(key + v * kLanes), sums[i]);
    }
    const Floats here = sums_of(sums);
    largest = larger(largest, here);  // columns beyond the end repeat the last
    store(scores + column, here);
  }
  float most = largest[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, largest[i]);
  return most;
}

// Scores (room for whole vectors) to weights, zero beyond `count`; 1 over their sum.
inline float weigh(float* scores, int64_t count, float largest) {
  Floats total{};
  for (int64_t column = 0; column < count; column += kLanes) {
    Floats weights = exponential(load(scores + column) - largest);
    for (int64_t i = count - column; i < kLanes; ++i) weights[i] = 0.0f;
    store(scores + column, weights);
    total += weights;
  }
  return 1.0f / sum_of(total);
}

template <class T, int VECTORS>
void mix(const float* weights, const T* values, int64_t count, float factor, float* out) {
  Floats sums[VECTORS] = {};
  for (int64_t column = 0; column < count; ++column) {
    const Floats weight = all(weights[column]);
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v)
      sums[v] = fused(weight, load(values + (column * VECTORS + v) * kLanes), sums[v]);
  }
  for (int v = 0; v < VECTORS; ++v) store(out + v * kLanes, sums[v] * factor);
}

// The query heads (`group` of them) that share a head of keys and values, `count` columns.
template <class T, int VECTORS>
void attend(const float* queries, int64_t group, const void* keys, const void* values, int64_t offset, int64_t count,
            float scaling, float* scores, float* out) {
  for (int64_t head = 0; head < group; ++head) {
    const int64_t at = head * VECTORS * kLanes;
    const float largest =
        scores_of<T, VECTORS>(queries + at, static_cast<const T*>(keys) + offset, count, scaling, scores);
    const float factor = weigh(scores, count, largest);
    mix<T, VECTORS>(scores, static_cast<const T*>(values) + offset, count, factor, out + at);
  }
}

using Attend = void (*)(const float*, int64_t, const void*, const void*, int64_t, int64_t, float, float*, float*);

template <class T>
Attend attend_of(int64_t head_size) {
  switch (head_size) {
    case 16: return attend<T, 1>;
    case 32: return attend<T, 2>;
    case 64: return attend<T, 4>;
    case 80: return attend<T, 5>;
    case 96: return attend<T, 6>;
    case 128: return attend<T, 8>;
    case 256: return attend<T, 16>;
    default: return nullptr;
  }
}

inline Attend attend_of(int64_t head_size, int64_t type) {
  switch (type) {
    case kHalf: return attend_of<Half>(head_size);
    case kBfloat: return attend_of<BFloat>(head_size);
    default: return attend_of<float>(head_size);
  }
}

// `count` numbers to index `at` of the cache.
inline void put_numbers(const float* from, int64_t count, void* to, int64_t type, int64_t at) {
  const auto put = [&](auto* numbers) {
    for (int64_t i = 0; i < count; ++i) put_number(numbers + at + i, from[i]);
  };
  switch (type) {
    case kHalf: return put(static_cast<Half*>(to));
    case kBfloat: return put(static_cast<BFloat*>(to));
    default: return put(static_cast<float*>(to));
  }
}

}  // namespace
