// Causal attention within documents on a CPU, forward and backward, block by block; scores never leave the caches.
//
// B batch, S length, H heads of queries, G heads of keys and values. Scores are held as [keys, queries]: a vector has
// one key's scores for kLanes queries, so that maxima, sums and masks need no exchange between lanes. Arithmetic is
// float32; X is the type of all arrays but the logarithms, float or bfloat16.
// Source of the algorithm: FlashAttention-2 (arXiv 2307.08691).

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "interface.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

using namespace moe;

constexpr int kQueries = 64, kKeys = 128;  // of a block of scores, which with its operands stays in the L2 cache
static_assert(kQueries % kLanes == 0);

constexpr float kHidden = -1e30f;  // the score of a key that a query does not see

struct Shape {
  int64_t batch, length, heads, groups;
  int width, value;  // of queries and keys, and of values
  float scale;
  int64_t window;  // tokens that a token sees, itself included
};

struct Scratch {
  Buffer query, query_columns, dy, dy_columns, key, value, scores, d_scores, y, d_query, d_key, d_value;
};
thread_local Scratch scratch;

int whole_vectors(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// n rows of an array, `stride` apart in it, as float; each is filled with zeros to whole vectors
template <class X>
void read_rows(const X* from, int64_t stride, int64_t n, int width, float* to, float factor = 1.0f) {
  const int whole = whole_vectors(width);
  for (int64_t i = 0; i < n; i++, from += stride, to += whole) {
    widen(from, width, to);
    std::fill(to + width, to + whole, 0.0f);
    if (factor != 1.0f)
      for (int j = 0; j < width; j++) to[j] *= factor;
  }
}

template <class X>
void write_rows(const float* from, int64_t n, int width, X* to, int64_t stride) {
  const int whole = whole_vectors(width);
  for (int64_t i = 0; i < n; i++) narrow(from + i * whole, width, to + i * stride);
}

// the transpose [width, kQueries] of rows [n, width]; zero for queries that a block lacks
void transpose_rows(const float* from, int n, int width, float* to) {
  const int whole = whole_vectors(width);
  for (int i0 = 0; i0 < kQueries; i0 += kLanes)
    for (int j0 = 0; j0 < width; j0 += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) square[i] = i0 + i < n ? load(from + (i0 + i) * whole + j0) : Vec{};
      transpose(square);
      for (int j = 0; j < std::min(kLanes, width - j0); j++) store(to + (j0 + j) * kQueries + i0, square[j]);
    }
}

// which keys a block of queries sees: those of a query's document that are not later than it, within its window
class Sight {
 public:
  enum Seen { kNone, kSome, kAll };

  Sight(const int32_t* documents, int first, int n, int64_t window)
      : documents_(documents), first_(first), last_(first + n - 1), window_(int(std::min<int64_t>(window, last_ + 1))) {
    for (int i = 0; i < kQueries; i++) {
      own_[i] = documents[first + std::min(i, n - 1)];
      number_[i] = first + i;
    }
    low_ = *std::min_element(own_, own_ + n);
    high_ = *std::max_element(own_, own_ + n);
  }

  int first_key() const { return std::max(0, first_ + 1 - window_); }

  Seen of(int first_key, int keys) const {
    auto [low, high] = std::minmax_element(documents_ + first_key, documents_ + first_key + keys);
    if (*high < low_ || *low > high_) return kNone;
    const bool one = *low == *high && low_ == high_;
    return one && first_key + keys - 1 <= first_ && first_key > last_ - window_ ? kAll : kSome;
  }

  // all bits set for those of kLanes queries that see a key
  IntVec mask(int key, int query) const {
    IntVec own, number;
    std::memcpy(&own, own_ + query, sizeof(own));
    std::memcpy(&number, number_ + query, sizeof(number));
    return (own == documents_[key]) & (number >= key) & (number < key + window_);
  }

 private:
  const int32_t* documents_;
  int first_, last_, window_;
  int32_t own_[kQueries], number_[kQueries], low_, high_;
};

// of every query of a block: its largest score so far, and the sum of e^(score - largest)
struct Softmax {
  float largest[kQueries], sum[kQueries];
};

