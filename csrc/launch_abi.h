/* What the executor and a compiled kernel share: the only header a CPU kernel template includes. C99 and C++.
 *
 * A kernel is `void kernel(const ts_args*, int thread, int threads)`. Every worker thread calls it with its own `thread`;
 * a barrier lies between launches. A kernel calls nothing outside itself and keeps no state. Its result does not depend on
 * `threads`, nor on which other tokens the batch holds (ARCHITECTURE.md, "One order of arithmetic").
 *
 * Shapes: T tokens of the step, S sequences, L rows whose logits are wanted. */
#ifndef TS_LAUNCH_ABI_H
#define TS_LAUNCH_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TS_LAUNCH_ABI 2 /* raised with every change of a struct below; the program carries it */

/* One step's batch arrays. Tokens of one sequence are adjacent and in order of position. */
typedef struct ts_batch {
  int32_t num_tokens;         /* T >= 1 */
  int32_t num_seqs;           /* S >= 1 */
  int32_t num_logits;         /* L, 0 <= L <= max_seqs */
  int32_t page_table_stride;  /* entries from one row of page_table to the next */
  const int32_t *token_ids;   /* [T] in [0, vocab_size) */
  const int32_t *positions;   /* [T] in [0, max_context) */
  const int32_t *slots;       /* [T] slot mapping: page * page_size + offset, where this token's K and V are written */
  const int32_t *query_start; /* [S + 1] first token of each sequence; query_start[S] == T */
  const int32_t *context_len; /* [S] tokens of the sequence in the cache once this step's are written */
  const int32_t *page_table;  /* [S, page_table_stride] page of each page_size tokens of the context */
  const int32_t *logit_rows;  /* [L] token index (0..T-1) whose logits are wanted, ascending */
} ts_batch;

/* One launch's arguments. `ptr[i]` is what the program's i-th argument names: a buffer of the arena, a weight, or one
 * layer's KV cache. All are 64-byte aligned. Constants are compiled into the kernel. */
typedef struct ts_args {
  const ts_batch *batch;
  void *const *ptr;
} ts_args;

typedef void (*ts_kernel)(const ts_args *args, int thread, int threads);

#ifdef __cplusplus
}
#endif
#endif
