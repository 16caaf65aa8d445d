// Matmuls of rows with weights in panels of 32 outputs: the part of one thread.
//
// A panel holds 32 outputs side by side for each input, so that a matmul adds up no lanes: an
// activation is broadcast, and a tile of rows and outputs stays in registers for a run of inputs.
//
//   for each panel (a thread takes some)
//     for each run of 192 inputs          24 KiB of the panel: in the first cache
//       for each tile of 12 rows          sums in registers; the next run comes into the second cache
//         for each input of the run       2 vectors of weights, 12 broadcasts, 24 multiply-adds
//
// Runs are added up in order, so long sums err less, and every output is summed in one order whatever
// the number of rows: results do not depend on what else is in a batch.
#ifndef JSERVE_NATIVE_PANEL_MATMUL_H_
#define JSERVE_NATIVE_PANEL_MATMUL_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace jserve {

constexpr int64_t kPanel = 32;  // outputs side by side
constexpr int64_t kRun = 192;   // inputs that are summed in registers
constexpr int kColumns = 2;     // vectors of outputs in a tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12;  // with the operands these fill 32 registers
#else
constexpr int kTileRows = 6;
#endif
constexpr int64_t kLine = 64;  // bytes of a cache line

// Prefetches of a tile while it computes: `kLines` cache lines for each input of its run.
template <int kLines>
inline void Ahead(const char* next, int64_t k) {
  for (int i = 0; i < kLines; ++i) {
    __builtin_prefetch(next + (k * kLines + i) * kLine, 0, 2);  // into the second cache
  }
}

// y[m, 0..kColumns vectors] (+)= x[m, 0..count] . w for kRows rows; the first run sets y.
template <int kRows, int kLines, class W>
void Tile(const float* x, int64_t in_dim, const W* w, int64_t count, float* y, int64_t y_stride,
          bool first, const char* next) {
  Vec sums[kRows][kColumns] = {};
  for (int64_t k = 0; k < count; ++k) {
    Ahead<kLines>(next, k);
    Vec ws[kColumns];
    for (int c = 0; c < kColumns; ++c) ws[c] = Load(w + k * kPanel + c * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const Vec xs = Broadcast(x + m * in_dim + k);
      for (int c = 0; c < kColumns; ++c) sums[m][c] += xs * ws[c];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) {
      float* to = y + m * y_stride + c * kLanes;
      Store(first ? sums[m][c] : Load(to) + sums[m][c], to);
    }
  }
}

// Calls the routine for the actual number of rows, up to kTileRows.
template <int kLines, class W, int kRows = kTileRows>
void SomeRows(int64_t rows, const float* x, int64_t in_dim, const W* w, int64_t count, float* y,
              int64_t y_stride, bool first, const char* next) {
  if (rows >= kRows) {
    Tile<kRows, kLines>(x, in_dim, w, count, y, y_stride, first, next);
  } else if constexpr (kRows > 1) {
    SomeRows<kLines, W, kRows - 1>(rows, x, in_dim, w, count, y, y_stride, first, next);
  }
}

// One run of inputs for all rows. `next` follows the run in memory: one or two lines an input,
// which the first tiles prefetch, no faster than memory delivers, or the processor would wait; null
// if another strip of the panel has prefetched it.
template <class W>
void AllRows(const float* x, int64_t rows, int64_t in_dim, const W* w, int64_t count, float* y,
             int64_t y_stride, bool first, const char* next) {
  constexpr int kLines = kPanel * sizeof(W) / kLine;
  const int64_t asking = next == nullptr ? 0 : kLines * kTileRows;
  if (rows <= kTileRows && asking) {
    return SomeRows<kLines>(rows, x, in_dim, w, count, y, y_stride, first, next);
  }
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const float* xm = x + m * in_dim;
    float* ym = y + m * y_stride;
    if (m < asking) {
      SomeRows<1>(rows - m, xm, in_dim, w, count, ym, y_stride, first, next);
      next += count * kLine;
    } else {
      SomeRows<0>(rows - m, xm, in_dim, w, count, ym, y_stride, first, next);
    }
  }
}

// y[rows, 32 outputs] = x . panel^T
template <class W>
void WholePanel(const float* x, int64_t rows, int64_t in_dim, const W* panel, float* y,
                int64_t y_stride) {
  for (int64_t k = 0; k < in_dim; k += kRun) {
    const int64_t count = std::min(kRun, in_dim - k);
    const W* w = panel + k * kPanel;
    const char* next = reinterpret_cast<const char*>(w + count * kPanel);
    for (int64_t c = 0; c < kPanel; c += kColumns * kLanes) {
      AllRows(x + k, rows, in_dim, w + c, count, y + c, y_stride, k == 0, c ? nullptr : next);
    }
  }
}

// Some panels of one matmul, which one thread takes at a time.
struct Block {
  const void* weight;  // [panels, in_dim, 32]
  bool is_float32;
  float* y;  // [rows, out_dim]
  int64_t out_dim;
  int64_t begin, end;  // of the panels
};

template <class W>
void Multiply(const float* x, int64_t rows, int64_t in_dim, const Block& b) {
  for (int64_t p = b.begin; p < b.end; ++p) {
    const W* panel = static_cast<const W*>(b.weight) + p * in_dim * kPanel;
    const int64_t columns = std::min(kPanel, b.out_dim - p * kPanel);
    float* y = b.y + p * kPanel;
    if (columns == kPanel) {
      WholePanel(x, rows, in_dim, panel, y, b.out_dim);
      continue;
    }
    std::vector<float> whole(rows * kPanel);
    WholePanel(x, rows, in_dim, panel, whole.data(), kPanel);
    for (int64_t m = 0; m < rows; ++m) {
      std::copy_n(whole.data() + m * kPanel, columns, y + m * b.out_dim);
    }
  }
}

// Multiplies by weights of either type.
inline void Multiply(const float* x, int64_t rows, int64_t in_dim, const Block& b) {
  if (b.is_float32) {
    Multiply<float>(x, rows, in_dim, b);
  } else {
    Multiply<BFloat16>(x, rows, in_dim, b);
  }
}

}  // namespace jserve

#endif  // JSERVE_NATIVE_PANEL_MATMUL_H_
