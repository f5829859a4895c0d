// Products of matrices, added up in float32: a tile of the result stays in registers, a panel of B in the caches.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace moe {

// A tile of C is kTileRows x kTileCols numbers in registers; a narrower one has more rows.
constexpr int kTileRows = 6, kTileCols = kVectors * kLanes;
constexpr int kDepth = 128;  // of the blocks that the inner dimension is cut into: a panel of B stays in the L1 cache

// memory of one thread, kept between calls, aligned for vectors
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(p_); }
  template <class T>
  T* as(int64_t n) {
    static_assert(sizeof(T) == sizeof(float));
    return reinterpret_cast<T*>(of(n));
  }
  float* of(int64_t n) {
    if (n > size_) {
      std::free(p_);
      size_ = (n + 1023) / 1024 * 1024;
      p_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
    }
    return p_;
  }

 private:
  float* p_ = nullptr;
  int64_t size_ = 0;
};

struct Packed {
  Buffer rows, columns, panel;
};
inline thread_local Packed packed;

// C[M, n] (+)= A[M, k] B[k, n], n at most V vectors, which every row of B has; k counts words, the strides are those of
// rows, and A is transposed if ByColumns: A(i, j) is a[j * a_stride + i]
template <int M, int V, bool ByColumns, class W>
void tile(int k, const W* a, int64_t a_stride, const W* b, int64_t b_stride, float* c, int64_t c_stride, int n,
          bool add) {
  Vec sum[M][V] = {};
  for (int j = 0; j < k; j++) {
    Vec row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) row[v] = load(reinterpret_cast<const float*>(b + j * b_stride + v * kLanes));
#pragma GCC unroll 32
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++)
        sum[i][v] = multiply_add(sum[i][v], ByColumns ? a[j * a_stride + i] : a[i * a_stride + j], row[v]);
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      float* to = c + i * c_stride + v * kLanes;
      int width = n - v * kLanes;
      if (width > 0) store(to, add ? load(to, width) + sum[i][v] : sum[i][v], width);
    }
}

template <bool ByColumns, int V = kVectors, int M = kTileRows * kVectors / V, class... Rest>
void tile_of(int rows, Rest... rest) {
  if constexpr (M > 0) rows == M ? tile<M, V, ByColumns>(rest...) : tile_of<ByColumns, V, M - 1>(rows, rest...);
}

// C[m, V vectors] (+)= A[m, k] B[k, V vectors]
template <bool ByColumns, int V>
void stripe(int m, int k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
            int64_t c_stride, bool add) {
  constexpr int kRows = kTileRows * kVectors / V;
  for (int i = 0; i < m; i += kRows)
    tile_of<ByColumns, V>(std::min(kRows, m - i), k, a + (ByColumns ? i : i * a_stride), a_stride, b, b_stride,
                          c + i * c_stride, c_stride, V * kLanes, add);
}

// C[m, n] (+)= A[m, k] B[k, n] for small matrices, whose B is read where it is; n is a whole number of vectors
template <bool ByColumns>
void multiply_in_place(int m, int k, int n, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                       float* c, int64_t c_stride, bool add) {
  int from = 0;
  auto stripes = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (; n - from >= V * kLanes; from += V * kLanes)
      stripe<ByColumns, V>(m, k, a, a_stride, b + from, b_stride, c + from, c_stride, add);
  };
  stripes(std::integral_constant<int, kVectors>());
  if constexpr (kVectors > 2) stripes(std::integral_constant<int, 2>());
  stripes(std::integral_constant<int, 1>());
}

// a block [k, n] of a matrix as a panel of words [., kTileCols]
template <class X>
void pack(const X* b, int64_t stride, int k, int n, float* panel) {
  for (int j = 0; j < k; j++, b += stride, panel += kTileCols)
    n == kTileCols ? widen(b, kTileCols, panel) : widen(b, n, panel);  // a constant width is worth a branch
}

