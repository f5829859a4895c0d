// The arrays that XLA hands over: typed, with their sizes checked.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "threads.h"
#include "vectors.h"

namespace moe {

// XLA refuses a call whose arrays have another element type or rank; sizes that must agree are compared here
template <ffi::DataType T, size_t Rank>
using In = ffi::Buffer<T, Rank>;
template <ffi::DataType T, size_t Rank>
using Out = ffi::Result<ffi::Buffer<T, Rank>>;

constexpr ffi::DataType kFloat = ffi::F32, kInt = ffi::S32;

template <ffi::DataType T>
using Element = std::conditional_t<T == ffi::BF16, Bf16, ffi::NativeType<T>>;

template <ffi::DataType T, size_t Rank>
Element<T>* data(const In<T, Rank>& buffer) {
  return static_cast<Element<T>*>(buffer.untyped_data());
}

template <ffi::DataType T, size_t Rank>
Element<T>* data(Out<T, Rank>& buffer) {
  return huge(static_cast<Element<T>*>(buffer->untyped_data()), buffer->element_count());
}

template <class Buffer>
bool has(const Buffer& buffer, std::initializer_list<int64_t> sizes) {
  auto dimensions = buffer.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), sizes.begin(), sizes.end());
}

inline ffi::Error misfit() { return ffi::Error::InvalidArgument("the sizes of the arrays do not fit together"); }

}  // namespace moe
