// Ragged paged attention: writes K and V of a step's tokens into pages, then attends.
//
// One routine serves decode rows and prompt chunks: a work item is a tile of a row's queries and
// one KV head, walked over blocks of kBlock KV tokens at fixed absolute positions with a running
// softmax. Every score and every sum is computed in one order whatever the tile is, so
// a token's output does not depend on its neighbours, its row or how its prompt was cut.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 128;      // KV tokens of one softmax update
constexpr int64_t kTileQueries = 8;  // query tokens of a work item
constexpr int32_t kNullPage = 0;     // takes what nothing reads
constexpr float kMasked = -1e30f;    // finite: a fully masked block changes nothing
constexpr int64_t kFewRows = 8;      // for which values are made floats as they are read
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

// A tile of queries of one row, and the KV heads that one thread walks for it.
struct Item {
  int32_t row;
  int32_t first_head, end_head;
  int32_t first;  // query of the row
  int32_t count;
};

template <class From, class To>
inline void Convert(const From* from, int64_t count, To* to) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) Store(Load(from + d), to + d);
  for (; d < count; ++d) Put(ToFloat(from[d]), to + d);
}

template <class T>
void WriteKv(const Problem<T>& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (p.write_pages[t] == kNullPage) continue;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t from = (t * p.kv_heads + h) * p.head_dim;
      const int64_t to = p.write_offsets[t] * p.head_dim;
      Convert(p.k + from, p.head_dim, p.Head(p.write_pages[t], 0, h) + to);
      Convert(p.v + from, p.head_dim, p.Head(p.write_pages[t], 1, h) + to);
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

// Positions [first, last) that an item's queries see.
struct Span {
  int64_t position;  // of the first query
  int64_t first, last;

  template <class T>
  Span(const Problem<T>& p, const Item& item)
      : position(p.kv_lens[item.row] - p.q_lens[item.row] + item.first),
        first(p.window ? std::max<int64_t>(position - p.window + 1, 0) : 0),
        last(position + item.count) {}

  int64_t FirstBlock() const { return first / kBlock * kBlock; }
};

// Prefetches the next block, in which token t of this block stands for token t + shift.
//
// Pages lie anywhere, so the processor cannot guess what comes next; asked for a page at a time
// while one is computed with, memory keeps up.
struct Coming {
  int64_t row = 0, head = 0, shift = 0, last = 0;

  template <class T>
  void AskFor(const Problem<T>& p, int64_t part, int64_t t, int64_t count) const {
    const int64_t first = t + shift;
    if (first >= last) return;
    const int32_t page = p.table[row * p.pages_per_row + first / p.page_size];
    const int64_t at = first % p.page_size;
    Prefetch(p.Head(page, part, head) + at * p.head_dim,
             std::min(count, p.page_size - at) * p.head_dim);
  }
};

// Dots of a query with as many keys as there are lanes: summed lane by lane, then across all lanes
// at once, in one order for every key.
inline Vec ScoreKeys(const float* query, const float* keys, int64_t head_dim) {
  Vec sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = Vec{};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const Vec q = Load(query + d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] += q * Load(keys + i * head_dim + d);
  }
  return LaneSums(sums);
}

// Dots of a query with `count` keys, also for heads that no vector divides.
inline Vec ScoreSomeKeys(const float* query, const float* keys, int64_t count, int64_t head_dim) {
  const int64_t whole = head_dim / kLanes * kLanes;
  Vec sums[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float* key = keys + i * head_dim;
    for (int64_t d = 0; d < whole; d += kLanes) sums[i] += Load(query + d) * Load(key + d);
    if (whole == head_dim) continue;
    sums[i] += LoadSome(query + whole, head_dim - whole) * LoadSome(key + whole, head_dim - whole);
  }
  return LaneSums(sums);
}

inline const float* AsFloats(const float* from, int64_t, std::vector<float>&) { return from; }
inline const float* AsFloats(const BFloat16* from, int64_t count, std::vector<float>& floats) {
  floats.resize(count);
  Convert(from, count, floats.data());
  return floats.data();
}

// scores[r, n] = queries[r] . keys[n] for the tokens of one run.
template <class T>
inline void Score(const float* queries, int64_t rows, const T* keys, int64_t count,
                  int64_t head_dim, float* scores, std::vector<float>& floats) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, count - n);
    const float* group = AsFloats(keys + n * head_dim, some * head_dim, floats);
    for (int64_t r = 0; r < rows; ++r) {
      const float* query = queries + r * head_dim;
      float* to = scores + r * kBlock + n;
      if (some == kLanes && head_dim % kLanes == 0) {
        Store(ScoreKeys(query, group, head_dim), to);
      } else {
        StoreSome(ScoreSomeKeys(query, group, some, head_dim), to, some);
      }
    }
  }
}

