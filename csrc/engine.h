/* The engine's C ABI: token ids in, token ids out. Whoever sits above (the front, the Python package, a test) uses only this.
 *
 * Threads: every function may be called from any thread. An engine runs its own step thread and workers. One thread at a
 * time may sit in ts_engine_poll. Structs that the caller fills begin with their size, so that a field can be added at the end. */
#ifndef TS_ENGINE_H
#define TS_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TS_ENGINE_ABI 3

typedef struct ts_plan ts_plan;
typedef struct ts_engine ts_engine;

typedef enum ts_status {
  TS_OK = 0,
  TS_BAD_PLAN = 1,    /* the file is not a whole, valid plan; the message says where */
  TS_BAD_REQUEST = 2, /* this request cannot be served (too long, id out of range, a value out of range) */
  TS_NO_TARGET = 3,   /* the plan holds nothing that this host can run; the message names both */
  TS_BUSY = 4,        /* the inbox is full: try again */
  TS_CLOSED = 5,      /* the engine is draining or closed */
  TS_IO = 6,          /* the file system said no */
  TS_NO_MEMORY = 7,
  TS_INTERNAL = 8,
  TS_LOST_RANK =
      9, /* a rank died, stopped or did not come, or its GPU was lost; the message names it. The engine is over */
  TS_DIFFERS = 10 /* a replay is not what was recorded; the message says at which step, and what first */
} ts_status;

typedef struct ts_error {
  char message[1000]; /* UTF-8, NUL-terminated, one sentence or two */
} ts_error;

/* ---- plan ---------------------------------------------------------------------------------------------------------- */

typedef enum ts_verify {
  TS_VERIFY_AUTO = 0,  /* weights are hashed when the file is new to this machine or has changed */
  TS_VERIFY_ALWAYS = 1 /* weights are hashed at this load */
} ts_verify;

/* Maps the file and checks header, seal, manifest, and the hashes of all but the weights. Weights are checked, as `verify`
 * says, by ts_engine_open. The engine never writes to the file. */
ts_status ts_plan_open(const char *path, ts_verify verify, ts_plan **plan, ts_error *error);

/* An entry's bytes, valid until ts_plan_close. TS_BAD_REQUEST if there is none of that name. `tsp/manifest` is one. */
ts_status ts_plan_entry(const ts_plan *plan, const char *name, const uint8_t **data, size_t *size);

/* How many processes run the plan together: ranks 0 to that - 1 of its mesh. 0 for NULL. */
int32_t ts_plan_num_ranks(const ts_plan *plan);

void ts_plan_close(ts_plan *plan); /* after every engine over it is closed; NULL is fine */

/* ---- engine -------------------------------------------------------------------------------------------------------- */

typedef enum ts_overlap {
  TS_OVERLAP_OFF = 0,
  TS_OVERLAP_ON = 1,
  TS_OVERLAP_AUTO = 2 /* where a core is left beside num_threads, and the plan is of one rank */
} ts_overlap;

typedef struct ts_engine_options {
  uint32_t size;        /* sizeof(ts_engine_options) */
  uint32_t event_size;  /* sizeof(ts_event): how far apart the events lie that ts_engine_poll fills */
  int32_t num_threads;  /* 0: every core this process may use */
  int32_t num_pages;    /* KV pages (of each owner of sequences: dp); 0: from kv_bytes */
  int64_t kv_bytes;     /* bytes of KV cache when num_pages is 0; 0: enough for one full context or max_seqs x 2,048
                           tokens, whichever is more, within half of the free memory */
  int32_t token_budget; /* tokens a step may hold, also the longest chunk of a prefill; 0: the plan's limit */
  int32_t max_seqs;     /* sequences in a step; 0: the plan's limit */
  int32_t max_queue;    /* requests waiting; beyond it submit says TS_BUSY; 0: 1,024 */
  int32_t prefix_cache; /* 0 off, 1 on */
  int32_t
      max_draft; /* tokens of a sequence that a step may guess, from its own text and what its tenant was told before, and
                    verify, where there is room for more rows of logits and it is worth its time; outputs are the same, sooner;
                    0: none, 16 at most. Negative: as many, whatever they cost: for tests, and to measure that cost */
  int32_t
      patience_ms; /* how long a tenant's requests of the first class may be passed over by others before the oldest goes
                      first, those of the next twice that, and so on; 0: 10,000 */
  int32_t
      target_tpot_us; /* time per output token: a step in which anyone decodes takes on no more of other prompts than is
                         predicted to fit into it (but 16 tokens in any case); 0: as much as token_budget allows */
  int32_t
      overlap_schedule; /* ts_overlap: whether a step is scheduled while the one before it runs, on a thread of its own. Outputs
                           are the same. A step in which anyone may guess is scheduled after the one before it all the same */
  const char *target; /* NULL: the best of the plan's targets that this host can run; else that one or an error */

  /* For a plan of several ranks; all else but num_threads and target counts on rank 0 alone. num_threads 0 is then the rank's
     share of the cores that it may use. */
  int32_t rank;            /* this process's, in the plan's mesh */
  int32_t rank_timeout_ms; /* how long to wait for ranks that do not come, or do not move; 0: 60,000 */
  const char *rendezvous;  /* a name that all ranks of this run give, and no other run of this user on this host */
  const int32_t
      *rank_pids;     /* [ts_plan_num_ranks] process ids of those that the caller started, 0 for others, so that
                         one that dies before it came is noticed at once; NULL: none. Rank 0's place is not read */
  int32_t ranks_here; /* how many of the ranks run on this host; 0: all. If not all do, an MPI library is between them,
                         with whose mpirun they were started, and no rendezvous is needed */
  const char *mpi_library; /* its file, with the ABI of MPI 5.0; NULL: libmpi_abi.so, where the system looks */
  const char
      *record; /* rank 0: a new file that the run is recorded in, for ts_replay; NULL: none. The prompts' token ids
                  are in it, and only this user may read it */
  const char *
      cuda_library; /* the file of NVIDIA's driver, for plans of GPU targets; NULL: libcuda.so.1, where the system looks */

  /* A second tier, which keeps pages that the prefix cache evicts, and brings them back where a prompt needs them. It ends with
     the engine. */
  int64_t offload_bytes; /* of each rank, in whole pages; 0: there is none */
  const char
      *offload_folder; /* on a disk: they lie there in a file without a name, which this user alone may read; NULL: in
                          memory. At most 1,023 bytes */
} ts_engine_options;

