// Ragged paged attention: writes K and V of a step's tokens into pages, then attends.
//
// One routine serves decode rows and prompt chunks: a work item is a tile of a row's queries and
// one KV head, walked over blocks of kBlock KV tokens at fixed absolute positions with a running
// softmax. Every (query, key) product and every sum is made in one order whatever the tile is, so
// a token's output does not depend on its neighbours, its row or how its prompt was cut.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dot_tile.h"
#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 128;      // KV tokens of one softmax update
constexpr int64_t kTileQueries = 8;  // query tokens of a work item
constexpr float kMasked = -1e30f;    // finite: a fully masked block changes nothing
constexpr int64_t kInlineWork = 1 << 15;  // multiplications below which threads do not pay

template <class T>
struct Problem {
  const float* q;         // [tokens, q_heads, head_dim]
  const float* k;         // [tokens, kv_heads, head_dim]
  const float* v;         // the same
  T* pages;               // [pages, K|V, kv_heads, page_size, head_dim]
  const int32_t* table;   // [rows, pages_per_row]
  const int32_t* kv_lens;  // [rows]
  const int32_t* q_starts;
  const int32_t* q_lens;
  const int32_t* write_pages;  // [tokens]
  const int32_t* write_offsets;
  float* out;  // [tokens, q_heads, head_dim]
  int64_t tokens, q_heads, kv_heads, head_dim, page_size, pages_per_row, num_rows, window;

  T* Head(int32_t page, int64_t part, int64_t head) const {
    return pages + ((page * 2 + part) * kv_heads + head) * page_size * head_dim;
  }
};

// A tile of queries of one row that share one KV head.
struct Item {
  int32_t row;
  int32_t head;
  int32_t first;  // query of the row
  int32_t count;
};

template <class T>
void WriteKv(const Problem<T>& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t from = (t * p.kv_heads + h) * p.head_dim;
      const int64_t to = p.write_offsets[t] * p.head_dim;
      T* keys = p.Head(p.write_pages[t], 0, h) + to;
      T* values = p.Head(p.write_pages[t], 1, h) + to;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Put(p.k[from + d], keys + d);
        Put(p.v[from + d], values + d);
      }
    }
  }
}

// Calls body(t, page, offset, count) for the runs of [begin, end) that lie in one page each.
template <class T, class Body>
inline void ForRuns(const Problem<T>& p, int64_t row, int64_t begin, int64_t end, Body body) {
  const int32_t* table = p.table + row * p.pages_per_row;
  for (int64_t t = begin; t < end;) {
    const int64_t offset = t % p.page_size;
    const int64_t count = std::min(p.page_size - offset, end - t);
    body(t, table[t / p.page_size], offset, count);
    t += count;
  }
}

template <class T>
inline const T* NextKeys(const Problem<T>& p, const Item& item, int64_t t) {
  const int32_t page = p.table[item.row * p.pages_per_row + t / p.page_size];
  return p.Head(page, 0, item.head) + t % p.page_size * p.head_dim;
}

// out[r] += weights[r] . values for R rows and the tokens of one run.
template <int R, class T>
inline void AddValues(const float* weights, const T* values, int64_t count, int64_t head_dim,
                      float* out) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= head_dim; d += kVecs * kLanes) {
    Vec sums[R][kVecs];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kVecs; ++i) sums[r][i] = Load(out + r * head_dim + d + i * kLanes);
    }
    for (int64_t t = 0; t < count; ++t) {
      Vec value[kVecs];
      for (int i = 0; i < kVecs; ++i) value[i] = Load(values + t * head_dim + d + i * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec weight = Splat(weights[r * kBlock + t]);
        for (int i = 0; i < kVecs; ++i) sums[r][i] += weight * value[i];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kVecs; ++i) Store(sums[r][i], out + r * head_dim + d + i * kLanes);
    }
  }
  for (; d < head_dim; d += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, head_dim - d);
    for (int r = 0; r < R; ++r) {
      Vec sum = LoadSome(out + r * head_dim + d, width);
      for (int64_t t = 0; t < count; ++t) {
        sum += Splat(weights[r * kBlock + t]) * LoadSome(values + t * head_dim + d, width);
      }
      StoreSome(sum, out + r * head_dim + d, width);
    }
  }
}

