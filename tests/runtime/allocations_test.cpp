#include "allocations.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <new>

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// NOLINTBEGIN(cppcoreguidelines-no-malloc). Not inlined, so that g++ does not see free() meet operator new.
__attribute__((noinline)) void *operator new(size_t size) {
  ++allocations::count;
  if (allocations::num_to_fail > 0 && allocations::num_to_pass-- <= 0) {
    --allocations::num_to_fail;
    throw std::bad_alloc();
  }
  if (void *p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void *p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void *p, size_t) noexcept { std::free(p); }
// NOLINTEND(cppcoreguidelines-no-malloc)

TEST(Allocations, AreCountedAndFailOnDemand) {
  const int64_t before = allocations::count;
  std::unique_ptr<int> p(new int(1));
  EXPECT_EQ(allocations::count, before + 1);
  allocations::num_to_fail = 1;
  EXPECT_THROW(p.reset(new int(2)), std::bad_alloc);
  p.reset(new int(3));
  EXPECT_EQ(*p, 3);
}

#endif
