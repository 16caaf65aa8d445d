// Rotary embedding of queries and keys: dimension i of a head rotates with i + half its size.
#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kShare = 1 << 14;  // floats that one thread turns at a time

// out = scale * x, each of `heads` rotated by one token's angles.
inline void Turn(const float* x, int64_t heads, int64_t half, const float* cos, const float* sin,
                 float scale, float* out) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half, out += 2 * half) {
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) {
      const Vec first = Load(x + d), second = Load(x + half + d);
      const Vec c = Load(cos + d), s = Load(sin + d);
      Store((first * c - second * s) * scale, out + d);
      Store((second * c + first * s) * scale, out + half + d);
    }
    for (; d < half; ++d) {
      out[d] = (x[d] * cos[d] - x[half + d] * sin[d]) * scale;
      out[half + d] = (x[half + d] * cos[d] + x[d] * sin[d]) * scale;
    }
  }
}

using Floats = ffi::Buffer<ffi::F32>;

ffi::Error Rotary(ffi::ThreadPool pool, Floats q, Floats k, Floats cos, Floats sin,
                  ffi::Buffer<ffi::S32> num_tokens, float q_scale, ffi::Result<Floats> q_out,
                  ffi::Result<Floats> k_out) {
  // The tokens after the first `num_tokens` stay as they are: nobody reads them.
  const int64_t tokens = std::clamp<int64_t>(*num_tokens.typed_data(), 0, q.dimensions()[0]);
  const int64_t q_heads = q.dimensions()[1], kv_heads = k.dimensions()[1];
  const int64_t dim = q.dimensions()[2], half = dim / 2;
  const auto fits = [&](Floats& table) {
    return table.dimensions()[0] >= tokens && table.dimensions()[1] == half;
  };
  if (dim % 2 || k.dimensions()[0] < tokens || k.dimensions()[2] != dim || !fits(cos) || !fits(sin)) {
    return ffi::Error::InvalidArgument("queries, keys and angles do not fit");
  }
  const int64_t share = std::max<int64_t>(1, kShare / ((q_heads + kv_heads) * dim));
  ParallelFor(pool, (tokens + share - 1) / share, [&](int64_t i) {
    for (int64_t t = i * share; t < std::min(tokens, (i + 1) * share); ++t) {
      const float *c = cos.typed_data() + t * half, *s = sin.typed_data() + t * half;
      const int64_t from_q = t * q_heads * dim, from_k = t * kv_heads * dim;
      Turn(q.typed_data() + from_q, q_heads, half, c, s, q_scale, q_out->typed_data() + from_q);
      Turn(k.typed_data() + from_k, kv_heads, half, c, s, 1.0f, k_out->typed_data() + from_k);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_rotary, jserve::Rotary,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // q
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // k
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // cos
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // sin
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // num_tokens
                                  .Attr<float>("q_scale")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
