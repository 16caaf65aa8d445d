// Rows divided by their root mean square and weighted, in float32.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

ffi::Error RmsNorm(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight, float eps, float offset,
                   ffi::ResultBuffer<ffi::F32> y) {
  const int64_t dim = weight.dimensions()[0];
  const int64_t rows = static_cast<int64_t>(x.element_count()) / dim;
  const float* w = weight.typed_data();
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x.typed_data() + r * dim;
    float* to = y->typed_data() + r * dim;
    Vec squares = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) squares += Load(from + d) * Load(from + d);
    if (d < dim) squares += LoadSome(from + d, dim - d) * LoadSome(from + d, dim - d);
    const float scale = 1.0f / std::sqrt(Sum(squares) / static_cast<float>(dim) + eps);
    for (d = 0; d < dim; ++d) to[d] = from[d] * scale * (w[d] + offset);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_rms_norm, jserve::RmsNorm,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weight
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
