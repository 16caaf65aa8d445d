// A loop over independent items on the calling thread and the threads of XLA's pool.
#ifndef JSERVE_NATIVE_PARALLEL_H_
#define JSERVE_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jserve {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Calls body(i) once for every i in [0, num_items), in any order, and returns when all are done.
//
// The caller takes items as well, so a pool whose threads are all busy, or asleep, only costs time.
template <class Body>
void ParallelFor(xla::ffi::ThreadPool pool, int64_t num_items, const Body& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), num_items) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < num_items; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();  // a helper may wake up after the loop has ended
  auto work = [shared, num_items, &body] {
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
      body(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < num_items; ++spins) {
    if (spins < 4096) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace jserve

#endif  // JSERVE_NATIVE_PARALLEL_H_
