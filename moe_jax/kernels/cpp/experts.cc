// Experts on a CPU: sort the token copies by expert, multiply, combine; forward and backward.
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
  Buffer x, dy, gate, up, hidden, bias, dw;
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

// the arrays of the experts: matrices [E, D, F], [E, D, F] and [E, F, D], biases [E, F], [E, F] and [E, D]
enum Kind { kGate, kUp, kDown, kGateBias, kUpBias, kDownBias, kKinds };

int64_t numbers(const Shape& s, int kind) {  // of one expert
  return kind <= kDown ? s.matrix() : kind == kDownBias ? s.embed : s.ffw;
}

template <class X>
struct Weights {
  X* of[kKinds];  // null where the experts have none

  X* at(const Shape& s, Kind kind, int64_t expert) const {
    return of[kind] == nullptr ? nullptr : of[kind] + expert * numbers(s, kind);
  }
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

// rows [rows, n] plus an expert's bias, each times its share if shares are given; no bias is null
template <class X>
void add_bias(int64_t rows, int n, const X* bias, float* to, const float* shares = nullptr,
              const int32_t* copies = nullptr) {
  if (bias == nullptr) return;
  float* wide = scratch.bias.of(n);
  widen(bias, n, wide);
  for (int64_t i = 0; i < rows; i++) {
    const float share = shares == nullptr ? 1.0f : shares[copies[i]];
    for (int j = 0; j < n; j++) to[i * n + j] += share * wide[j];
  }
}

// adds the sum of rows [rows, n], each times its share if shares are given, to the gradient of a bias
void add_rows(int64_t rows, int n, const float* from, float* to, const float* shares = nullptr,
              const int32_t* copies = nullptr) {
  for (int64_t i = 0; i < rows; i++) {
    const float share = shares == nullptr ? 1.0f : shares[copies[i]];
    for (int j = 0; j < n; j++) to[j] += share * from[i * n + j];
  }
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
    auto own = [&](Kind kind) { return w.at(s, kind, part.expert); };
    by_chunks(part, [&](int64_t first, int rows) {
      const int32_t* copies = places.order + first;
      float* rows_x = scratch.x.of(rows * int64_t(s.embed));
      float* g = scratch.gate.of(rows * int64_t(s.ffw));
      float* u = scratch.up.of(rows * int64_t(s.ffw));
      gather(s, x, copies, rows, rows_x);
      if (activation.has_gate()) {
        multiply<false>(rows, s.embed, s.ffw, rows_x, own(kGate), g);
        add_bias(rows, s.ffw, own(kGateBias), g);
        narrow(g, rows * int64_t(s.ffw), gate + first * s.ffw);
      }
      multiply<false>(rows, s.embed, s.ffw, rows_x, own(kUp), u);
      add_bias(rows, s.ffw, own(kUpBias), u);
      narrow(u, rows * int64_t(s.ffw), up + first * s.ffw);
      for (int64_t i = 0; i < rows; i++) activate(activation, s.ffw, gates[copies[i]], g + i * s.ffw, u + i * s.ffw);
      multiply<false>(rows, s.ffw, s.embed, u, own(kDown), outputs + first * s.embed);
      add_bias(rows, s.embed, own(kDownBias), outputs + first * s.embed, gates, copies);
    });
  });
  combine(pool, s, outputs, places.place, y);
}