template <class X>
void pair(const X* low, const X* high, int n, Pair* to) {
  for (int i = 0; i < n; i++) to[i].bits = half(low[i]) | (high ? half(high[i]) << 16 : 0);
}

template <class X>
void pack(const X* b, int64_t stride, int k, int n, Pair* panel) {
  for (int j = 0; j < k; j += 2, b += 2 * stride, panel += kTileCols) {
    const X* next = j + 1 < k ? b + stride : nullptr;
    n == kTileCols && next ? pair(b, b + stride, kTileCols, panel) : pair(b, next, n, panel);
  }
}

// a square of vectors, transposed by exchanging ever smaller quarters
template <int Half = kLanes / 2>
void transpose(Vec* rows) {
  if constexpr (Half > 0) {
    IntVec low, high;  // which elements of two rows, the second's counted from kLanes
    for (int j = 0; j < kLanes; j++) {
      low[j] = j & Half ? kLanes + j - Half : j;
      high[j] = j & Half ? kLanes + j : j + Half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
      if (!(i & Half)) {
        Vec upper = rows[i], lower = rows[i + Half];
        rows[i] = __builtin_shuffle(upper, lower, low);
        rows[i + Half] = __builtin_shuffle(upper, lower, high);
      }
    transpose<Half / 2>(rows);
  }
}

// n numbers, which are neighbours along the inner dimension, as words
template <class X>
void read_words(const X* from, int n, float* to) {
  widen(from, n, to);
}

inline void read_words(const Bf16* from, int n, Pair* to) { std::memcpy(to, from, n * sizeof(Bf16)); }

// the same panel of the transpose of a block [n, k]
template <class X, class W>
void pack_transposed(const X* b, int64_t stride, int k, int n, W* panel) {
  constexpr int kSquare = kLanes * kNumbers<W>;  // numbers of a row of words
  for (int n0 = 0; n0 < n; n0 += kLanes)
    for (int k0 = 0; k0 < k; k0 += kSquare) {
      Vec square[kLanes];
      int width = std::min(kLanes, n - n0), depth = std::min(kSquare, k - k0);
      const X* from = b + n0 * stride + k0;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        W row[kLanes] = {};
        if (depth == kSquare && i < width)
          read_words(from + i * stride, kSquare, row);
        else if (i < width)
          read_words(from + i * stride, depth, row);
        square[i] = load(reinterpret_cast<const float*>(row));
      }
      transpose(square);
      W* to = panel + k0 / kNumbers<W> * kTileCols + n0;
      for (int j = 0; j * kNumbers<W> < depth; j++) store(reinterpret_cast<float*>(to + j * kTileCols), square[j]);
    }
}

// rows [m, k] as words, [m, words of a row]
inline const float* as_words(const float* a, int64_t, int64_t, float) { return a; }

inline const Pair* as_words(const float* a, int64_t m, int64_t k, Pair) {
  const int64_t words = (k + 1) / 2;
  Pair* to = packed.rows.as<Pair>(m * words);
  for (int64_t i = 0; i < m; i++, a += k) {
    for (int64_t j = 0; j < k / 2; j++) to[i * words + j].bits = half(a[2 * j]) | half(a[2 * j + 1]) << 16;
    if (k % 2) to[i * words + k / 2].bits = half(a[k - 1]);
  }
  return to;
}

// prefetches rows of a matrix into the caches, some of them at a time, between products
struct Ahead {
  const char* first;
  int64_t stride;
  int rows, bytes;
  void part(int64_t index, int64_t parts) const {
    for (int64_t i = rows * index / parts; i < rows * (index + 1) / parts; i++)
      for (int j = 0; j < bytes; j += 64) __builtin_prefetch(first + i * stride + j, 0, 2);
  }
};

