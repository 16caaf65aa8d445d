// y = x . weight[e]^T in float32 for the rows of each expert e, which lie one after the other, with
// one or several stacks of weights in panels: see panel_matmul.h. An expert that has no rows costs
// nothing: its weights are not read.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "panel_matmul.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

// The rows of one expert.
struct Group {
  int64_t expert, begin, rows;
};

// Some panels of one expert's weight, and the rows to multiply with them.
struct Piece {
  const float* x;  // [rows, in_dim]
  int64_t rows;
  Block block;
};

// The experts that have rows. The rows after the last group stay as they are: nobody reads them.
std::vector<Group> Groups(ffi::Buffer<ffi::S32> sizes, int64_t num_rows) {
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < static_cast<int64_t>(sizes.element_count()); ++expert) {
    const int64_t rows = std::clamp<int64_t>(sizes.typed_data()[expert], 0, num_rows - begin);
    if (rows > 0) groups.push_back({expert, begin, rows});
    begin += rows;
  }
  return groups;
}

ffi::Error GroupedMatMul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                         ffi::Buffer<ffi::S32> group_sizes, ffi::RemainingArgs weights,
                         ffi::RemainingRets results) {
  const int64_t in_dim = x.dimensions()[1];
  const std::vector<Group> groups = Groups(group_sizes, x.dimensions()[0]);
  if (weights.size() != results.size()) return ffi::Error::InvalidArgument("weights lack");
  int64_t panels = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto shape = weights.get<ffi::AnyBuffer>(i).value().dimensions();
    const int64_t out_dim = results.get<ffi::Buffer<ffi::F32>>(i).value()->dimensions()[1];
    if (shape.size() != 4 || shape[0] != group_sizes.dimensions()[0] ||
        shape[1] != (out_dim + kPanel - 1) / kPanel || shape[2] != in_dim || shape[3] != kPanel) {
      return ffi::Error::InvalidArgument("weights are not laid out as panels of 32 outputs");
    }
    panels += shape[1] * static_cast<int64_t>(groups.size());
  }
  const int64_t size =
      std::clamp<int64_t>(panels / (std::max<int64_t>(pool.num_threads(), 1) * 8), 1, 8);
  std::vector<Piece> pieces;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto weight = weights.get<ffi::AnyBuffer>(i).value();
    auto y = results.get<ffi::Buffer<ffi::F32>>(i).value();
    const int64_t count = weight.dimensions()[1], out_dim = y->dimensions()[1];
    const bool is_float32 = weight.element_type() == ffi::F32;
    if (!is_float32 && weight.element_type() != ffi::BF16) {
      return ffi::Error::InvalidArgument("a weight is neither float32 nor bfloat16");
    }
    const int64_t expert_bytes = count * in_dim * kPanel * (is_float32 ? 4 : 2);
    for (const Group& group : groups) {
      const char* own = static_cast<const char*>(weight.untyped_data()) + group.expert * expert_bytes;
      float* to = y->typed_data() + group.begin * out_dim;
      for (int64_t p = 0; p < count; p += size) {
        pieces.push_back({x.typed_data() + group.begin * in_dim, group.rows,
                          {own, is_float32, to, out_dim, p, std::min(count, p + size)}});
      }
    }
  }
  ParallelFor(pool, static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    Multiply(pieces[i].x, pieces[i].rows, in_dim, pieces[i].block);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_grouped_matmul, jserve::GroupedMatMul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // group_sizes
                                  .RemainingArgs()   // weights of all experts
                                  .RemainingRets());  // [rows, out] of each
