// y = x . weight^T for one or several weights of 4 or 8 bits in groups of 32 inputs.
//
// A weight is code * scale + offset, one scale and one offset per output and group. Activations of
// float32 are rounded to 8 bits per row and group first, so that the sum of a group is an exact
// integer; groups are added in float32, in order. Weights are stored as the inner loop
// reads them: panels of 16 outputs, and in each group four inputs of an output side by side.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPanel = 16;  // outputs side by side
constexpr int64_t kGroup = 32;  // inputs that share a scale
constexpr int64_t kQuads = kGroup / 4;
constexpr float kSmallest = 1e-30f;  // a group whose largest activation is no larger is all zero

typedef float Floats __attribute__((vector_size(kPanel * 4)));
typedef int32_t Ints __attribute__((vector_size(kPanel * 4)));

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Adds for eight outputs; codes are below 16, so that the sum of two terms fits 16 bits.
inline __m256i AddSmallQuads(__m256i sums, __m256i codes, __m256i x) {
  return _mm256_add_epi32(
      sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
#endif

// sums[n] += code[n][0..3] . x[0..3] for 16 outputs; codes unsigned of kBits, x signed bytes.
template <int kBits>
inline void AddQuad(Ints& sums, const Ints& codes, int32_t x) {
#if defined(__AVX512VNNI__)
  sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  __m256i halves[2], bytes[2];
  std::memcpy(halves, &sums, sizeof sums);
  std::memcpy(bytes, &codes, sizeof codes);
  const __m256i quad = _mm256_set1_epi32(x), low = _mm256_set1_epi8(15);
  for (int i = 0; i < 2; ++i) {
    halves[i] = AddSmallQuads(halves[i], _mm256_and_si256(bytes[i], low), quad);
    if constexpr (kBits == 8) {
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), low);
      const __m256i tens = AddSmallQuads(_mm256_setzero_si256(), high, quad);
      halves[i] = _mm256_add_epi32(halves[i], _mm256_slli_epi32(tens, 4));
    }
  }
  std::memcpy(&sums, halves, sizeof sums);
#else
  for (int i = 0; i < 4; ++i) {
    sums += ((codes >> (8 * i)) & 0xff) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * i)));
  }
#endif
}

inline void LoadHalves(const uint16_t* from, Floats& to) {
#if defined(__AVX512F__)
  // This is not _mm512_cvtph_ps, because GCC 12 warns of that one's undefined source operand.
  to = (Floats)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  for (int i = 0; i < kPanel; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m256 wide = _mm256_cvtph_ps(half);
    std::memcpy(reinterpret_cast<float*>(&to) + i, &wide, sizeof wide);
  }
#else
  for (int i = 0; i < kPanel; ++i) {
    const uint32_t magnitude = from[i] & 0x7fff;
    // A float whose exponent is too small by 112, or, because XLA's threads take denormal floats
    // for zero, the integer that a denormal half is.
    const uint32_t bits = magnitude << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value = magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24f : value * 0x1p112f;
    to[i] = from[i] & 0x8000 ? -value : value;
  }
#endif
}

// Activations in 8 bits: x = scale * code, scale per row and group.
struct Rounded {
  std::vector<int8_t> codes;   // [rows, in]
  std::vector<float> scales;   // [rows, groups]
  std::vector<float> totals;   // [rows, groups] scale * sum of the codes

  void Resize(int64_t rows, int64_t in_dim) {
    codes.resize(rows * in_dim);
    scales.resize(rows * in_dim / kGroup);
    totals.resize(rows * in_dim / kGroup);
  }

