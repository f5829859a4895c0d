// Gated experts on a CPU: sort the token copies by expert, multiply, combine; forward and backward.
//
// T tokens, K slots, N = T K copies, E experts, D embed, F ffw. Products accumulate in float32; X is the type of x
// and of the weights, float or bfloat16. A task is a run of rows of one expert: its rows of x, its hidden rows and
// their gradients stay in the caches of one core, and only outputs of size [N, D] wait in memory to be combined.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "interface.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace {

using namespace moe;

struct Scratch {
  Buffer x, dy, gate, up, hidden, dw;
};
thread_local Scratch scratch;

constexpr int64_t kChunk = 384;     // rows processed at a time, at most
constexpr int64_t kPartRows = 256;  // the fewest rows into which an expert is split for more threads

struct Shape {
  int64_t tokens, slots, experts;
  int embed, ffw;
  int64_t copies() const { return tokens * slots; }
  int64_t matrix() const { return int64_t(embed) * ffw; }
};

template <class X>
struct Weights {
  X *gate, *up, *down;  // [E, D, F], [E, D, F], [E, F, D]
};

// the sorted copies: order [N], the copy at each place; place [N], the place of each copy, -1 for an empty slot;
// sizes [E]
struct Places {
  int32_t *order, *place, *sizes;
};

struct Part {  // rows [first, last) of the sorted copies, all of one expert, which is split into `parts` of them
  int64_t expert, first, last, parts;
};

// a stable counting sort; ids out of range are left out
void sort_copies(const Shape& s, const int32_t* ids, Places to) {
  std::fill(to.sizes, to.sizes + s.experts, 0);
  std::fill(to.order, to.order + s.copies(), 0);
  for (int64_t i = 0; i < s.copies(); i++)
    if (uint32_t(ids[i]) < s.experts) to.sizes[ids[i]]++;
  std::vector<int32_t> next(s.experts, 0);
  for (int64_t e = 1; e < s.experts; e++) next[e] = next[e - 1] + to.sizes[e - 1];
  for (int64_t i = 0; i < s.copies(); i++) {
    to.place[i] = uint32_t(ids[i]) < s.experts ? next[ids[i]]++ : -1;
    if (to.place[i] >= 0) to.order[to.place[i]] = int32_t(i);
  }
}

// splits every expert into about equal parts, so that no thread waits for a busy expert; largest first
std::vector<Part> split(const Shape& s, const int32_t* sizes, int64_t threads) {
  int64_t most = std::max(kPartRows, s.copies() / (4 * threads) + 1), first = 0;
  std::vector<Part> parts;
  for (int64_t e = 0; e < s.experts; first += sizes[e++]) {
    int64_t pieces = std::max<int64_t>(1, (sizes[e] + most - 1) / most);
    for (int64_t i = 0; i < pieces; i++)
      parts.push_back({e, first + sizes[e] * i / pieces, first + sizes[e] * (i + 1) / pieces, pieces});
  }
  auto larger = [](const Part& a, const Part& b) { return a.last - a.first > b.last - b.first; };
  std::stable_sort(parts.begin(), parts.end(), larger);
  return parts;
}

// run(first row, number of rows) on even chunks of a part
template <class Run>
void by_chunks(const Part& part, const Run& run) {
  int64_t rows = part.last - part.first, pieces = (rows + kChunk - 1) / kChunk;
  for (int64_t i = 0; i < pieces; i++) {
    int64_t from = part.first + rows * i / pieces, to = part.first + rows * (i + 1) / pieces;
    run(from, int(to - from));
  }
}

template <class X>
void gather(const Shape& s, const X* x, const int32_t* copies, int rows, float* to) {
  for (int64_t i = 0; i < rows; i++) widen(x + copies[i] / s.slots * s.embed, s.embed, to + i * s.embed);
}