// scores [keys, kQueries] become e^(score - largest); returns in `kept` by what earlier sums and means shrink
void exponentiate(const Sight& sight, bool masked, int first_key, int keys, float* scores, Softmax& all_keys,
                  float* kept) {
  for (int i = 0; i < kQueries; i += kLanes) {
    const Vec before = load(all_keys.largest + i);
    Vec largest = before;
    for (int j = 0; j < keys; j++) {
      float* at = scores + j * kQueries + i;
      if (masked) store(at, sight.mask(first_key + j, i) ? load(at) : all(kHidden));
      largest = load(at) > largest ? load(at) : largest;
    }
    Vec sum = {};
    for (int j = 0; j < keys; j++) {
      float* at = scores + j * kQueries + i;
      Vec e = exponential(load(at) - largest);
      if (masked) e = load(at) == all(kHidden) ? Vec{} : e;
      store(at, e);
      sum += e;
    }
    const Vec shrunk = exponential(before - largest);
    store(kept + i, shrunk);
    store(all_keys.largest + i, largest);
    store(all_keys.sum + i, load(all_keys.sum + i) * shrunk + sum);
  }
}

// y [B, S, H, V], and for the backward pass the logarithm of every softmax's sum [B, H, S]
template <class X>
void forward(ffi::ThreadPool& pool, const Shape& s, const X* query, const X* key, const X* value,
             const int32_t* documents, X* y, float* logarithms) {
  const int64_t blocks = (s.length + kQueries - 1) / kQueries, sequences = s.batch * s.heads;
  const int width = whole_vectors(s.width), value_width = whole_vectors(s.value);
  parallel(pool, blocks * sequences, [&](int64_t task) {
    const int64_t block = blocks - 1 - task / sequences;  // the longest first, so that no thread begins one last
    const int64_t row = task % sequences / s.heads, head = task % s.heads, group = head / (s.heads / s.groups);
    const int first = int(block * kQueries), n = int(std::min<int64_t>(kQueries, s.length - first));
    const int64_t at = (row * s.length + first) * s.heads + head;
    const Sight sight(documents + row * s.length, first, n, s.window);
    float *rows = scratch.query.of(kQueries * width), *columns = scratch.query_columns.of(kQueries * width);
    float *keys_of = scratch.key.of(kKeys * width), *values_of = scratch.value.of(kKeys * value_width);
    float *scores = scratch.scores.of(kKeys * kQueries), *mean = scratch.y.of(kQueries * value_width);
    read_rows(query + at * s.width, s.heads * s.width, n, s.width, rows, s.scale);
    transpose_rows(rows, n, s.width, columns);
    std::fill(mean, mean + n * value_width, 0.0f);
    Softmax softmax;
    std::fill(softmax.largest, softmax.largest + kQueries, kHidden);
    std::fill(softmax.sum, softmax.sum + kQueries, 0.0f);
    for (int first_key = sight.first_key(); first_key < first + n; first_key += kKeys) {
      const int keys = std::min(kKeys, first + n - first_key);
      const Sight::Seen seen = sight.of(first_key, keys);
      if (seen == Sight::kNone) continue;
      const int64_t key_at = (row * s.length + first_key) * s.groups + group;
      read_rows(key + key_at * s.width, s.groups * s.width, keys, s.width, keys_of);
      read_rows(value + key_at * s.value, s.groups * s.value, keys, s.value, values_of);
      multiply_in_place<false>(keys, s.width, kQueries, keys_of, width, columns, kQueries, scores, kQueries, false);
      float kept[kQueries];
      exponentiate(sight, seen == Sight::kSome, first_key, keys, scores, softmax, kept);
      for (int i = 0; i < n; i++)
        for (int j = 0; j < value_width; j++) mean[i * value_width + j] *= kept[i];
      multiply_in_place<true>(n, keys, value_width, scores, kQueries, values_of, value_width, mean, value_width, true);
    }
    for (int i = 0; i < n; i++) {
      const float share = 1.0f / softmax.sum[i];
      for (int j = 0; j < value_width; j++) mean[i * value_width + j] *= share;
      logarithms[(row * s.heads + head) * s.length + first + i] = softmax.largest[i] + std::log(softmax.sum[i]);
    }
    write_rows(mean, n, s.value, y + at * s.value, s.heads * s.value);
  });
}