  // Rounds groups [begin, end) of all rows, which lie one after the other.
  void Round(const float* x, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) RoundGroup(x + g * kGroup, g);
  }

  void RoundGroup(const float* x, int64_t g) {
    constexpr int kVecs = kGroup / kLanes;
    Vec values[kVecs], tops = {}, poisons = {};
    for (int v = 0; v < kVecs; ++v) {
      values[v] = Load(x + v * kLanes);
      tops = Max(tops, Abs(values[v]));
      poisons += values[v] * 0.0f;  // NaN if any is NaN or infinite: it must show in the results
    }
    const float top = Largest(tops);
    const Vec inverse = Splat(top > kSmallest ? 127.0f / top : 0.0f);
    Vec total = {};
    for (int v = 0; v < kVecs; ++v) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
      const IntVec code = AsInt(values[v] * inverse + 12582912.0f) - 0x4b400000;
      const auto bytes = __builtin_convertvector(code, ByteVec);
      std::memcpy(codes.data() + g * kGroup + v * kLanes, &bytes, sizeof bytes);
      total += __builtin_convertvector(code, Vec);
    }
    scales[g] = (top > kSmallest ? top / 127.0f : 0.0f) + Sum(poisons);
    totals[g] = scales[g] * Sum(total);
  }
};

// Some outputs of one matmul, which one thread takes at a time.
struct Block {
  const uint8_t* codes;    // [panels, groups, bytes of a group]
  const uint16_t* scales;  // [panels, groups, scale|offset, 16] float16
  float* y;                // [rows, out_dim]
  int64_t groups, out_dim;
  bool is_4_bit;
  int64_t begin, end;  // of the panels
};

// y[m, 16 n] for M rows and N panels.
template <int M, int N, int kBits>
inline void Tile(const Rounded& x, const Block& w, int64_t row, int64_t panel) {
  constexpr int64_t kBytes = kPanel * kGroup * kBits / 8;
  const int64_t groups = w.groups, in_dim = groups * kGroup;
  Floats sums[M][N] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Ints dots[M][N] = {};
    const int8_t* xs = x.codes.data() + row * in_dim + g * kGroup;
    for (int64_t j = 0; j < kQuads; ++j) {
      Ints codes[N];
      for (int n = 0; n < N; ++n) {
        const uint8_t* group = w.codes + ((panel + n) * groups + g) * kBytes;
        if constexpr (kBits == 8) {
          std::memcpy(&codes[n], group + j * 64, 64);
        } else {  // the first half of the group in the low bits, the second in the high ones
          Ints both;
          std::memcpy(&both, group + j % (kQuads / 2) * 64, 64);
          codes[n] = (j < kQuads / 2 ? both : both >> 4) & 0x0f0f0f0f;
        }
      }
      for (int m = 0; m < M; ++m) {
        int32_t quad;
        std::memcpy(&quad, xs + m * in_dim + j * 4, sizeof quad);
        for (int n = 0; n < N; ++n) AddQuad<kBits>(dots[m][n], codes[n], quad);
      }
    }
    for (int n = 0; n < N; ++n) {
      const uint16_t* halves = w.scales + ((panel + n) * groups + g) * 2 * kPanel;
      Floats scale, offset;
      LoadHalves(halves, scale);
      LoadHalves(halves + kPanel, offset);
      for (int m = 0; m < M; ++m) {
        const float xscale = x.scales[(row + m) * groups + g];
        const float total = x.totals[(row + m) * groups + g];
        sums[m][n] += __builtin_convertvector(dots[m][n], Floats) * (scale * xscale);
        sums[m][n] += offset * total;
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      std::memcpy(w.y + (row + m) * w.out_dim + (panel + n) * kPanel, &sums[m][n], sizeof sums[m][n]);
    }
  }
}

template <int M, int kBits>
inline void Panels(const Rounded& x, const Block& w, int64_t row, int64_t panel, int64_t count) {
  constexpr int kWide = kLanes < 16 ? 1 : M == 1 ? 4 : 2;  // what the registers hold
  int64_t n = 0;
  for (; n + kWide <= count; n += kWide) {
    Tile<M, kWide, kBits>(x, w, row, panel + n);
  }
  for (; n < count; ++n) Tile<M, 1, kBits>(x, w, row, panel + n);
}

constexpr int64_t kTileRows = kLanes < 16 ? 4 : 6;
constexpr int64_t kStep = 4;  // panels whose weights stay in the cache while all rows go by

