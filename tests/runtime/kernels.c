/* Kernels of the test program, over rows of WIDTH f32: each launch reads what other threads wrote in the launch before, so a barrier that
 * does not hold shows. Built like a plan's kernels: one shared object that needs nothing. */
#include "launch_abi.h"

enum { WIDTH = 16, VOCAB = 50, STRIDE = 64, PAGE_SIZE = 32 };

/* table f32[VOCAB, WIDTH] -> x f32[T, WIDTH] */
void test_embed(const ts_args *args, int thread, int threads) {
  const float *table = args->ptr[0];
  float *x = args->ptr[1];
  for (int t = thread; t < args->batch->num_tokens; t += threads) {
    for (int i = 0; i < WIDTH; ++i) x[t * WIDTH + i] = table[args->batch->token_ids[t] * WIDTH + i];
  }
}

/* x f32[T, WIDTH] -> y: each row plus half of the next, which another thread wrote */
void test_mix(const ts_args *args, int thread, int threads) {
  const float *x = args->ptr[0];
  float *y = args->ptr[1];
  const int num_tokens = args->batch->num_tokens;
  for (int t = thread; t < num_tokens; t += threads) {
    const int next = (t + 1) % num_tokens;
    for (int i = 0; i < WIDTH; ++i) y[t * WIDTH + i] = x[t * WIDTH + i] + 0.5F * x[next * WIDTH + i];
  }
}

/* x f32[T, WIDTH] -> kv f32[num_pages * PAGE_SIZE, WIDTH] */
void test_write(const ts_args *args, int thread, int threads) {
  const float *x = args->ptr[0];
  float *kv = args->ptr[1];
  for (int t = thread; t < args->batch->num_tokens; t += threads) {
    for (int i = 0; i < WIDTH; ++i) kv[(int64_t)args->batch->slots[t] * WIDTH + i] = x[t * WIDTH + i];
  }
}

/* kv -> y f32[T, WIDTH]: the sum over the keys that the token sees */
void test_attend(const ts_args *args, int thread, int threads) {
  const ts_batch *batch = args->batch;
  const float *kv = args->ptr[0];
  float *y = args->ptr[1];
  for (int s = 0; s < batch->num_seqs; ++s) {
    for (int t = batch->query_start[s]; t < batch->query_start[s + 1]; ++t) {
      if (t % threads != thread) continue;
      for (int i = 0; i < WIDTH; ++i) y[t * WIDTH + i] = 0;
      for (int key = 0; key <= batch->positions[t]; ++key) {
        const int page = batch->page_table[s * batch->page_table_stride + key / PAGE_SIZE];
        const float *row = kv + ((int64_t)page * PAGE_SIZE + key % PAGE_SIZE) * WIDTH;
        for (int i = 0; i < WIDTH; ++i) y[t * WIDTH + i] += row[i];
      }
    }
  }
}

/* x f32[T, WIDTH], table f32[VOCAB, WIDTH] -> logits f32[L, STRIDE] */
void test_logits(const ts_args *args, int thread, int threads) {
  const float *x = args->ptr[0];
  const float *table = args->ptr[1];
  float *logits = args->ptr[2];
  for (int l = 0; l < args->batch->num_logits; ++l) {
    for (int v = thread; v < VOCAB; v += threads) {
      float sum = 0;
      for (int i = 0; i < WIDTH; ++i) sum += x[args->batch->logit_rows[l] * WIDTH + i] * table[v * WIDTH + i];
      logits[l * STRIDE + v] = sum;
    }
  }
}

/* out f32[64]: out[thread] = what half of the smallest normal number is on that thread (0 where denormals are flushed) */
void test_denormal(const ts_args *args, int thread, int threads) {
  volatile float smallest = 1.17549435e-38F;
  float *out = args->ptr[0];
  for (int i = thread; i < 64; i += threads) out[i] = smallest * 0.5F;
}
