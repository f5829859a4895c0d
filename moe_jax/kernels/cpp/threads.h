// The threads of XLA, and pages of memory.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace moe {

namespace ffi = xla::ffi;

// run(0) ... run(n - 1) on all threads of the pool; the caller works too, so that a busy pool cannot block it
template <class Run>
void parallel(ffi::ThreadPool& pool, int64_t n, const Run& run) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  std::function<void()> work = [progress, n, &run] {  // a late thread finds nothing left, and does not touch `run`
    for (int64_t i; (i = progress->next.fetch_add(1)) < n; progress->done.fetch_add(1)) run(i);
  };
  for (int64_t i = 1; i < std::min<int64_t>(n, pool.num_threads()); i++) pool.Schedule(std::function<void()>(work));
  work();
  while (progress->done.load() < n) std::this_thread::yield();
}

// requests pages of 2 MB for memory not yet touched: a page fault for every 4 KB costs a tenth of a layer's time
template <class X>
X* huge(X* p, int64_t n) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  uintptr_t from = (uintptr_t(p) + kPage - 1) & ~(kPage - 1), to = uintptr_t(p + n) & ~(kPage - 1);
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a hint, which may be ignored
#endif
  return p;
}

}  // namespace moe