/* With a plan of several ranks this is rank 0, and returns once all ranks are ready. TS_LOST_RANK, naming it, if one is not. */
ts_status ts_engine_open(ts_plan *plan, const ts_engine_options *options, ts_engine **engine, ts_error *error);

/* Any other rank: computes its part of each step of rank 0's engine. Returns TS_OK once that is closed, or TS_LOST_RANK if any
 * rank is gone. Signals to the calling thread are held back meanwhile: who stops a run stops its rank 0. */
ts_status ts_rank_run(ts_plan *plan, const ts_engine_options *options, ts_error *error);

typedef struct ts_replay_report {
  uint64_t num_steps, num_requests, num_output_tokens;
  uint64_t
      num_bytes_cut_off; /* of a last record that was not written whole, as when the process was killed: it is left out */
} ts_replay_report;

/* Runs a recorded run again, step for step, and checks each step's batch (rows, tokens, pages) and each output token against
 * those of the trace. `options` as for ts_engine_open; those that decide the schedule are the trace's. Returns once all is run:
 * TS_OK, or TS_DIFFERS. TS_BAD_REQUEST if the trace is damaged, of another plan, or none. `report` tells how far it came. */
ts_status ts_replay(ts_plan *plan, const ts_engine_options *options, const char *trace, ts_replay_report *report,
                    ts_error *error);

/* TS_OK while what options.record wants is recorded; TS_IO, with the reason, once it cannot be any more. The engine goes on. */
ts_status ts_engine_recording(ts_engine *engine, ts_error *error);

/* TS_OK while the engine can compute. TS_LOST_RANK, with the rank's name, once one is gone: then live requests end with
 * TS_FINISH_ERROR, no more are taken, and after their events ts_engine_poll says -1. */
ts_status ts_engine_failure(ts_engine *engine, ts_error *error);

/* Refuses new requests and cancels the live ones: ts_engine_poll gives their last events, then -1; other ranks have been told to
 * end by then. What a front whose poll
 * thread still runs calls before ts_engine_close. May be called twice; NULL is fine. */
void ts_engine_shutdown(ts_engine *engine);

/* Shuts down, joins the engine's threads, and frees it. A poll in progress returns first; no call may begin after. NULL is
 * fine. */
void ts_engine_close(ts_engine *engine);

typedef struct ts_logit_bias {
  int32_t token;
  float bias;
} ts_logit_bias;

typedef struct ts_request {
  uint32_t size; /* sizeof(ts_request) */
  uint64_t id;   /* the caller's; no other live request may have it */
  const int32_t *prompt;
  int32_t num_prompt;       /* >= 1 */
  int32_t max_tokens;       /* >= 1; prompt + max_tokens <= max_context */
  float temperature;        /* 0: greedy */
  int32_t top_k;            /* 0: off */
  float top_p;              /* 1: off */
  float min_p;              /* 0: off */
  float repetition_penalty; /* 1: off; over prompt and output, as transformers */
  float presence_penalty;   /* 0: off; over output, as OpenAI */
  float frequency_penalty;
  uint64_t seed;
  const ts_logit_bias *logit_bias;
  int32_t num_logit_bias;
  const int32_t *stop_tokens; /* ends the output, in addition to the plan's end tokens */
  int32_t num_stop_tokens;
  int32_t ignore_eos;   /* 1: the plan's end tokens do not end the output */
  int32_t num_logprobs; /* -1: none; K >= 0: the token's own, and the K most likely; at most vocab_size */
  const char *
      cache_salt; /* any bytes, a secret of the caller's tenant: only requests of the same salt find each other's pages */
  int32_t num_cache_salt; /* bytes, at most 1,024; 0: the salt of all that have none */
  int32_t
      lease_ms; /* for so long after its last token its full pages are kept for the next turn of its session, at most 3,600,000;
                   0: as long as there is room. Leases hold at most half of the pages, and end early, the next to end first,
                   where a request could not run otherwise */
  uint64_t session;   /* whose next request takes over the lease; 0: none, and then no lease */
  uint64_t tenant;    /* tenants that wait get equal shares of the engine; 0: of all that have none */
  int32_t priority;   /* its class, -8 to 7: of two the lower one is admitted first. 0 is the usual one */
  int32_t timeout_ms; /* what has not ended so long after ts_engine_submit ends with TS_FINISH_TIMEOUT; 0: none */
} ts_request;

