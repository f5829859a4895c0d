// The activation of a hidden row: g sigmoid(alpha g + beta g^3) (u + shift), with g = min(gate, limit) and
// u = clip(up, -limit, limit), or without a gate max(up, 0)^2; forward and backward. kernels/activation.py has its forms
// and their sources.

#pragma once

#include <limits>

#include "threads.h"
#include "vectors.h"

namespace moe {

struct Activation {
  float alpha, beta, shift, limit, gated;

  bool has_gate() const { return gated != 0; }
  bool is_swiglu() const {
    return alpha == 1 && beta == 0 && shift == 0 && limit == std::numeric_limits<float>::infinity();
  }
};

// silu(gate) up
struct Swiglu {
  Vec gate(Vec g) const { return g; }
  Vec up(Vec u) const { return u; }
  Vec inner(Vec g) const { return g; }
  Vec through_gate(Vec, Vec gradient) const { return gradient; }
  Vec through_up(Vec, Vec gradient) const { return gradient; }
  Vec through_inner(Vec, Vec gradient) const { return gradient; }
};

// every form; comparisons let NaN pass, and a value at the limit has its gradient
struct AnyForm {
  Activation a;

  Vec gate(Vec g) const { return g > all(a.limit) ? all(a.limit) : g; }
  Vec up(Vec u) const {
    u = u > all(a.limit) ? all(a.limit) : u;
    return (u < all(-a.limit) ? all(-a.limit) : u) + a.shift;
  }
  Vec inner(Vec g) const { return g * (a.alpha + a.beta * g * g); }
  // the gradients of gate, up and inner's argument, from those of their results
  Vec through_gate(Vec g, Vec gradient) const { return g > all(a.limit) ? Vec{} : gradient; }
  Vec through_up(Vec u, Vec gradient) const {
    gradient = u > all(a.limit) ? Vec{} : gradient;
    return u < all(-a.limit) ? Vec{} : gradient;
  }
  Vec through_inner(Vec g, Vec gradient) const { return gradient * (a.alpha + 3.0f * a.beta * g * g); }
};

// up = share activation(gate, up)
template <class Form>
void activate(const Form& form, int n, float share, const float* gate, float* up) {
  for (int j = 0; j < n; j += kLanes) {
    Vec g = form.gate(load(gate + j, n - j)), u = form.up(load(up + j, n - j));
    store(up + j, g * sigmoid(form.inner(g)) * u * share, n - j);
  }
}

// up = share max(up, 0)^2; comparisons let NaN pass
inline void activate_alone(int n, float share, float* up) {
  for (int j = 0; j < n; j += kLanes) {
    Vec u = load(up + j, n - j);
    store(up + j, u < Vec{} ? Vec{} : u * u * share, n - j);
  }
}

inline void activate(const Activation& a, int n, float share, const float* gate, float* up) {
  if (!a.has_gate()) return activate_alone(n, share, up);
  a.is_swiglu() ? activate(Swiglu{}, n, share, gate, up) : activate(AnyForm{a}, n, share, gate, up);
}

inline float sum_of(Vec v) {
  float sum = 0;
  for (int j = 0; j < kLanes; j++) sum += v[j];
  return sum;
}

// hidden is the gradient of the hidden row for a share of 1 and becomes share activation(gate, up); gate and up become
// their gradients; returns the gradient of the share
template <class Form>
float activate_backward(const Form& form, int n, float share, float* gate, float* up, float* hidden) {
  Vec total = {};
  for (int j = 0; j < n; j += kLanes) {
    int rest = n - j;
    Vec raw_g = load(gate + j, rest), raw_u = load(up + j, rest), d = load(hidden + j, rest);
    Vec g = form.gate(raw_g), u = form.up(raw_u);
    Vec sig = sigmoid(form.inner(g)), gated = g * sig, product = gated * u;
    total += d * product;
    d *= share;
    store(gate + j, form.through_gate(raw_g, d * u * (sig + form.through_inner(g, gated * (1.0f - sig)))), rest);
    store(up + j, form.through_up(raw_u, d * gated), rest);
    store(hidden + j, product * share, rest);
  }
  return sum_of(total);
}

inline float activate_alone_backward(int n, float share, float* up, float* hidden) {
  Vec total = {};
  for (int j = 0; j < n; j += kLanes) {
    int rest = n - j;
    Vec u = load(up + j, rest), d = load(hidden + j, rest);
    u = u < Vec{} ? Vec{} : u;
    total += d * u * u;
    store(up + j, 2.0f * u * d * share, rest);
    store(hidden + j, u * u * share, rest);
  }
  return sum_of(total);
}

inline float activate_backward(const Activation& a, int n, float share, float* gate, float* up, float* hidden) {
  if (!a.has_gate()) return activate_alone_backward(n, share, up, hidden);
  return a.is_swiglu() ? activate_backward(Swiglu{}, n, share, gate, up, hidden)
                       : activate_backward(AnyForm{a}, n, share, gate, up, hidden);
}

}  // namespace moe

// the attributes of a call
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(moe::Activation, ::xla::ffi::StructMember<float>("alpha"),
                                      ::xla::ffi::StructMember<float>("beta"),
                                      ::xla::ffi::StructMember<float>("shift"),
                                      ::xla::ffi::StructMember<float>("limit"),
                                      ::xla::ffi::StructMember<float>("gated"));
