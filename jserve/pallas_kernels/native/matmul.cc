// y = x . weight^T in float32 for one or several weights, float32 or bfloat16, in panels: see
// panel_matmul.h.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "panel_matmul.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

ffi::Error MatMul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> num_rows,
                  ffi::RemainingArgs weights, ffi::RemainingRets results) {
  // The rows after the first `num_rows` stay as they are: nobody reads them.
  const int64_t rows = std::clamp<int64_t>(*num_rows.typed_data(), 0, x.dimensions()[0]);
  const int64_t in_dim = x.dimensions()[1];
  if (rows == 0) return ffi::Error::Success();
  if (weights.size() != results.size()) return ffi::Error::InvalidArgument("weights lack");
  int64_t panels = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto shape = weights.get<ffi::AnyBuffer>(i).value().dimensions();
    if (shape.size() != 3) return ffi::Error::InvalidArgument("a weight has not three dimensions");
    panels += shape[0];
  }
  const int64_t pieces = std::max<int64_t>(pool.num_threads(), 1) * 8;
  const int64_t size = std::clamp<int64_t>(panels / pieces, 1, 8);
  std::vector<Block> blocks;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto weight = weights.get<ffi::AnyBuffer>(i).value();
    auto y = results.get<ffi::Buffer<ffi::F32>>(i).value();
    const auto shape = weight.dimensions();
    const int64_t out_dim = y->dimensions()[1];
    if (shape[0] != (out_dim + kPanel - 1) / kPanel || shape[1] != in_dim ||
        shape[2] != kPanel) {
      return ffi::Error::InvalidArgument("a weight is not laid out as panels of 32 outputs");
    }
    const bool is_float32 = weight.element_type() == ffi::F32;
    if (!is_float32 && weight.element_type() != ffi::BF16) {
      return ffi::Error::InvalidArgument("a weight is neither float32 nor bfloat16");
    }
    for (int64_t p = 0; p < shape[0]; p += size) {
      blocks.push_back({weight.untyped_data(), is_float32, y->typed_data(), out_dim, p,
                        std::min<int64_t>(shape[0], p + size)});
    }
  }
  ParallelFor(pool, static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    Multiply(x.typed_data(), rows, in_dim, blocks[i]);
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
