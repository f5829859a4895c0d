// Products of matrices in float32: a tile of the result stays in registers, a panel of B in the caches.

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
  Buffer columns, panel;
};
inline thread_local Packed packed;

// C[M, n] (+)= A[M, k] B[k, n], n at most V vectors, which every row of B has; the strides are those of rows, and A is
// transposed if ByColumns: A(i, j) is a[j * a_stride + i]
template <int M, int V, bool ByColumns>
void tile(int k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int n,
          bool add) {
  Vec sum[M][V] = {};
  for (int j = 0; j < k; j++) {
    Vec row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) row[v] = load(b + j * b_stride + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[i][v] += (ByColumns ? a[j * a_stride + i] : a[i * a_stride + j]) * row[v];
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

// a block [k, n] of a matrix as a panel [k, kTileCols], in float
template <class X>
void pack(const X* b, int64_t stride, int k, int n, float* panel) {
  for (int j = 0; j < k; j++, b += stride, panel += kTileCols)
    n == kTileCols ? widen(b, kTileCols, panel) : widen(b, n, panel);  // a constant width is worth a branch
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

// the same panel of the transpose of a block [n, k]
template <class X>
void pack_transposed(const X* b, int64_t stride, int k, int n, float* panel) {
  for (int n0 = 0; n0 < n; n0 += kLanes)
    for (int k0 = 0; k0 < k; k0 += kLanes) {
      Vec square[kLanes];
      int width = std::min(kLanes, n - n0), depth = std::min(kLanes, k - k0);
      const X* from = b + n0 * stride + k0;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        float row[kLanes] = {};
        if (depth == kLanes && i < width)
          widen(from + i * stride, kLanes, row);
        else if (i < width)
          widen(from + i * stride, depth, row);
        square[i] = load(row);
      }
      transpose(square);
      for (int j = 0; j < depth; j++) store(panel + (k0 + j) * kTileCols + n0, square[j]);
    }
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
  float* panel = packed.panel.of(kDepth * kTileCols);
  const int64_t stride = Transposed ? k : n, tiles = (m + kTileRows - 1) / kTileRows;
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
        tile_of<false>(std::min<int>(kTileRows, m - row), depth, a + row * k + k0, int64_t(k), panel,
                       int64_t(kTileCols), c + row * n + n0, int64_t(n), width, add || k0 > 0);
      }
    }
}

// C[p, q] (+)= A^T B, with A [m, p] and B [m, q], whose rows are the strides apart
inline void multiply_outer(int m, int p, int q, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           float* c, int64_t c_stride, bool add) {
  int tiles = (p + kTileRows - 1) / kTileRows;
  float* columns = packed.columns.of(int64_t(tiles) * kDepth * kTileRows);
  float* panel = packed.panel.of(kDepth * kTileCols);
  for (int k0 = 0; k0 < m; k0 += kDepth) {
    int depth = std::min(kDepth, m - k0);
    for (int64_t i = 0; i < tiles; i++)
      for (int64_t j = 0; j < depth; j++)
        std::memcpy(columns + (i * kDepth + j) * kTileRows, a + (k0 + j) * a_stride + i * kTileRows,
                    std::min<int>(kTileRows, p - i * kTileRows) * sizeof(float));
    for (int n0 = 0; n0 < q; n0 += kTileCols) {
      int width = std::min(kTileCols, q - n0);
      pack(b + k0 * b_stride + n0, b_stride, depth, width, panel);
      for (int64_t i = 0; i < tiles; i++)
        tile_of<true>(std::min<int>(kTileRows, p - i * kTileRows), depth, columns + i * kDepth * kTileRows,
                      int64_t(kTileRows), panel, int64_t(kTileCols), c + i * kTileRows * c_stride + n0, c_stride, width,
                      add || k0 > 0);
    }
  }
}

}  // namespace moe
