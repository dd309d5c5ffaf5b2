/* The kernels of tests/runtime/kernels.c as a GPU's are called: a grid, and pointers alone. Programs beyond the step's own rows end
 * at once, as a plan's kernels do. */
#include <stdint.h>

enum { WIDTH = 16, VOCAB = 50, STRIDE = 64, PAGE_SIZE = 32 };
enum { NUM_TOKENS, NUM_SEQS, NUM_LOGITS, PAGE_TABLE_STRIDE }; /* of sizes */

/* table, x, sizes, token_ids; a program a token */
void test_embed(const uint32_t *grid, void *const *p) {
  const float *table = p[0];
  float *x = p[1];
  const int32_t *sizes = p[2], *token_ids = p[3];
  for (uint32_t t = 0; t < grid[0]; ++t) {
    if ((int32_t)t >= sizes[NUM_TOKENS]) continue;
    for (int i = 0; i < WIDTH; ++i) x[t * WIDTH + i] = table[token_ids[t] * WIDTH + i];
  }
}

/* x, y, sizes; a program a token */
void test_mix(const uint32_t *grid, void *const *p) {
  const float *x = p[0];
  float *y = p[1];
  const int32_t *sizes = p[2];
  for (uint32_t t = 0; t < grid[0]; ++t) {
    if ((int32_t)t >= sizes[NUM_TOKENS]) continue;
    const uint32_t next = (t + 1) % (uint32_t)sizes[NUM_TOKENS];
    for (int i = 0; i < WIDTH; ++i) y[t * WIDTH + i] = x[t * WIDTH + i] + 0.5F * x[next * WIDTH + i];
  }
}

/* x, kv, sizes, slots; a program a token */
void test_write(const uint32_t *grid, void *const *p) {
  const float *x = p[0];
  float *kv = p[1];
  const int32_t *sizes = p[2], *slots = p[3];
  for (uint32_t t = 0; t < grid[0]; ++t) {
    if ((int32_t)t >= sizes[NUM_TOKENS]) continue;
    for (int i = 0; i < WIDTH; ++i) kv[(int64_t)slots[t] * WIDTH + i] = x[t * WIDTH + i];
  }
}

/* kv, y, sizes, query_start, context_len, page_table; a program a sequence */
void test_attend(const uint32_t *grid, void *const *p) {
  const float *kv = p[0];
  float *y = p[1];
  const int32_t *sizes = p[2], *query_start = p[3], *context_len = p[4], *page_table = p[5];
  for (uint32_t s = 0; s < grid[0]; ++s) {
    if ((int32_t)s >= sizes[NUM_SEQS]) continue;
    const int32_t num_new = query_start[s + 1] - query_start[s];
    for (int32_t n = 0; n < num_new; ++n) {
      float *row = y + (int64_t)(query_start[s] + n) * WIDTH;
      for (int i = 0; i < WIDTH; ++i) row[i] = 0;
      for (int32_t key = 0; key <= context_len[s] - num_new + n; ++key) {
        const int32_t page = page_table[(int32_t)s * sizes[PAGE_TABLE_STRIDE] + key / PAGE_SIZE];
        const float *of = kv + ((int64_t)page * PAGE_SIZE + key % PAGE_SIZE) * WIDTH;
        for (int i = 0; i < WIDTH; ++i) row[i] += of[i];
      }
    }
  }
}

/* x, table, logits, sizes, logit_rows; a program a row */
void test_logits(const uint32_t *grid, void *const *p) {
  const float *x = p[0], *table = p[1];
  float *logits = p[2];
  const int32_t *sizes = p[3], *logit_rows = p[4];
  for (uint32_t l = 0; l < grid[0]; ++l) {
    if ((int32_t)l >= sizes[NUM_LOGITS]) continue;
    for (int v = 0; v < VOCAB; ++v) {
      float sum = 0;
      for (int i = 0; i < WIDTH; ++i) sum += x[logit_rows[l] * WIDTH + i] * table[v * WIDTH + i];
      logits[l * STRIDE + v] = sum;
    }
  }
}