// out[t] = sum of the rows of a token's copies
template <class X>
void combine(ffi::ThreadPool& pool, const Shape& s, const float* rows, const int32_t* place, X* out) {
  constexpr int64_t kTokens = 64;
  parallel(pool, (s.tokens + kTokens - 1) / kTokens, [&](int64_t block) {
    float* sum = scratch.x.of(s.embed);
    for (int64_t t = block * kTokens; t < std::min(s.tokens, (block + 1) * kTokens); t++) {
      std::fill(sum, sum + s.embed, 0.0f);
      for (int64_t k = 0; k < s.slots; k++) {
        int64_t from = place[t * s.slots + k];
        for (int i = 0; from >= 0 && i < s.embed; i++) sum[i] += rows[from * s.embed + i];
      }
      narrow(sum, s.embed, out + t * s.embed);
    }
  });
}

// computes y [T, D], and for the backward pass gate and up [N, F] before the activation; outputs [N, D] is scratch
template <class X>
void forward(ffi::ThreadPool& pool, const Activation& activation, const Shape& s, const X* x, const int32_t* ids,
             const float* gates, Weights<const X> w, float* y, X* gate, X* up, Places places, float* outputs) {
  sort_copies(s, ids, places);
  std::vector<Part> parts = split(s, places.sizes, pool.num_threads());
  parallel(pool, parts.size(), [&](int64_t number) {
    const Part& part = parts[number];
    const int64_t at = part.expert * s.matrix();
    by_chunks(part, [&](int64_t first, int rows) {
      float* rows_x = scratch.x.of(rows * int64_t(s.embed));
      float* g = scratch.gate.of(rows * int64_t(s.ffw));
      float* u = scratch.up.of(rows * int64_t(s.ffw));
      gather(s, x, places.order + first, rows, rows_x);
      multiply<false>(rows, s.embed, s.ffw, rows_x, w.gate + at, g);
      multiply<false>(rows, s.embed, s.ffw, rows_x, w.up + at, u);
      narrow(g, rows * int64_t(s.ffw), gate + first * s.ffw);
      narrow(u, rows * int64_t(s.ffw), up + first * s.ffw);
      for (int64_t i = 0; i < rows; i++)
        activate(activation, s.ffw, gates[places.order[first + i]], g + i * s.ffw, u + i * s.ffw);
      multiply<false>(rows, s.ffw, s.embed, u, w.down + at, outputs + first * s.embed);
    });
  });
  combine(pool, s, outputs, places.place, y);
}

// adds up the weight gradients of experts in several parts
template <class X>
void add_parts(ffi::ThreadPool& pool, const Shape& s, const std::vector<Part>& parts,
               const std::vector<std::vector<float>>& partial, Weights<X> dw) {
  std::vector<std::vector<const float*>> of_expert(s.experts);
  for (size_t i = 0; i < parts.size(); i++)
    if (parts[i].parts > 1) of_expert[parts[i].expert].push_back(partial[i].data());
  parallel(pool, 3 * s.experts, [&](int64_t i) {
    X* to = (i % 3 == 0 ? dw.gate : i % 3 == 1 ? dw.up : dw.down) + i / 3 * s.matrix();
    if (of_expert[i / 3].empty()) return;
    for (int64_t j = 0; j < s.matrix(); j++) {
      float sum = 0;
      for (const float* one : of_expert[i / 3]) sum += one[i % 3 * s.matrix() + j];
      from_float(sum, to + j);
    }
  });
}