// what the weights become in the backward pass: scores the weights, d_scores the gradients of the scores;
// `inner` is the product of every query's y and dy
void differentiate(const Sight& sight, bool masked, int first_key, int keys, const float* logarithms,
                   const float* inner, float* scores, float* d_scores) {
  for (int i = 0; i < kQueries; i += kLanes) {
    const Vec logarithm = load(logarithms + i), own = load(inner + i);
    for (int j = 0; j < keys; j++) {
      const int at = j * kQueries + i;
      Vec weight = exponential(load(scores + at) - logarithm);
      if (masked) weight = sight.mask(first_key + j, i) ? weight : Vec{};
      store(scores + at, weight);
      store(d_scores + at, weight * (load(d_scores + at) - own));
    }
  }
}

// the gradients of all inputs; a task is a head of keys and values of one row, with all queries that share it
template <class X>
void backward(ffi::ThreadPool& pool, const Shape& s, const X* query, const X* key, const X* value,
              const int32_t* documents, const X* y, const float* logarithms, const X* dy, X* d_query, X* d_key,
              X* d_value) {
  const int width = whole_vectors(s.width), value_width = whole_vectors(s.value);
  const int64_t shared = s.heads / s.groups;
  parallel(pool, s.batch * s.groups, [&](int64_t task) {
    const int64_t row = task / s.groups, group = task % s.groups, key_at = row * s.length * s.groups + group;
    float *keys_of = scratch.key.of(s.length * width), *d_keys_of = scratch.d_key.of(s.length * width);
    float *values_of = scratch.value.of(s.length * value_width);
    float *d_values_of = scratch.d_value.of(s.length * value_width);
    float *rows = scratch.query.of(kQueries * width), *columns = scratch.query_columns.of(kQueries * width);
    float *d_rows = scratch.d_query.of(kQueries * width), *y_row = scratch.y.of(value_width);
    float *dy_rows = scratch.dy.of(kQueries * value_width), *dy_columns = scratch.dy_columns.of(kQueries * value_width);
    float *scores = scratch.scores.of(kKeys * kQueries), *d_scores = scratch.d_scores.of(kKeys * kQueries);
    read_rows(key + key_at * s.width, s.groups * s.width, s.length, s.width, keys_of);
    read_rows(value + key_at * s.value, s.groups * s.value, s.length, s.value, values_of);
    std::fill(d_keys_of, d_keys_of + s.length * width, 0.0f);
    std::fill(d_values_of, d_values_of + s.length * value_width, 0.0f);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
      for (int first = 0; first < s.length; first += kQueries) {
        const int n = int(std::min<int64_t>(kQueries, s.length - first));
        const int64_t at = (row * s.length + first) * s.heads + head;
        const Sight sight(documents + row * s.length, first, n, s.window);
        read_rows(query + at * s.width, s.heads * s.width, n, s.width, rows, s.scale);
        read_rows(dy + at * s.value, s.heads * s.value, n, s.value, dy_rows);
        transpose_rows(rows, n, s.width, columns);
        transpose_rows(dy_rows, n, s.value, dy_columns);
        float own_logarithms[kQueries] = {}, inner[kQueries] = {};
        for (int i = 0; i < n; i++) {
          own_logarithms[i] = logarithms[(row * s.heads + head) * s.length + first + i];
          widen(y + at * s.value + i * s.heads * s.value, s.value, y_row);
          for (int j = 0; j < s.value; j++) inner[i] += y_row[j] * dy_rows[i * value_width + j];
        }
        std::fill(d_rows, d_rows + n * width, 0.0f);
        for (int first_key = sight.first_key(); first_key < first + n; first_key += kKeys) {
          const int keys = std::min(kKeys, first + n - first_key);
          const Sight::Seen seen = sight.of(first_key, keys);
          if (seen == Sight::kNone) continue;
          const float *some_keys = keys_of + first_key * width, *some_values = values_of + first_key * value_width;
          multiply_in_place<false>(keys, s.width, kQueries, some_keys, width, columns, kQueries, scores, kQueries,
                                   false);
          multiply_in_place<false>(keys, s.value, kQueries, some_values, value_width, dy_columns, kQueries, d_scores,
                                   kQueries, false);
          differentiate(sight, seen == Sight::kSome, first_key, keys, own_logarithms, inner, scores, d_scores);
          multiply_in_place<false>(keys, n, value_width, scores, kQueries, dy_rows, value_width,
                                   d_values_of + first_key * value_width, value_width, true);
          multiply_in_place<false>(keys, n, width, d_scores, kQueries, rows, width, d_keys_of + first_key * width,
                                   width, true);
          multiply_in_place<true>(n, keys, width, d_scores, kQueries, some_keys, width, d_rows, width, true);
        }
        for (int i = 0; i < n * width; i++) d_rows[i] *= s.scale;
        write_rows(d_rows, n, s.width, d_query + at * s.width, s.heads * s.width);
      }
    write_rows(d_keys_of, s.length, s.width, d_key + key_at * s.width, s.groups * s.width);
    write_rows(d_values_of, s.length, s.value, d_value + key_at * s.value, s.groups * s.value);
  });
}

