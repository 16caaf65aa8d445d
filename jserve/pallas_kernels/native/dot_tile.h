// Products of a few rows with a few rows: the inner loop of attention's scores.
#ifndef JSERVE_NATIVE_DOT_TILE_H_
#define JSERVE_NATIVE_DOT_TILE_H_

#include <cstdint>

#include "simd.h"

namespace jserve {

// out[a * out_stride + b] = x[a] . w[b], rows of `dim` elements.
//
// Every product is summed in one order, lane by lane and then across lanes, whatever the size of
// the tile it is computed in: results do not depend on what else is in a batch.
template <int A, int B, class W>
inline void DotTile(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t dim,
                    float* out, int64_t out_stride) {
  Vec sums[A][B] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec xs[A];
    for (int a = 0; a < A; ++a) xs[a] = Load(x + a * x_stride + d);
    for (int b = 0; b < B; ++b) {
      Vec wb = Load(w + b * w_stride + d);
      for (int a = 0; a < A; ++a) sums[a][b] += xs[a] * wb;
    }
  }
  if (d < dim) {
    for (int b = 0; b < B; ++b) {
      Vec wb = LoadSome(w + b * w_stride + d, dim - d);
      for (int a = 0; a < A; ++a) sums[a][b] += LoadSome(x + a * x_stride + d, dim - d) * wb;
    }
  }
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) out[a * out_stride + b] = Sum(sums[a][b]);
  }
}

// Rows of a register tile: with the operands these fill the registers there are.
inline constexpr int kTileA = 4;
inline constexpr int kTileB = kLanes == 16 ? 6 : 2;

template <int A, class W>
inline void DotColumns(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t dim,
                       int64_t count, float* out, int64_t out_stride) {
  int64_t b = 0;
  for (; b + kTileB <= count; b += kTileB) {
    DotTile<A, kTileB>(x, x_stride, w + b * w_stride, w_stride, dim, out + b, out_stride);
  }
  for (; b < count; ++b) {
    DotTile<A, 1>(x, x_stride, w + b * w_stride, w_stride, dim, out + b, out_stride);
  }
}

// out[a * out_stride + b] = x[a] . w[b] for any number of rows of both.
template <class W>
inline void Dots(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t w_stride,
                 int64_t count, int64_t dim, float* out, int64_t out_stride) {
  int64_t a = 0;
  for (; a + kTileA <= rows; a += kTileA) {
    DotColumns<kTileA>(x + a * x_stride, x_stride, w, w_stride, dim, count, out + a * out_stride,
                       out_stride);
  }
  x += a * x_stride;
  out += a * out_stride;
  switch (rows - a) {
    case 3:
      return DotColumns<3>(x, x_stride, w, w_stride, dim, count, out, out_stride);
    case 2:
      return DotColumns<2>(x, x_stride, w, w_stride, dim, count, out, out_stride);
    case 1:
      return DotColumns<1>(x, x_stride, w, w_stride, dim, count, out, out_stride);
    default:
      return;
  }
}

}  // namespace jserve

#endif  // JSERVE_NATIVE_DOT_TILE_H_