// out[r] += weights[r] . values for R rows, kVecs vectors of a head, and the tokens of one run.
template <int R, int kVecs, class T>
inline void AddStrip(const float* weights, const T* values, int64_t count, int64_t head_dim,
                     float* out) {
  Vec sums[R][kVecs];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < kVecs; ++i) sums[r][i] = Load(out + r * head_dim + i * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    Vec value[kVecs];
    for (int i = 0; i < kVecs; ++i) value[i] = Load(values + t * head_dim + i * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec weight = Broadcast(weights + r * kBlock + t);
      for (int i = 0; i < kVecs; ++i) sums[r][i] += weight * value[i];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < kVecs; ++i) Store(sums[r][i], out + r * head_dim + i * kLanes);
  }
}

// Does the same for the rest of a head that no vector divides.
template <int R, class T>
void AddTail(const float* weights, const T* values, int64_t count, int64_t head_dim, int64_t width,
             float* out) {
  Vec sums[R];
  for (int r = 0; r < R; ++r) sums[r] = LoadSome(out + r * head_dim, width);
  for (int64_t t = 0; t < count; ++t) {
    const Vec value = LoadSome(values + t * head_dim, width);
    for (int r = 0; r < R; ++r) sums[r] += Broadcast(weights + r * kBlock + t) * value;
  }
  for (int r = 0; r < R; ++r) StoreSome(sums[r], out + r * head_dim, width);
}

template <int R, class T>
inline void AddValues(const float* weights, const T* values, int64_t count, int64_t head_dim,
                      float* out) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= head_dim; d += kVecs * kLanes) {
    AddStrip<R, kVecs>(weights, values + d, count, head_dim, out + d);
  }
  for (; d + kLanes <= head_dim; d += kLanes) {
    AddStrip<R, 1>(weights, values + d, count, head_dim, out + d);
  }
  if (d < head_dim) AddTail<R>(weights, values + d, count, head_dim, head_dim - d, out + d);
}

// Calls the routine for the actual number of rows, up to R.
template <int R, class T>
inline void AddSomeValues(int64_t rows, const float* weights, const T* values, int64_t count,
                          int64_t head_dim, float* out) {
  if (rows >= R) {
    AddValues<R>(weights, values, count, head_dim, out);
  } else if constexpr (R > 1) {
    AddSomeValues<R - 1>(rows, weights, values, count, head_dim, out);
  }
}

template <class T>
inline void AddAllValues(const float* weights, int64_t rows, const T* values, int64_t count,
                         int64_t head_dim, float* out) {
  constexpr int kRows = kLanes == 16 ? 6 : 4;  // what the registers hold
  for (int64_t r = 0; r < rows; r += kRows) {
    AddSomeValues<kRows>(rows - r, weights + r * kBlock, values, count, head_dim,
                         out + r * head_dim);
  }
}

// One tile's running softmax; the thread keeps its memory from item to item.
struct Softmax {
  std::vector<float> queries, scores, out;  // [rows, head_dim], [rows, kBlock], [rows, head_dim]
  std::vector<float> floats;                // keys or values of a few tokens
  std::vector<float> peak, total;           // [rows]

  void Start(int64_t rows, int64_t head_dim) {
    queries.resize(rows * head_dim);
    scores.resize(rows * kBlock);
    out.assign(rows * head_dim, 0.0f);
    peak.assign(rows, kMasked);
    total.assign(rows, 0.0f);
  }