// --- the interface to XLA -----------------------------------------------------------------------------------------

// what both passes are given: query [B, S, H, K], key [B, S, G, K], value [B, S, G, V], documents [B, S]
template <ffi::DataType T>
bool fit(const Shape& s, const In<T, 4>& query, const In<T, 4>& key, const In<T, 4>& value,
         const In<kInt, 2>& documents) {
  return s.groups > 0 && s.heads % s.groups == 0 && has(query, {s.batch, s.length, s.heads, s.width}) &&
         has(key, {s.batch, s.length, s.groups, s.width}) && has(value, {s.batch, s.length, s.groups, s.value}) &&
         has(documents, {s.batch, s.length});
}

template <ffi::DataType T>
Shape shape_of(const In<T, 4>& query, const In<T, 4>& value, float scale, int64_t window) {
  const auto q = query.dimensions(), v = value.dimensions();
  return {q[0], q[1], q[2], v[2], int(q[3]), int(v[3]), scale, window > 0 ? window : q[1]};
}

template <ffi::DataType T>
ffi::Error Forward(ffi::ThreadPool pool, float scale, int64_t window, In<T, 4> query, In<T, 4> key, In<T, 4> value,
                   In<kInt, 2> documents, Out<T, 4> y, Out<kFloat, 3> logarithms) {
  const Shape s = shape_of(query, value, scale, window);
  if (!fit(s, query, key, value, documents) || !has(*y, {s.batch, s.length, s.heads, s.value}) ||
      !has(*logarithms, {s.batch, s.heads, s.length}))
    return misfit();
  forward<Element<T>>(pool, s, data(query), data(key), data(value), data(documents), data(y), data(logarithms));
  return ffi::Error::Success();
}

template <ffi::DataType T>
ffi::Error Backward(ffi::ThreadPool pool, float scale, int64_t window, In<T, 4> query, In<T, 4> key, In<T, 4> value,
                    In<kInt, 2> documents, In<T, 4> y, In<kFloat, 3> logarithms, In<T, 4> dy, Out<T, 4> d_query,
                    Out<T, 4> d_key, Out<T, 4> d_value) {
  const Shape s = shape_of(query, value, scale, window);
  if (!fit(s, query, key, value, documents) || !fit(s, *d_query, *d_key, *d_value, documents) ||
      !has(y, {s.batch, s.length, s.heads, s.value}) || !has(dy, {s.batch, s.length, s.heads, s.value}) ||
      !has(logarithms, {s.batch, s.heads, s.length}))
    return misfit();
  backward<Element<T>>(pool, s, data(query), data(key), data(value), data(documents), data(y), data(logarithms),
                       data(dy), data(d_query), data(d_key), data(d_value));
  return ffi::Error::Success();
}

// the parameters of `Forward` and `Backward`, in their order
template <ffi::DataType T>
auto bind_forward() {
  using X = In<T, 4>;
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Attr<int64_t>("window")      //
      .template Arg<X>().template Arg<X>().template Arg<X>().template Arg<In<kInt, 2>>()           //
      .template Ret<X>().template Ret<In<kFloat, 3>>();
}

template <ffi::DataType T>
auto bind_backward() {
  using X = In<T, 4>;
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Attr<int64_t>("window")      //
      .template Arg<X>().template Arg<X>().template Arg<X>().template Arg<In<kInt, 2>>()           //
      .template Arg<X>().template Arg<In<kFloat, 3>>().template Arg<X>()                           //
      .template Ret<X>().template Ret<X>().template Ret<X>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_attention_forward_float32, Forward<ffi::F32>, bind_forward<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_attention_forward_bfloat16, Forward<ffi::BF16>, bind_forward<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_attention_backward_float32, Backward<ffi::F32>, bind_backward<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_attention_backward_bfloat16, Backward<ffi::BF16>, bind_backward<ffi::BF16>());