// adds up the weight gradients of experts in several parts
template <class X>
void add_parts(ffi::ThreadPool& pool, const Shape& s, const std::vector<Part>& parts,
               const std::vector<std::vector<float>>& partial, const int64_t* starts, Weights<X> dw) {
  std::vector<std::vector<const float*>> of_expert(s.experts);
  for (size_t i = 0; i < parts.size(); i++)
    if (parts[i].parts > 1) of_expert[parts[i].expert].push_back(partial[i].data());
  parallel(pool, kKinds * s.experts, [&](int64_t i) {
    const int64_t expert = i / kKinds;
    const Kind kind = Kind(i % kKinds);
    X* to = dw.at(s, kind, expert);
    if (to == nullptr || of_expert[expert].empty()) return;
    for (int64_t j = 0; j < numbers(s, kind); j++) {
      float sum = 0;
      for (const float* one : of_expert[expert]) sum += one[starts[kind] + j];
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
  int64_t starts[kKinds + 1] = {};                        // of each kind in them
  for (int kind = 0; kind < kKinds; kind++)
    starts[kind + 1] = starts[kind] + (dw.of[kind] == nullptr ? 0 : numbers(s, kind));
  std::fill(d_gates, d_gates + s.copies(), 0.0f);
  parallel(pool, parts.size(), [&](int64_t number) {
    const Part& part = parts[number];
    auto own = [&](Kind kind) { return w.at(s, kind, part.expert); };
    const bool whole = part.parts == 1, direct = whole && std::is_same_v<X, float>;
    if (!whole) partial[number].resize(starts[kKinds]);
    float* room = whole ? scratch.dw.of(direct ? 0 : starts[kKinds]) : partial[number].data();
    float* sum[kKinds];  // of this part's rows; null for what the experts do not have
    for (int kind = 0; kind < kKinds; kind++) {
      X* to = dw.at(s, Kind(kind), part.expert);
      sum[kind] = to == nullptr ? nullptr : room + starts[kind];
      if constexpr (std::is_same_v<X, float>)
        if (direct) sum[kind] = to;
      if (sum[kind] != nullptr && (part.first == part.last || kind > kDown))
        std::fill(sum[kind], sum[kind] + numbers(s, kind), 0.0f);
    }
    by_chunks(part, [&](int64_t first, int rows) {
      const int64_t size = rows * int64_t(s.embed), hidden_size = rows * int64_t(s.ffw);
      const int32_t* copies = places.order + first;
      float *rows_x = scratch.x.of(size), *rows_dy = scratch.dy.of(size);
      float *g = scratch.gate.of(hidden_size), *u = scratch.up.of(hidden_size), *h = scratch.hidden.of(hidden_size);
      gather(s, x, copies, rows, rows_x);
      gather(s, dy, copies, rows, rows_dy);
      if (activation.has_gate()) widen(gate + first * s.ffw, hidden_size, g);
      widen(up + first * s.ffw, hidden_size, u);
      multiply<true>(rows, s.embed, s.ffw, rows_dy, own(kDown), h);
      for (int64_t i = 0, j = 0; i < rows; i++, j += s.ffw)
        d_gates[copies[i]] = activate_backward(activation, s.ffw, gates[copies[i]], g + j, u + j, h + j);
      const bool add = first > part.first;
      if (activation.has_gate()) {
        multiply<true>(rows, s.ffw, s.embed, g, own(kGate), outputs + first * s.embed);
        multiply_outer<X>(rows, s.embed, s.ffw, rows_x, s.embed, g, s.ffw, sum[kGate], s.ffw, add);
      }
      multiply<true>(rows, s.ffw, s.embed, u, own(kUp), outputs + first * s.embed, activation.has_gate());
      multiply_outer<X>(rows, s.embed, s.ffw, rows_x, s.embed, u, s.ffw, sum[kUp], s.ffw, add);
      multiply_outer<X>(rows, s.ffw, s.embed, h, s.ffw, rows_dy, s.embed, sum[kDown], s.embed, add);
      if (sum[kGateBias] != nullptr) add_rows(rows, s.ffw, g, sum[kGateBias]);
      if (sum[kUpBias] != nullptr) add_rows(rows, s.ffw, u, sum[kUpBias]);
      if (sum[kDownBias] == nullptr) return;
      add_rows(rows, s.embed, rows_dy, sum[kDownBias], gates, copies);
      float* bias = scratch.bias.of(s.embed);
      widen(own(kDownBias), s.embed, bias);
      for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < s.embed; j++) d_gates[copies[i]] += bias[j] * rows_dy[i * s.embed + j];
    });
    if (whole && !direct)
      for (int kind = 0; kind < kKinds; kind++)
        if (sum[kind] != nullptr) narrow(sum[kind], numbers(s, kind), dw.at(s, Kind(kind), part.expert));
  });
  add_parts(pool, s, parts, partial, starts, dw);
  combine(pool, s, outputs, places.place, dx);
}

// --- the interface to XLA -----------------------------------------------------------------------------------------

template <ffi::DataType T>
Shape shape_of(const In<T, 2>& x, const In<kFloat, 2>& gates, const In<T, 3>& w) {
  return {x.dimensions()[0], gates.dimensions()[1], w.dimensions()[0], int(w.dimensions()[1]), int(w.dimensions()[2])};
}

// an array of the experts; one of 0 experts stands for what they do not have
template <ffi::DataType T, size_t Rank>
Element<T>* own(const In<T, Rank>& buffer) {
  return buffer.element_count() == 0 ? nullptr : data(buffer);
}
template <ffi::DataType T, size_t Rank>
Element<T>* own(Out<T, Rank>& buffer) {
  return buffer->element_count() == 0 ? nullptr : data(buffer);
}

// whether the experts' arrays fit together
template <ffi::DataType T>
bool fit(const Shape& s, bool gated, const In<T, 3>& gate, const In<T, 3>& up, const In<T, 3>& down,
         const In<T, 2>& gate_bias, const In<T, 2>& up_bias, const In<T, 2>& down_bias) {
  auto all_or_none = [&](const In<T, 2>& bias, int64_t n) { return has(bias, {0, n}) || has(bias, {s.experts, n}); };
  return has(gate, {gated ? s.experts : 0, s.embed, s.ffw}) && has(up, {s.experts, s.embed, s.ffw}) &&
         has(down, {s.experts, s.ffw, s.embed}) && all_or_none(gate_bias, s.ffw) && all_or_none(up_bias, s.ffw) &&
         all_or_none(down_bias, s.embed);
}

template <ffi::DataType T>
ffi::Error Forward(ffi::ThreadPool pool, Activation activation, In<T, 2> x, In<kInt, 2> ids, In<kFloat, 2> gates,
                   In<T, 3> w_gate, In<T, 3> w_up, In<T, 3> w_down, In<T, 2> b_gate, In<T, 2> b_up, In<T, 2> b_down,
                   Out<kFloat, 2> y, Out<T, 2> gate, Out<T, 2> up, Out<kInt, 1> order, Out<kInt, 1> place,
                   Out<kInt, 1> sizes, Out<kFloat, 2> outputs) {
  const Shape s = shape_of(x, gates, w_up);
  const int64_t copies = s.copies();
  if (!fit(s, activation.has_gate(), w_gate, w_up, w_down, b_gate, b_up, b_down) || !has(x, {s.tokens, s.embed}) || !has(gates, {s.tokens, s.slots}) ||
      !has(ids, {s.tokens, s.slots}) || !has(*y, {s.tokens, s.embed}) ||
      !has(*gate, {activation.has_gate() ? copies : 0, s.ffw}) || !has(*up, {copies, s.ffw}) ||
      !has(*order, {copies}) || !has(*place, {copies}) || !has(*sizes, {s.experts}) ||
      !has(*outputs, {copies, s.embed}))
    return misfit();
  forward<Element<T>>(pool, activation, s, data(x), data(ids), data(gates),
                      {{own(w_gate), own(w_up), own(w_down), own(b_gate), own(b_up), own(b_down)}},
                      data(y), own(gate), data(up), {data(order), data(place), data(sizes)}, data(outputs));
  return ffi::Error::Success();
}

template <ffi::DataType T>
ffi::Error Backward(ffi::ThreadPool pool, Activation activation, In<kFloat, 2> dy, In<T, 2> x, In<kFloat, 2> gates,
                    In<T, 3> w_gate, In<T, 3> w_up, In<T, 3> w_down, In<T, 2> b_gate, In<T, 2> b_up, In<T, 2> b_down,
                    In<T, 2> gate, In<T, 2> up, In<kInt, 1> order, In<kInt, 1> place, In<kInt, 1> sizes,
                    Out<T, 2> dx, Out<kFloat, 2> d_gates, Out<T, 3> dw_gate, Out<T, 3> dw_up, Out<T, 3> dw_down,
                    Out<T, 2> db_gate, Out<T, 2> db_up, Out<T, 2> db_down, Out<kFloat, 2> outputs) {
  const Shape s = shape_of(x, gates, w_up);
  const int64_t copies = s.copies();
  const bool gated = activation.has_gate();
  if (!fit(s, gated, w_gate, w_up, w_down, b_gate, b_up, b_down) ||
      !fit(s, gated, *dw_gate, *dw_up, *dw_down, *db_gate, *db_up, *db_down) || !has(x, {s.tokens, s.embed}) || !has(*dx, {s.tokens, s.embed}) ||
      !has(gates, {s.tokens, s.slots}) || !has(*d_gates, {s.tokens, s.slots}) || !has(dy, {s.tokens, s.embed}) ||
      !has(gate, {gated ? copies : 0, s.ffw}) || !has(up, {copies, s.ffw}) || !has(order, {copies}) ||
      !has(place, {copies}) || !has(sizes, {s.experts}) || !has(*outputs, {copies, s.embed}))
    return misfit();
  backward<Element<T>>(pool, activation, s, data(dy), data(x), data(gates),
                       {{own(w_gate), own(w_up), own(w_down), own(b_gate), own(b_up), own(b_down)}},
                       own(gate), data(up), {data(order), data(place), data(sizes)}, data(dx), data(d_gates),
                       {{own(dw_gate), own(dw_up), own(dw_down), own(db_gate), own(db_up), own(db_down)}},
                       data(outputs));
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
      .template Arg<X>().template Arg<X>().template Arg<X>()                                    //
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
      .template Arg<W>().template Arg<W>().template Arg<W>()                                    //
      .template Arg<X>().template Arg<X>().template Arg<X>().template Arg<X>().template Arg<X>()  //
      .template Arg<Ints>().template Arg<Ints>().template Arg<Ints>()                           //
      .template Ret<X>().template Ret<Floats>()                                                 //
      .template Ret<W>().template Ret<W>().template Ret<W>()                                    //
      .template Ret<X>().template Ret<X>().template Ret<X>().template Ret<Floats>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_forward_float32, Forward<ffi::F32>, bind_forward<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_forward_bfloat16, Forward<ffi::BF16>, bind_forward<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_backward_float32, Backward<ffi::F32>, bind_backward<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_experts_backward_bfloat16, Backward<ffi::BF16>, bind_backward<ffi::BF16>());