  // Replaces scores of positions [low, high) of a block by weights; the others before `end` weigh
  // nothing, and positions after it are not read.
  void Update(int64_t row, int64_t low, int64_t high, int64_t end, int64_t head_dim) {
    float* s = scores.data() + row * kBlock;
    end = (end + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = 0; t < low; ++t) s[t] = kMasked;
    for (int64_t t = std::max(low, high); t < end; ++t) s[t] = kMasked;
    Vec top = Splat(kMasked);
    for (int64_t t = 0; t < end; t += kLanes) top = Max(top, Load(s + t));
    const float found = std::max(peak[row], Largest(top));
    Vec sum = {};
    for (int64_t t = 0; t < end; t += kLanes) {
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
void AttendHead(const Problem<T>& p, const Item& item, int64_t head, const Item& next, Softmax& s) {
  const int64_t group = p.q_heads / p.kv_heads, dim = p.head_dim;
  const int64_t rows = item.count * group;
  const int64_t token = p.q_starts[item.row] + item.first;
  const Span span(p, item), next_span(p, next);
  s.Start(rows, dim);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = p.q + ((token + r / group) * p.q_heads + head * group + r % group) * dim;
    std::copy(from, from + dim, s.queries.data() + r * dim);
  }
  for (int64_t block = span.FirstBlock(); block < span.last; block += kBlock) {
    Coming coming{item.row, head, kBlock, span.last};
    if (block + kBlock >= span.last) {
      coming = head + 1 < item.end_head
                   ? Coming{item.row, head + 1, span.FirstBlock() - block, span.last}
                   : Coming{next.row, next.first_head, next_span.FirstBlock() - block,
                            next_span.last};
    }
    const int64_t begin = std::max(block, span.first), end = std::min(block + kBlock, span.last);
    // Scores whole vectors of keys where pages consist of them; scores of unseen keys are replaced.
    const int64_t unit = p.page_size % kLanes ? 1 : kLanes;
    const int64_t from = begin / unit * unit, to = (end + unit - 1) / unit * unit;
    ForRuns(p, item.row, from, to, [&](int64_t t, int32_t page, int64_t at, int64_t count) {
      coming.AskFor(p, 0, t, count);
      Score(s.queries.data(), rows, p.Head(page, 0, head) + at * dim, count, dim,
            s.scores.data() + (t - block), s.floats);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = span.position + r / group;  // the query's own position
      const int64_t low = p.window ? std::clamp(seen - p.window + 1, begin, end) : begin;
      s.Update(r, low - block, std::min(seen + 1, end) - block, end - block, dim);
    }
    ForRuns(p, item.row, begin, end, [&](int64_t t, int32_t page, int64_t at, int64_t count) {
      coming.AskFor(p, 1, t, count);
      const T* values = p.Head(page, 1, head) + at * dim;
      const float* weights = s.scores.data() + (t - block);
      if (rows < kFewRows) {
        AddAllValues(weights, rows, values, count, dim, s.out.data());
      } else {
        const float* floats = AsFloats(values, count * dim, s.floats);
        AddAllValues(weights, rows, floats, count, dim, s.out.data());
      }
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = p.out + ((token + r / group) * p.q_heads + head * group + r % group) * dim;
    const float scale = 1.0f / std::max(s.total[r], 1e-30f);
    for (int64_t d = 0; d < dim; ++d) to[d] = s.out[r * dim + d] * scale;
  }
}

// `next` is likely the item that this thread takes after this one.
template <class T>
void Attend(const Problem<T>& p, const Item& item, const Item& next, Softmax& s) {
  for (int64_t head = item.first_head; head < item.end_head; ++head) {
    AttendHead(p, item, head, next, s);
  }
}

template <class T>
void Run(ffi::ThreadPool pool, const Problem<T>& p) {
  WriteKv(p);
  if (std::accumulate(p.q_lens, p.q_lens + p.num_rows, int64_t{0}) < p.tokens) {
    // Some tokens belong to no row.
    std::fill(p.out, p.out + p.tokens * p.q_heads * p.head_dim, 0.0f);
  }
  // Head after head of a row is read ahead; fewer of them where there are too few rows to share out.
  const auto threads = static_cast<int32_t>(std::max<int64_t>(1, pool.num_threads()));
  const auto heads = p.num_rows >= 4 * threads ? static_cast<int32_t>(p.kv_heads) : 1;
  std::vector<Item> items;
  int64_t work = 0;
  for (int32_t row = 0; row < p.num_rows; ++row) {
    if (p.q_lens[row] == 0) continue;
    work += int64_t{p.kv_lens[row]} * p.q_lens[row] * p.q_heads * p.head_dim;
    // Later tiles see more: they go first, so that threads end together.
    for (int32_t first = (p.q_lens[row] - 1) / kTileQueries * kTileQueries; first >= 0;
         first -= kTileQueries) {
      const auto count = std::min<int32_t>(kTileQueries, p.q_lens[row] - first);
      for (int32_t head = 0; head < p.kv_heads; head += heads) {
        const auto end = std::min<int32_t>(p.kv_heads, head + heads);
        items.push_back({row, head, end, first, count});
      }
    }
  }
  const auto attend = [&](int64_t i) {
    thread_local Softmax softmax;
    const auto next = std::min(i + threads, static_cast<int64_t>(items.size()) - 1);
    Attend(p, items[i], items[next], softmax);
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