// computes the gradients of all inputs; outputs [N, D] is scratch
template <class X>
void backward(ffi::ThreadPool& pool, const Activation& activation, const Shape& s, const float* dy, const X* x,
              const float* gates, Weights<const X> w, const X* gate, const X* up, Places places, X* dx, float* d_gates,
              Weights<X> dw, float* outputs) {
  std::vector<Part> parts = split(s, places.sizes, pool.num_threads());
  std::vector<std::vector<float>> partial(parts.size());  // weight gradients of experts in several parts
  std::fill(d_gates, d_gates + s.copies(), 0.0f);
  parallel(pool, parts.size(), [&](int64_t number) {
    const Part& part = parts[number];
    const int64_t at = part.expert * s.matrix();
    const bool whole = part.parts == 1, direct = whole && std::is_same_v<X, float>;
    if (!whole) partial[number].resize(3 * s.matrix());
    float* room = whole ? scratch.dw.of(direct ? 0 : 3 * s.matrix()) : partial[number].data();
    Weights<float> sum = {room, room + s.matrix(), room + 2 * s.matrix()};
    if constexpr (std::is_same_v<X, float>)
      if (direct) sum = {dw.gate + at, dw.up + at, dw.down + at};
    if (part.first == part.last)
      for (float* zeros : {sum.gate, sum.up, sum.down}) std::fill(zeros, zeros + s.matrix(), 0.0f);
    by_chunks(part, [&](int64_t first, int rows) {
      const int64_t size = rows * int64_t(s.embed), hidden_size = rows * int64_t(s.ffw);
      const int32_t* copies = places.order + first;
      float *rows_x = scratch.x.of(size), *rows_dy = scratch.dy.of(size);
      float *g = scratch.gate.of(hidden_size), *u = scratch.up.of(hidden_size), *h = scratch.hidden.of(hidden_size);
      gather(s, x, copies, rows, rows_x);
      gather(s, dy, copies, rows, rows_dy);
      widen(gate + first * s.ffw, hidden_size, g);
      widen(up + first * s.ffw, hidden_size, u);
      multiply<true>(rows, s.embed, s.ffw, rows_dy, w.down + at, h);
      for (int64_t i = 0, j = 0; i < rows; i++, j += s.ffw)
        d_gates[copies[i]] = activate_backward(activation, s.ffw, gates[copies[i]], g + j, u + j, h + j);
      multiply<true>(rows, s.ffw, s.embed, g, w.gate + at, outputs + first * s.embed);
      multiply<true>(rows, s.ffw, s.embed, u, w.up + at, outputs + first * s.embed, true);
      const bool add = first > part.first;
      multiply_outer<X>(rows, s.embed, s.ffw, rows_x, s.embed, g, s.ffw, sum.gate, s.ffw, add);
      multiply_outer<X>(rows, s.embed, s.ffw, rows_x, s.embed, u, s.ffw, sum.up, s.ffw, add);
      multiply_outer<X>(rows, s.ffw, s.embed, h, s.ffw, rows_dy, s.embed, sum.down, s.embed, add);
    });
    if (whole && !direct) {
      narrow(sum.gate, s.matrix(), dw.gate + at);
      narrow(sum.up, s.matrix(), dw.up + at);
      narrow(sum.down, s.matrix(), dw.down + at);
    }
  });
  add_parts(pool, s, parts, partial, dw);
  combine(pool, s, outputs, places.place, dx);
}

// --- the interface to XLA -----------------------------------------------------------------------------------------

template <ffi::DataType T>
Shape shape_of(const In<T, 2>& x, const In<kFloat, 2>& gates, const In<T, 3>& w) {
  return {x.dimensions()[0], gates.dimensions()[1], w.dimensions()[0], int(w.dimensions()[1]), int(w.dimensions()[2])};
}

// whether the inputs of both passes fit together: x [T, D], gates [T, K], weights [E, D, F], [E, D, F], [E, F, D]
template <ffi::DataType T>
bool fit(const Shape& s, const In<T, 2>& x, const In<kFloat, 2>& gates, const In<T, 3>& w_gate, const In<T, 3>& w_up,
         const In<T, 3>& w_down) {
  return has(x, {s.tokens, s.embed}) && has(gates, {s.tokens, s.slots}) && has(w_gate, {s.experts, s.embed, s.ffw}) &&
         has(w_up, {s.experts, s.embed, s.ffw}) && has(w_down, {s.experts, s.ffw, s.embed});
}

