// y = x . weight^T in float32 for one or several weights, float32 or bfloat16, [out, in].
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dot_tile.h"
#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

// Some outputs of one product: what one thread takes at a time.
struct Panel {
  const void* weight;  // [out_dim, in_dim]
  bool is_float32;
  float* y;  // [rows, out_dim]
  int64_t out_dim;
  int64_t begin, end;  // of the outputs
};

template <class W>
void Multiply(const float* x, int64_t rows, int64_t in_dim, const Panel& p) {
  const W* weight = static_cast<const W*>(p.weight);
  // A few weight rows stay in the first cache while all rows of x go by.
  for (int64_t n = p.begin; n < p.end; n += kTileB) {
    Dots(x, in_dim, rows, weight + n * in_dim, in_dim, std::min<int64_t>(kTileB, p.end - n), in_dim,
         p.y + n, p.out_dim);
  }
}

ffi::Error MatMul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> num_rows,
                  ffi::RemainingArgs weights, ffi::RemainingRets results) {
  // The rows after the first `num_rows` are left as they are: nobody reads them.
  const int64_t rows = std::clamp<int64_t>(*num_rows.typed_data(), 0, x.dimensions()[0]);
  const int64_t in_dim = x.dimensions()[1];
  if (rows == 0) return ffi::Error::Success();
  std::vector<Panel> panels;
  int64_t outputs = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    outputs += results.get<ffi::Buffer<ffi::F32>>(i).value()->dimensions()[1];
  }
  // Few large panels for few rows, where memory bounds the work; more for an even end otherwise.
  const int64_t pieces = std::max<int64_t>(pool.num_threads(), 1) * (rows > 8 ? 8 : 3);
  const int64_t size =
      std::max<int64_t>(1, std::min<int64_t>(outputs / pieces / kTileB, 16)) * kTileB;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto weight = weights.get<ffi::AnyBuffer>(i).value();
    if (weight.dimensions()[1] != in_dim) {
      return ffi::Error::InvalidArgument("inner dimensions differ");
    }
    const bool is_float32 = weight.element_type() == ffi::F32;
    if (!is_float32 && weight.element_type() != ffi::BF16) {
      return ffi::Error::InvalidArgument("a weight is neither float32 nor bfloat16");
    }
    float* y = results.get<ffi::Buffer<ffi::F32>>(i).value()->typed_data();
    const int64_t out_dim = weight.dimensions()[0];
    for (int64_t n = 0; n < out_dim; n += size) {
      panels.push_back({weight.untyped_data(), is_float32, y, out_dim, n,
                        std::min(out_dim, n + size)});
    }
  }
  ParallelFor(pool, static_cast<int64_t>(panels.size()), [&](int64_t i) {
    if (panels[i].is_float32) {
      Multiply<float>(x.typed_data(), rows, in_dim, panels[i]);
    } else {
      Multiply<BFloat16>(x.typed_data(), rows, in_dim, panels[i]);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_matmul, jserve::MatMul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // num_rows
                                  .RemainingArgs()   // weights
                                  .RemainingRets());  // [rows, out] of each weight
