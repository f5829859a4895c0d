// The head and its cross-entropy on a CPU: the loss and its gradients in one pass over blocks of tokens.
//
// T tokens, D embed, V vocabulary. Logits exist for one block of tokens at a time. Each thread turns some rows of them
// into the gradient of the loss and multiplies that by the head; then each thread adds up some columns of the head's
// gradient. Arithmetic is float32; X is the type of x, of the head and of x's gradient, float or bfloat16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "interface.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

using namespace moe;

constexpr int64_t kRows = 96;            // tokens of a task, at most
constexpr int kColumns = 4 * kTileCols;  // of the head's gradient, of a task

struct Shape {
  int64_t tokens;
  int embed, vocab;
};

struct Scratch {
  Buffer dx;
};
thread_local Scratch scratch;

// the cross-entropy of one token in nats, times its weight; its logits become the gradient of that
float cross_entropy(int vocab, int target, float weight, float* logits) {
  Vec largest = all(logits[0]);
  for (int j = 0; j < vocab; j += kLanes) {
    Vec x = j + kLanes <= vocab ? load(logits + j) : largest;
    if (j + kLanes > vocab)
      for (int i = 0; i < vocab - j; i++) x[i] = logits[j + i];
    largest = x > largest ? x : largest;
  }
  float top = largest[0];
  for (int i = 1; i < kLanes; i++) top = std::max(top, largest[i]);
  const float chosen = logits[target] - top;
  Vec sums = {};
  float total = 0;
  for (int j = 0; j < vocab; j += kLanes) {
    const Vec e = exponential(load(logits + j, vocab - j) - top);
    store(logits + j, e, vocab - j);
    if (j + kLanes <= vocab)
      sums += e;
    else
      for (int i = 0; i < vocab - j; i++) total += e[i];
  }
  for (int i = 0; i < kLanes; i++) total += sums[i];
  for (int j = 0; j < vocab; j++) logits[j] *= weight / total;
  logits[target] -= weight;
  return weight * (std::log(total) - chosen);
}

// even tasks for all threads, in whole tiles
int64_t rows_of_task(int64_t tokens, int64_t threads) {
  const int64_t tasks = threads * ((tokens + threads * kRows - 1) / (threads * kRows));
  return ((tokens + tasks - 1) / tasks + kTileRows - 1) / kTileRows * kTileRows;
}

// nats, dx [T, D] and d_head [D, V] of the tokens that count; wide [block, D] and logits [block, V] are scratch
template <class X>
void gradient(ffi::ThreadPool& pool, const Shape& s, const X* x, const X* head, const int32_t* targets,
              const float* weights, float* nats, X* dx, float* d_head, int64_t block, float* wide, float* logits) {
  std::vector<float> of_token(s.tokens, 0.0f);
  for (int64_t first = 0; first < s.tokens; first += block) {
    const int64_t tokens = std::min(block, s.tokens - first), rows = rows_of_task(tokens, pool.num_threads());
    parallel(pool, (tokens + rows - 1) / rows, [&](int64_t task) {
      const int64_t row = task * rows, at = first + row;
      const int n = int(std::min(rows, tokens - row));
      float *own_x = wide + row * s.embed, *own_logits = logits + row * s.vocab;
      widen(x + at * s.embed, n * int64_t(s.embed), own_x);
      multiply<false>(n, s.embed, s.vocab, own_x, head, own_logits);
      for (int i = 0; i < n; i++)
        if (weights[at + i] > 0)
          of_token[at + i] =
              cross_entropy(s.vocab, targets[at + i], weights[at + i], own_logits + int64_t(i) * s.vocab);
        else
          std::fill_n(own_logits + int64_t(i) * s.vocab, s.vocab, 0.0f);
      float* own_dx = scratch.dx.of(n * int64_t(s.embed));
      multiply<true>(n, s.vocab, s.embed, own_logits, head, own_dx);
      narrow(own_dx, n * int64_t(s.embed), dx + at * s.embed);
    });
    parallel(pool, (s.vocab + kColumns - 1) / kColumns, [&](int64_t task) {
      const int column = int(task) * kColumns, n = std::min(kColumns, s.vocab - column);
      multiply_outer<X>(int(tokens), s.embed, n, wide, s.embed, logits + column, s.vocab, d_head + column, s.vocab,
                     first > 0);
    });
  }
  *nats = 0;
  for (float one : of_token) *nats += one;
}

// --- the interface to XLA -----------------------------------------------------------------------------------------

template <ffi::DataType T>
ffi::Error Gradient(ffi::ThreadPool pool, In<T, 2> x, In<T, 2> head, In<kInt, 1> targets, In<kFloat, 1> weights,
                    Out<kFloat, 0> nats, Out<T, 2> dx, Out<kFloat, 2> d_head, Out<kFloat, 2> wide,
                    Out<kFloat, 2> logits) {
  const Shape s = {x.dimensions()[0], int(x.dimensions()[1]), int(head.dimensions()[1])};
  const int64_t block = wide->dimensions()[0];
  if (!has(head, {s.embed, s.vocab}) || !has(targets, {s.tokens}) || !has(weights, {s.tokens}) ||
      !has(*dx, {s.tokens, s.embed}) || !has(*d_head, {s.embed, s.vocab}) ||
      !has(*wide, {block, s.embed}) || !has(*logits, {block, s.vocab}) || !block)
    return misfit();
  const int32_t* ids = data(targets);
  for (int64_t i = 0; i < s.tokens; i++)
    if (data(weights)[i] > 0 && (ids[i] < 0 || ids[i] >= s.vocab)) return ffi::Error::InvalidArgument("a target is outside of the vocabulary");
  gradient<Element<T>>(pool, s, data(x), data(head), ids, data(weights), data(nats), data(dx), data(d_head), block,
                       data(wide), data(logits));
  return ffi::Error::Success();
}

// the parameters of `Gradient`, in their order
template <ffi::DataType T>
auto bind_gradient() {
  using X = In<T, 2>;
  using Floats = In<kFloat, 2>;
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()                                                //
      .template Arg<X>().template Arg<X>().template Arg<In<kInt, 1>>().template Arg<In<kFloat, 1>>()  //
      .template Ret<In<kFloat, 0>>().template Ret<X>().template Ret<Floats>()                    //
      .template Ret<Floats>().template Ret<Floats>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_head_gradient_float32, Gradient<ffi::F32>, bind_gradient<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_head_gradient_bfloat16, Gradient<ffi::BF16>, bind_gradient<ffi::BF16>());