template <class T>
inline void AddAllValues(const float* weights, int64_t rows, const T* values, int64_t count,
                         int64_t head_dim, float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    AddValues<4>(weights + r * kBlock, values, count, head_dim, out + r * head_dim);
  }
  weights += r * kBlock;
  out += r * head_dim;
  switch (rows - r) {
    case 3:
      return AddValues<3>(weights, values, count, head_dim, out);
    case 2:
      return AddValues<2>(weights, values, count, head_dim, out);
    case 1:
      return AddValues<1>(weights, values, count, head_dim, out);
    default:
      return;
  }
}

// One tile's running softmax; its memory is kept by the thread from item to item.
struct Softmax {
  std::vector<float> queries, scores, out;  // [rows, head_dim], [rows, kBlock], [rows, head_dim]
  std::vector<float> peak, total;           // [rows]

  void Start(int64_t rows, int64_t head_dim) {
    queries.resize(rows * head_dim);
    scores.resize(rows * kBlock);
    out.assign(rows * head_dim, 0.0f);
    peak.assign(rows, kMasked);
    total.assign(rows, 0.0f);
  }

  // Turns scores of positions [low, high) of a block into weights; the others weigh nothing.
  void Update(int64_t row, int64_t low, int64_t high, int64_t head_dim) {
    float* s = scores.data() + row * kBlock;
    for (int64_t t = 0; t < low; ++t) s[t] = kMasked;
    for (int64_t t = std::max(low, high); t < kBlock; ++t) s[t] = kMasked;
    Vec top = Splat(kMasked);
    for (int64_t t = 0; t < kBlock; t += kLanes) top = Max(top, Load(s + t));
    float found = peak[row];
    for (int i = 0; i < kLanes; ++i) found = std::max(found, top[i]);
    Vec sum = {};
    for (int64_t t = 0; t < kBlock; t += kLanes) {
      const Vec score = Load(s + t);
      const Vec weight = score <= Splat(kMasked) ? Vec{} : Exp(score - found);
      sum += weight;
      Store(weight, s + t);
    }
    if (found != peak[row]) {
      const float fade = Exp(Splat(peak[row] - found))[0];
      total[row] *= fade;
      for (int64_t d = 0; d < head_dim; ++d) out[row * head_dim + d] *= fade;
      peak[row] = found;
    }
    total[row] += Sum(sum);
  }
};

