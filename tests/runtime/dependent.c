/* A kernel that breaks the rule: built with the C library as a dependency. */
#include <stdlib.h>

#include "launch_abi.h"

void test_embed(const ts_args *args, int thread, int threads) {
  if (args->ptr == 0 && thread == threads) abort();
}
