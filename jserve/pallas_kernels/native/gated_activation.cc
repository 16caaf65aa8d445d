// activation(gate) * up, element by element: SwiGLU and GeGLU.
#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kShare = 1 << 13;  // floats that one thread takes at a time

// x / (1 + e^-y), zero where the exponential would overflow.
inline Vec Sigmoid(Vec x, Vec y) { return y < Splat(-87.0f) ? Vec{} : x / (1.0f + Exp(-y)); }

inline Vec Silu(Vec x) { return Sigmoid(x, x); }

// GELU's approximation by tanh: x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), where
// (1 + tanh u) / 2 = 1 / (1 + e^-2u).
inline Vec Gelu(Vec x) { return Sigmoid(x, 1.5957691216f * (x + 0.044715f * x * x * x)); }

template <class Activation>
void Gated(const float* gate, const float* up, int64_t count, float* out, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(activation(Load(gate + i)) * Load(up + i), out + i);
  if (i == count) return;
  const int64_t left = count - i;
  StoreSome(activation(LoadSome(gate + i, left)) * LoadSome(up + i, left), out + i, left);
}

using Floats = ffi::Buffer<ffi::F32>;

ffi::Error GatedActivation(ffi::ThreadPool pool, Floats gate, Floats up,
                           ffi::Buffer<ffi::S32> num_tokens, bool is_silu,
                           ffi::Result<Floats> out) {
  // The tokens after the first `num_tokens` stay as they are: nobody reads them.
  const int64_t tokens = std::clamp<int64_t>(*num_tokens.typed_data(), 0, gate.dimensions()[0]);
  if (up.element_count() != gate.element_count()) {
    return ffi::Error::InvalidArgument("gate and up have different sizes");
  }
  const int64_t count = tokens * gate.dimensions()[1];
  ParallelFor(pool, (count + kShare - 1) / kShare, [&](int64_t i) {
    const int64_t begin = i * kShare, size = std::min(kShare, count - begin);
    const float *g = gate.typed_data() + begin, *u = up.typed_data() + begin;
    if (is_silu) {
      Gated(g, u, size, out->typed_data() + begin, Silu);
    } else {
      Gated(g, u, size, out->typed_data() + begin, Gelu);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_gated_activation, jserve::GatedActivation,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gate
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // up
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // num_tokens
                                  .Attr<bool>("is_silu")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