template <class T>
void Attend(const Problem<T>& p, const Item& item, Softmax& s) {
  const int64_t group = p.q_heads / p.kv_heads, dim = p.head_dim;
  const int64_t rows = item.count * group;
  const int64_t kv_len = p.kv_lens[item.row];
  const int64_t token = p.q_starts[item.row] + item.first;
  const int64_t position = kv_len - p.q_lens[item.row] + item.first;  // of the first query
  s.Start(rows, dim);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = p.q + ((token + r / group) * p.q_heads + item.head * group + r % group) * dim;
    std::copy(from, from + dim, s.queries.data() + r * dim);
  }
  const int64_t last = position + item.count;  // one past what the last query sees
  const int64_t first = p.window ? std::max<int64_t>(position - p.window + 1, 0) : 0;
  for (int64_t block = first / kBlock * kBlock; block < last; block += kBlock) {
    const int64_t begin = std::max(block, first), end = std::min(block + kBlock, last);
    ForRuns(p, item.row, begin, end, [&](int64_t t, int32_t page, int64_t at, int64_t count) {
      // Pages lie anywhere, so the processor cannot guess what comes next: the values of these
      // tokens, and the keys of the tokens after them.
      Prefetch(p.Head(page, 1, item.head) + at * dim, count * dim);
      if (t + count < last) Prefetch(NextKeys(p, item, t + count), p.page_size * dim);
      Dots(s.queries.data(), dim, rows, p.Head(page, 0, item.head) + at * dim, dim, count, dim,
           s.scores.data() + (t - block), kBlock);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = position + r / group;  // the query's own position
      const int64_t low = p.window ? std::clamp(seen - p.window + 1, begin, end) : begin;
      s.Update(r, low - block, std::min(seen + 1, end) - block, dim);
    }
    ForRuns(p, item.row, begin, end, [&](int64_t t, int32_t page, int64_t at, int64_t count) {
      const T* values = p.Head(page, 1, item.head) + at * dim;
      const float* weights = s.scores.data() + (t - block);
      AddAllValues(weights, rows, values, count, dim, s.out.data());
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = p.out + ((token + r / group) * p.q_heads + item.head * group + r % group) * dim;
    const float scale = 1.0f / std::max(s.total[r], 1e-30f);
    for (int64_t d = 0; d < dim; ++d) to[d] = s.out[r * dim + d] * scale;
  }
}

template <class T>
void Run(ffi::ThreadPool pool, const Problem<T>& p) {
  WriteKv(p);
  std::fill(p.out, p.out + p.tokens * p.q_heads * p.head_dim, 0.0f);
  std::vector<Item> items;
  int64_t work = 0;
  for (int32_t row = 0; row < p.num_rows; ++row) {
    if (p.q_lens[row] == 0) continue;
    work += int64_t{p.kv_lens[row]} * p.q_lens[row] * p.q_heads * p.head_dim;
    // Later tiles see more: they go first, so that threads end together.
    for (int32_t first = (p.q_lens[row] - 1) / kTileQueries * kTileQueries; first >= 0;
         first -= kTileQueries) {
      const auto count = std::min<int32_t>(kTileQueries, p.q_lens[row] - first);
      for (int32_t head = 0; head < p.kv_heads; ++head) items.push_back({row, head, first, count});
    }
  }
  const auto attend = [&](int64_t i) {
    thread_local Softmax softmax;
    Attend(p, items[i], softmax);
  };
  const auto count = static_cast<int64_t>(items.size());
  if (work < kInlineWork) {
    for (int64_t i = 0; i < count; ++i) attend(i);
  } else {
    ParallelFor(pool, count, attend);
  }
}

using Ints = ffi::Buffer<ffi::S32>;

ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                     ffi::Buffer<ffi::F32> v, ffi::AnyBuffer pages, Ints table, Ints kv_lens,
                     Ints q_starts, Ints q_lens, Ints num_rows, Ints write_pages,
                     Ints write_offsets, int64_t window, ffi::ResultBuffer<ffi::F32> out,
                     ffi::Result<ffi::AnyBuffer> pages_out) {
  if (pages.untyped_data() != pages_out->untyped_data()) {
    return ffi::Error::Internal("the pages were copied");  // an alias of operand and result
  }
  const auto run = [&](auto* data) {
    Problem<std::remove_pointer_t<decltype(data)>> p{
        q.typed_data(), k.typed_data(), v.typed_data(), data, table.typed_data(),
        kv_lens.typed_data(), q_starts.typed_data(), q_lens.typed_data(),
        write_pages.typed_data(), write_offsets.typed_data(), out->typed_data(),
        q.dimensions()[0], q.dimensions()[1], k.dimensions()[1], q.dimensions()[2],
        pages.dimensions()[3], table.dimensions()[1],
        std::clamp<int64_t>(*num_rows.typed_data(), 0, table.dimensions()[0]), window};
    Run(pool, p);
    return ffi::Error::Success();
  };
  if (pages.element_type() == ffi::F32) return run(pages.typed_data<float>());
  if (pages.element_type() == ffi::BF16) {
    return run(reinterpret_cast<BFloat16*>(pages.untyped_data()));
  }
  return ffi::Error::InvalidArgument("pages are neither float32 nor bfloat16");
}

}  // namespace
}  // namespace jserve

using F32 = xla::ffi::Buffer<xla::ffi::F32>;
using S32 = xla::ffi::Buffer<xla::ffi::S32>;
XLA_FFI_DEFINE_HANDLER_SYMBOL(jserve_ragged_paged_attention, jserve::Attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<F32>()  // q
                                  .Arg<F32>()  // k
                                  .Arg<F32>()  // v
                                  .Arg<xla::ffi::AnyBuffer>()  // pages
                                  .Arg<S32>()  // page_table
                                  .Arg<S32>()  // kv_lens
                                  .Arg<S32>()  // q_starts
                                  .Arg<S32>()  // q_lens
                                  .Arg<S32>()  // num_rows
                                  .Arg<S32>()  // write_pages
                                  .Arg<S32>()  // write_offsets
                                  .Attr<int64_t>("window")
                                  .Ret<F32>()
                                  .Ret<xla::ffi::AnyBuffer>());