template <int kBits>
void Multiply(const Rounded& x, int64_t rows, const Block& w) {
  for (int64_t panel = w.begin; panel < w.end; panel += kStep) {
    const int64_t count = std::min(kStep, w.end - panel);
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) {
      Panels<kTileRows, kBits>(x, w, row, panel, count);
    }
    for (; row + 2 <= rows; row += 2) Panels<2, kBits>(x, w, row, panel, count);
    if (row < rows) Panels<1, kBits>(x, w, row, panel, count);
  }
}

constexpr int64_t kInlineGroups = 512;  // of activations; below, threads do not pay

void RoundAll(ffi::ThreadPool pool, const float* x, int64_t rows, int64_t in_dim, Rounded& rounded) {
  rounded.Resize(rows, in_dim);
  const int64_t groups = rows * in_dim / kGroup;
  const int64_t share = groups < kInlineGroups ? groups : kInlineGroups / 4;
  ParallelFor(pool, (groups + share - 1) / share, [&](int64_t i) {
    rounded.Round(x, i * share, std::min(groups, (i + 1) * share));
  });
}

ffi::Error QuantizedMatMul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                           ffi::Buffer<ffi::S32> num_rows, ffi::RemainingArgs weights,
                           ffi::RemainingRets results) {
  // The rows after the first `num_rows` stay as they are: nobody reads them.
  const int64_t rows = std::clamp<int64_t>(*num_rows.typed_data(), 0, x.dimensions()[0]);
  const int64_t in_dim = x.dimensions()[1];
  if (rows == 0) return ffi::Error::Success();
  int64_t panels = 0;
  if (weights.size() != 2 * results.size()) return ffi::Error::InvalidArgument("weights lack");
  for (size_t i = 0; i < results.size(); ++i) {
    panels += results.get<ffi::Buffer<ffi::F32>>(i).value()->dimensions()[1] / kPanel;
  }
  const int64_t pieces = std::max<int64_t>(pool.num_threads(), 1) * 4;
  const int64_t size = std::clamp<int64_t>(panels / pieces / kStep, 1, 4) * kStep;
  std::vector<Block> blocks;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto codes = weights.get<ffi::Buffer<ffi::U8>>(2 * i).value();
    const auto scales = weights.get<ffi::Buffer<ffi::F16>>(2 * i + 1).value();
    const auto shape = codes.dimensions();
    if (shape.size() != 5) return ffi::Error::InvalidArgument("codes have not five dimensions");
    const int64_t count = shape[0], groups = shape[1];
    if (in_dim != groups * kGroup) return ffi::Error::InvalidArgument("inner dimensions differ");
    if (results.get<ffi::Buffer<ffi::F32>>(i).value()->dimensions()[1] != count * kPanel || (shape[2] != kQuads && shape[2] != kQuads / 2) || shape[3] != kPanel ||
        scales.element_count() != static_cast<size_t>(count * groups * 2 * kPanel)) {
      return ffi::Error::InvalidArgument("codes or scales are not laid out as panels and groups");
    }
    float* y = results.get<ffi::Buffer<ffi::F32>>(i).value()->typed_data();
    for (int64_t n = 0; n < count; n += size) {
      blocks.push_back({codes.typed_data(),
                        reinterpret_cast<const uint16_t*>(scales.untyped_data()), y, groups,
                        count * kPanel, codes.dimensions()[2] != kQuads, n,
                        std::min(count, n + size)});
    }
  }
  thread_local Rounded rounded;
  RoundAll(pool, x.typed_data(), rows, in_dim, rounded);
  const Rounded& shared = rounded;  // of this thread, for all
  ParallelFor(pool, static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    if (blocks[i].is_4_bit) {
      Multiply<4>(shared, rows, blocks[i]);
    } else {
      Multiply<8>(shared, rows, blocks[i]);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_quantized_matmul, jserve::QuantizedMatMul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // num_rows
                                  .RemainingArgs()   // codes and scales of each weight
                                  .RemainingRets());  // [rows, out] of each weight
