// A whole decoder of Llama's shape for some tokens, as one call: norms, linears, rotary positions, attention over the
// rows of the cache, gated MLP, head. All in float32 between the weights and the cache.
//
// The threads of a call go through its stages together. What is small (norms) each computes for itself, which is
// cheaper than waiting for another; outputs of linears and heads of attention are dealt out.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "blocks.h"
#include "registers.h"
#include "vectors.h"

#include "numbers.h"

#include "products.h"

#include "attention.h"

namespace {

struct Layer {
  Linear query, key, value, output, gate, up, down;
  const float* attention_norm;
  const float* mlp_norm;
  const float* query_norm;  // of a head, or null
  const float* key_norm;
  int64_t window;  // columns that a token attends to, itself included; 0: all
};

struct Decoder {
  const Layer* layers;
  int64_t num_layers, hidden, intermediate, heads, kv_heads, head_size;
  const void* embedding;  // (vocabulary, hidden)
  int64_t embedding_type;
  const float* cosines;  // (positions, head size / 2)
  const float* sines;
  const float* final_norm;
  Linear head;
  float epsilon, scaling;
};

// Tokens of any sequences, in the order of their columns.
struct Tokens {
  int64_t count;
  const int64_t* ids;
  const int64_t* positions;
  const int64_t* rows;     // of the cache
  const int64_t* columns;  // where its key and value go
  const int64_t* firsts;   // the first column of its sequence
  int64_t outputs;         // how many tokens' logits are asked for
  const int64_t* asked;    // which
};

inline int64_t rounded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Buffers that all threads share, (tokens, ...) each.
struct Shared {
  std::vector<float> states, queries, keys, values, mixed, gated;
  void size(const Decoder& d, int64_t tokens) {
    const auto fit = [&](std::vector<float>& buffer, int64_t width) {
      if (buffer.size() < size_t(tokens * width)) buffer.resize(tokens * width);
    };
    fit(states, d.hidden);
    fit(queries, d.heads * d.head_size);
    fit(keys, d.kv_heads * d.head_size);
    fit(values, d.kv_heads * d.head_size);
    fit(mixed, d.heads * d.head_size);
    fit(gated, d.intermediate);
  }
};

// One thread's way through the stages.
class Walk {
 public:
  Walk(const Decoder& decoder, const Tokens& tokens, const CacheRows& cache, Shared& shared)
      : d(decoder), t(tokens), cache(cache), s(shared), me(omp_get_thread_num()), all_threads(omp_get_num_threads()) {
    int64_t longest = 0;
    for (int64_t i = 0; i < t.count; ++i) longest = std::max(longest, t.columns[i] - t.firsts[i] + 1);
    scores.resize(rounded(longest, kLanes));
  }

  void run(float* logits) {
    embed();
    wait();
    for (int64_t layer = 0; layer < d.num_layers; ++layer) {
      attention(d.layers[layer], layer);
      mlp(d.layers[layer]);
    }
    x.begin(t.outputs, d.hidden);
    for (int64_t i = 0; i < t.outputs; ++i) norm(&s.states[t.asked[i] * d.hidden], d.hidden, d.final_norm, x.row(i));
    spread(d.head, [&](int64_t row, int64_t first, Floats values) {
      put_outputs(d.head, values, first, logits + row * d.head.out);
    });
  }

 private:
  const Decoder& d;
  const Tokens& t;
  const CacheRows& cache;
  Shared& s;
  const int64_t me, all_threads;
  static thread_local Input x;  // of the linears of a stage
  static thread_local std::vector<float> scores;

  void wait() const {
#pragma omp barrier
  }

  // This thread's share of `count` things.
  int64_t first_of(int64_t count) const { return me * count / all_threads; }
  int64_t last_of(int64_t count) const { return (me + 1) * count / all_threads; }
  template <class DO>
  void share(int64_t count, const DO& act) const {
    for (int64_t i = first_of(count); i < last_of(count); ++i) act(i);
  }

  // This thread's share of a linear's outputs.
  template <class PUT>
  void spread(const Linear& linear, const PUT& put) const {
    product(linear, first_of(blocks_of(linear)), last_of(blocks_of(linear)), x, put);
  }

  void embed() {
    share(t.count, [&](int64_t i) {
      for (int64_t c = 0; c < d.hidden; c += kLanes)
        store(&s.states[i * d.hidden + c], load_as(d.embedding, d.embedding_type, t.ids[i] * d.hidden + c));
    });
  }

  void norm(const float* from, int64_t count, const float* weight, float* to) const {
    Floats squares{};
    for (int64_t c = 0; c < count; c += kLanes) squares = fused(load(from + c), load(from + c), squares);
    const float factor = 1.0f / std::sqrt(sum_of(squares) / float(count) + d.epsilon);
    for (int64_t c = 0; c < count; c += kLanes) store(to + c, load(from + c) * factor * load(weight + c));
  }

  // The states of all tokens, normed, as the input of linears.
  void read_normed(const float* weight) {
    x.begin(t.count, d.hidden);
    for (int64_t i = 0; i < t.count; ++i) norm(&s.states[i * d.hidden], d.hidden, weight, x.row(i));
  }