template <ffi::DataType T>
ffi::Error Forward(ffi::ThreadPool pool, Activation activation, In<T, 2> x, In<kInt, 2> ids, In<kFloat, 2> gates,
                   In<T, 3> w_gate, In<T, 3> w_up, In<T, 3> w_down, Out<kFloat, 2> y, Out<T, 2> gate, Out<T, 2> up,
                   Out<kInt, 1> order, Out<kInt, 1> place, Out<kInt, 1> sizes, Out<kFloat, 2> outputs) {
  const Shape s = shape_of(x, gates, w_gate);
  const int64_t copies = s.copies();
  if (!fit(s, x, gates, w_gate, w_up, w_down) || !has(ids, {s.tokens, s.slots}) || !has(*y, {s.tokens, s.embed}) ||
      !has(*gate, {copies, s.ffw}) || !has(*up, {copies, s.ffw}) || !has(*order, {copies}) ||
      !has(*place, {copies}) || !has(*sizes, {s.experts}) || !has(*outputs, {copies, s.embed}))
    return misfit();
  forward<Element<T>>(pool, activation, s, data(x), data(ids), data(gates), {data(w_gate), data(w_up), data(w_down)},
                      data(y), data(gate), data(up), {data(order), data(place), data(sizes)}, data(outputs));
  return ffi::Error::Success();
}

template <ffi::DataType T>
ffi::Error Backward(ffi::ThreadPool pool, Activation activation, In<kFloat, 2> dy, In<T, 2> x, In<kFloat, 2> gates,
                    In<T, 3> w_gate, In<T, 3> w_up, In<T, 3> w_down, In<T, 2> gate, In<T, 2> up, In<kInt, 1> order,
                    In<kInt, 1> place, In<kInt, 1> sizes, Out<T, 2> dx, Out<kFloat, 2> d_gates, Out<T, 3> dw_gate,
                    Out<T, 3> dw_up, Out<T, 3> dw_down, Out<kFloat, 2> outputs) {
  const Shape s = shape_of(x, gates, w_gate);
  const int64_t copies = s.copies();
  if (!fit(s, x, gates, w_gate, w_up, w_down) || !fit(s, *dx, *d_gates, *dw_gate, *dw_up, *dw_down) ||
      !has(dy, {s.tokens, s.embed}) || !has(gate, {copies, s.ffw}) || !has(up, {copies, s.ffw}) ||
      !has(order, {copies}) || !has(place, {copies}) || !has(sizes, {s.experts}) || !has(*outputs, {copies, s.embed}))
    return misfit();
  backward<Element<T>>(pool, activation, s, data(dy), data(x), data(gates), {data(w_gate), data(w_up), data(w_down)},
                       data(gate), data(up), {data(order), data(place), data(sizes)}, data(dx), data(d_gates),
                       {data(dw_gate), data(dw_up), data(dw_down)}, data(outputs));
  return ffi::Error::Success();
}

// the parameters of `Forward` and `Backward`, in their order
template <ffi::DataType T>
auto bind_forward() {
  using X = In<T, 2>;
  using W = In<T, 3>;
  using Floats = In<kFloat, 2>;
  using Ints = In<kInt, 1>;
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs<Activation>()                            //
      .template Arg<X>().template Arg<In<kInt, 2>>().template Arg<Floats>()                     //
      .template Arg<W>().template Arg<W>().template Arg<W>()                                    //
      .template Ret<Floats>().template Ret<X>().template Ret<X>()                               //
      .template Ret<Ints>().template Ret<Ints>().template Ret<Ints>().template Ret<Floats>();
}

template <ffi::DataType T>
auto bind_backward() {
  using X = In<T, 2>;
  using W = In<T, 3>;
  using Floats = In<kFloat, 2>;
  using Ints = In<kInt, 1>;
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs<Activation>()                            //
      .template Arg<Floats>().template Arg<X>().template Arg<Floats>()                          //
      .template Arg<W>().template Arg<W>().template Arg<W>().template Arg<X>().template Arg<X>()  //
      .template Arg<Ints>().template Arg<Ints>().template Arg<Ints>()                           //
      .template Ret<X>().template Ret<Floats>()                                                 //
      .template Ret<W>().template Ret<W>().template Ret<W>().template Ret<Floats>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_forward_float32, Forward<ffi::F32>, bind_forward<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_forward_bfloat16, Forward<ffi::BF16>, bind_forward<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_backward_float32, Backward<ffi::F32>, bind_backward<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_backward_bfloat16, Backward<ffi::BF16>, bind_backward<ffi::BF16>());