/* Copies what it needs. On any answer but TS_OK no event will follow. */
ts_status ts_engine_submit(ts_engine *engine, const ts_request *request, ts_error *error);

/* For one who was just answered TS_BUSY: how many milliseconds until there should be a place in the queue, at the pace at which
 * requests were admitted lately, and behind all those who asked before. */
int32_t ts_engine_retry_after_ms(ts_engine *engine);

/* The request's pages are free within one step, and its last event is a TS_FINISH_CANCELLED. Unknown ids are ignored. */
void ts_engine_cancel(ts_engine *engine, uint64_t id);

typedef enum ts_event_kind {
  TS_EVENT_TOKEN = 1,   /* one output token */
  TS_EVENT_FINISHED = 2 /* the request's last event; exactly one per submitted request */
} ts_event_kind;

typedef enum ts_finish {
  TS_FINISH_STOP = 1,   /* an end or stop token was sampled (it is reported as a token event before) */
  TS_FINISH_LENGTH = 2, /* max_tokens */
  TS_FINISH_CANCELLED = 3,
  TS_FINISH_ERROR = 4,  /* `message` says what */
  TS_FINISH_TIMEOUT = 5 /* its timeout is over; `message` says how far it came */
} ts_finish;

/* Why the prefix cache held no more of a prompt, when it was admitted. */
typedef enum ts_miss {
  TS_MISS_NONE = 0,    /* it held all that need not be computed */
  TS_MISS_NEW = 1,     /* nobody has computed this text, or not lately */
  TS_MISS_EVICTED = 2, /* it was there and had to make room */
  TS_MISS_OFF = 3,     /* there is no prefix cache */
  TS_MISS_BROKEN = 4   /* it was evicted, and what the second tier kept could not be read, or had changed */
} ts_miss;

typedef struct ts_event {
  uint64_t id;
  int32_t kind;   /* ts_event_kind */
  int32_t finish; /* ts_finish, with TS_EVENT_FINISHED */
  int32_t token;
  float logprob; /* of `token`, natural log, of the model's own distribution (before temperature and penalties) */
  int32_t num_top;
  const int32_t *top_tokens; /* [num_top], most likely first; equal logits by lower id. Valid until the next poll */
  const float *top_logprobs; /* [num_top] */
  int32_t num_cached;  /* prompt tokens that came from the prefix cache; with TS_EVENT_FINISHED and the first token */
  int32_t miss;        /* ts_miss; with the same events */
  const char *message; /* with TS_FINISH_ERROR and TS_FINISH_TIMEOUT; valid until the next poll */
  int32_t
      miss_at; /* the prompt's token from which on it was missed: that of a page, or, if the request has a salt and the
                  cache holds another continuation, the first token that differs. (Without a salt that would let anyone
                  guess at others' prompts a token at a time.) */
  int32_t num_restored; /* of num_cached, brought back from the second tier for this request; with the same events */
} ts_event;

/* Waits up to timeout_ms (-1: for ever) for events, and writes at most `capacity`. Returns how many, 0 on time-out, or -1 once
 * the engine is closing and nothing is left. */
int32_t ts_engine_poll(ts_engine *engine, ts_event *events, int32_t capacity, int32_t timeout_ms);

typedef struct ts_stats {
  uint32_t size;
  int32_t num_waiting, num_running;                    /* requests */
  int32_t num_pages, num_pages_free, num_pages_cached; /* cached: free to be evicted, still findable by prefix */
  uint64_t num_steps, num_prompt_tokens, num_cached_tokens, num_output_tokens, num_preemptions, num_finished;
  uint64_t step_ns, schedule_ns; /* summed */
  int32_t num_threads, max_context, vocab_size, page_size, token_budget, max_seqs;
  char target[32];
  uint64_t num_drafted_tokens, num_accepted_tokens; /* guessed, and of these came true */

  int32_t num_slots, num_slots_held;           /* of the second tier: a slot holds a page */
  uint64_t num_restored_tokens;                /* of num_cached_tokens, brought back for their request */
  uint64_t num_pages_kept, num_pages_restored; /* copied there, and back */
  uint64_t num_pages_broken; /* that could not be, or came back changed: each takes its slot out of use */
} ts_stats;

void ts_engine_stats(ts_engine *engine, ts_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