  // Rows that all threads have written, as the input of linears.
  void read(const std::vector<float>& buffer, int64_t width) {
    x.begin(t.count, width);
    std::memcpy(x.row(0), buffer.data(), t.count * width * sizeof(float));
  }

  void attention(const Layer& layer, int64_t index) {
    read_normed(layer.attention_norm);
    const auto into = [&](const Linear& linear, std::vector<float>& buffer) {
      spread(linear, [&](int64_t row, int64_t first, Floats values) {
        put_outputs(linear, values, first, &buffer[row * linear.out]);
      });
    };
    into(layer.query, s.queries);
    into(layer.key, s.keys);
    into(layer.value, s.values);
    wait();
    share(t.count * d.kv_heads, [&](int64_t i) { place(layer, index, i / d.kv_heads, i % d.kv_heads); });
    wait();
    share(t.count * d.kv_heads, [&](int64_t i) { look(layer, index, i / d.kv_heads, i % d.kv_heads); });
    wait();
    read(s.mixed, d.heads * d.head_size);
    add(layer.output);
    wait();
  }

  int64_t place_of(int64_t token, int64_t head, int64_t column) const {
    return t.rows[token] * cache.row_stride + head * cache.head_stride + column * d.head_size;
  }

  // Turns the queries and the key of a head, and puts its key and value into the cache.
  void place(const Layer& layer, int64_t index, int64_t token, int64_t head) {
    const int64_t group = d.heads / d.kv_heads, at = (token * d.kv_heads + head) * d.head_size;
    for (int64_t i = 0; i < group; ++i)
      turn(&s.queries[((token * d.kv_heads + head) * group + i) * d.head_size], layer.query_norm, t.positions[token]);
    turn(&s.keys[at], layer.key_norm, t.positions[token]);
    const int64_t to = place_of(token, head, t.columns[token]);
    put_numbers(&s.keys[at], d.head_size, const_cast<void*>(cache.keys[index]), cache.type, to);
    put_numbers(&s.values[at], d.head_size, const_cast<void*>(cache.values[index]), cache.type, to);
  }

  void turn(float* head, const float* weight, int64_t position) const {
    if (weight) norm(head, d.head_size, weight, head);
    const int64_t half = d.head_size / 2;
    const float *cosine = d.cosines + position * half, *sine = d.sines + position * half;
    for (int64_t i = 0; i < half; ++i) {
      const float low = head[i], high = head[half + i];
      head[i] = low * cosine[i] - high * sine[i];
      head[half + i] = high * cosine[i] + low * sine[i];
    }
  }

  void look(const Layer& layer, int64_t index, int64_t token, int64_t head) {
    const int64_t group = d.heads / d.kv_heads, at = (token * d.heads + head * group) * d.head_size;
    const int64_t end = t.columns[token] + 1;
    const int64_t first = layer.window ? std::max(t.firsts[token], end - layer.window) : t.firsts[token];
    attend_of(d.head_size, cache.type)(&s.queries[at], group, cache.keys[index], cache.values[index],
                                       place_of(token, head, first), end - first, d.scaling, scores.data(),
                                       &s.mixed[at]);
  }

  // Adds the outputs of a linear to the states.
  void add(const Linear& linear) {
    spread(linear, [&](int64_t row, int64_t first, Floats values) {
      float* state = &s.states[row * d.hidden + first];
      if (linear.bias) values += load(linear.bias + first);
      store(state, load(state) + values);
    });
  }

  void mlp(const Layer& layer) {
    read_normed(layer.mlp_norm);
    const auto at = [&](int64_t row, int64_t first) { return &s.gated[row * d.intermediate + first]; };
    spread(layer.gate, [&](int64_t row, int64_t first, Floats values) {
      store(at(row, first), silu(layer.gate.bias ? values + load(layer.gate.bias + first) : values));
    });
    spread(layer.up, [&](int64_t row, int64_t first, Floats values) {
      if (layer.up.bias) values += load(layer.up.bias + first);
      store(at(row, first), load(at(row, first)) * values);
    });
    wait();
    read(s.gated, d.intermediate);
    add(layer.down);
    wait();
  }
};

thread_local Input Walk::x;
thread_local std::vector<float> Walk::scores;

}  // namespace

extern "C" {

// out (rows, linear.out) = x (rows, linear.in) times the weight, plus bias. linear.in is a multiple of 32.
void nibble_product(const Linear* linear, const float* x, int64_t rows, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    thread_local Input input;
    input.begin(rows, linear->in);
    std::memcpy(input.row(0), x, rows * linear->in * sizeof(float));
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads(), blocks = blocks_of(*linear);
    product(*linear, me * blocks / all, (me + 1) * blocks / all, input, [&](int64_t row, int64_t first, Floats values) {
      put_outputs(*linear, values, first, out + row * linear->out);
    });
  }
}

// logits: (outputs, vocabulary). Sizes and addresses are the caller's to check (kernels/cpu/whole_decoder.py).
void nibble_decode(const Decoder* decoder, const Tokens* tokens, const CacheRows* cache, float* logits, int threads) {
  thread_local Shared shared;
  shared.size(*decoder, tokens->count);
  Shared& here = shared;  // the caller's, for all threads
#pragma omp parallel num_threads(threads)
  Walk(*decoder, *tokens, *cache, here).run(logits);
}

}  // extern "C"