// C[m, n] (+)= A[m, k] B, with B [k, n], or [n, k] if Transposed
template <bool Transposed, class X>
void multiply(int m, int k, int n, const float* a, const X* b, float* c, bool add = false) {
  using W = Word<X>;
  constexpr int kPer = kNumbers<W>;
  W* panel = packed.panel.as<W>(kDepth * kTileCols);
  const W* rows = as_words(a, m, k, W());
  const int64_t stride = Transposed ? k : n, words = (k + kPer - 1) / kPer, tiles = (m + kTileRows - 1) / kTileRows;
  auto block = [&](int k0, int n0) { return b + (Transposed ? n0 * stride + k0 : k0 * stride + n0); };
  auto ahead = [&](int k0, int n0) {
    int depth = std::max(0, std::min(kDepth, k - k0)), width = std::min(kTileCols, n - n0), x = sizeof(X);
    return Ahead{reinterpret_cast<const char*>(block(k0, n0)), stride * x, Transposed ? width : depth,
                 (Transposed ? depth : width) * x};
  };
  for (int k0 = 0; k0 < k; k0 += kDepth)
    for (int n0 = 0; n0 < n; n0 += kTileCols) {
      int depth = std::min(kDepth, k - k0), width = std::min(kTileCols, n - n0);
      Transposed ? pack_transposed(block(k0, n0), stride, depth, width, panel)
                 : pack(block(k0, n0), stride, depth, width, panel);
      Ahead next = n0 + kTileCols < n ? ahead(k0, n0 + kTileCols) : ahead(k0 + kDepth, 0);
      for (int64_t i = 0; i < tiles; i++) {
        int64_t row = i * kTileRows;
        next.part(i, tiles);
        tile_of<false>(std::min<int>(kTileRows, m - row), (depth + kPer - 1) / kPer, rows + row * words + k0 / kPer,
                       words, static_cast<const W*>(panel), int64_t(kTileCols), c + row * n + n0, int64_t(n), width,
                       add || k0 > 0);
      }
    }
}

// rows of A^T, in words: [., kTileRows] from A [k, n]
inline void pack_columns(const float* a, int64_t stride, int k, int n, float* to) {
  for (int j = 0; j < k; j++) std::memcpy(to + j * kTileRows, a + j * stride, n * sizeof(float));
}

inline void pack_columns(const float* a, int64_t stride, int k, int n, Pair* to) {
  for (int j = 0; j < k; j += 2, to += kTileRows) pair(a + j * stride, j + 1 < k ? a + (j + 1) * stride : nullptr, n, to);
}

// C[p, q] (+)= A^T B in the words of X, with A [m, p] and B [m, q], whose rows are the strides apart
template <class X>
void multiply_outer(int m, int p, int q, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           float* c, int64_t c_stride, bool add) {
  using W = Word<X>;
  constexpr int kPer = kNumbers<W>;
  int tiles = (p + kTileRows - 1) / kTileRows;
  W* columns = packed.columns.as<W>(int64_t(tiles) * kDepth * kTileRows);
  W* panel = packed.panel.as<W>(kDepth * kTileCols);
  for (int k0 = 0; k0 < m; k0 += kDepth) {
    int depth = std::min(kDepth, m - k0);
    for (int64_t i = 0; i < tiles; i++)
      pack_columns(a + k0 * a_stride + i * kTileRows, a_stride, depth, std::min<int>(kTileRows, p - i * kTileRows),
                   columns + i * kDepth * kTileRows);
    for (int n0 = 0; n0 < q; n0 += kTileCols) {
      int width = std::min(kTileCols, q - n0);
      pack(b + k0 * b_stride + n0, b_stride, depth, width, panel);
      for (int64_t i = 0; i < tiles; i++)
        tile_of<true>(std::min<int>(kTileRows, p - i * kTileRows), (depth + kPer - 1) / kPer,
                      static_cast<const W*>(columns + i * kDepth * kTileRows), int64_t(kTileRows),
                      static_cast<const W*>(panel), int64_t(kTileCols), c + i * kTileRows * c_stride + n0, c_stride,
                      width, add || k0 > 0);
    }
  }
}

}  // namespace moe
