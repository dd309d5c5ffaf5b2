//! csrc/engine.h (TS_ENGINE_ABI 3), as far as the front uses it. Fields mean what that file says.

use std::ffi::{c_char, c_int};

#[repr(C)]
pub struct ts_plan {
    _opaque: [u8; 0],
}

#[repr(C)]
pub struct ts_engine {
    _opaque: [u8; 0],
}

pub type ts_status = c_int;
pub const TS_OK: ts_status = 0;
pub const TS_BAD_PLAN: ts_status = 1;
pub const TS_BAD_REQUEST: ts_status = 2;
pub const TS_NO_TARGET: ts_status = 3;
pub const TS_BUSY: ts_status = 4;
pub const TS_CLOSED: ts_status = 5;
pub const TS_DIFFERS: ts_status = 10;

#[repr(C)]
pub struct ts_error {
    pub message: [c_char; 1000],
}

pub const TS_OVERLAP_OFF: i32 = 0;
pub const TS_OVERLAP_ON: i32 = 1;
pub const TS_OVERLAP_AUTO: i32 = 2;

#[repr(C)]
pub struct ts_engine_options {
    pub size: u32,
    pub event_size: u32,
    pub num_threads: i32,
    pub num_pages: i32,
    pub kv_bytes: i64,
    pub token_budget: i32,
    pub max_seqs: i32,
    pub max_queue: i32,
    pub prefix_cache: i32,
    pub max_draft: i32,
    pub patience_ms: i32,
    pub target_tpot_us: i32,
    pub overlap_schedule: i32,
    pub target: *const c_char,
    pub rank: i32,
    pub rank_timeout_ms: i32,
    pub rendezvous: *const c_char,
    pub rank_pids: *const i32,
    pub ranks_here: i32,
    pub mpi_library: *const c_char,
    pub record: *const c_char,
    pub cuda_library: *const c_char,
    pub offload_bytes: i64,
    pub offload_folder: *const c_char,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ts_replay_report {
    pub num_steps: u64,
    pub num_requests: u64,
    pub num_output_tokens: u64,
    pub num_bytes_cut_off: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ts_logit_bias {
    pub token: i32,
    pub bias: f32,
}

#[repr(C)]
pub struct ts_request {
    pub size: u32,
    pub id: u64,
    pub prompt: *const i32,
    pub num_prompt: i32,
    pub max_tokens: i32,
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    pub logit_bias: *const ts_logit_bias,
    pub num_logit_bias: i32,
    pub stop_tokens: *const i32,
    pub num_stop_tokens: i32,
    pub ignore_eos: i32,
    pub num_logprobs: i32,
    pub cache_salt: *const u8,
    pub num_cache_salt: i32,
    pub lease_ms: i32,
    pub session: u64,
    pub tenant: u64,
    pub priority: i32,
    pub timeout_ms: i32,
}

pub const TS_MISS_NEW: i32 = 1;
pub const TS_MISS_EVICTED: i32 = 2;
pub const TS_MISS_BROKEN: i32 = 4;
pub const TS_EVENT_FINISHED: i32 = 2;
pub const TS_FINISH_STOP: i32 = 1;
pub const TS_FINISH_LENGTH: i32 = 2;
pub const TS_FINISH_CANCELLED: i32 = 3;
pub const TS_FINISH_TIMEOUT: i32 = 5;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ts_event {
    pub id: u64,
    pub kind: i32,
    pub finish: i32,
    pub token: i32,
    pub logprob: f32,
    pub num_top: i32,
    pub top_tokens: *const i32,
    pub top_logprobs: *const f32,
    pub num_cached: i32,
    pub miss: i32,
    pub message: *const c_char,
    pub miss_at: i32,
    pub num_restored: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ts_stats {
    pub size: u32,
    pub num_waiting: i32,
    pub num_running: i32,
    pub num_pages: i32,
    pub num_pages_free: i32,
    pub num_pages_cached: i32,
    pub num_steps: u64,
    pub num_prompt_tokens: u64,
    pub num_cached_tokens: u64,
    pub num_output_tokens: u64,
    pub num_preemptions: u64,
    pub num_finished: u64,
    pub step_ns: u64,
    pub schedule_ns: u64,
    pub num_threads: i32,
    pub max_context: i32,
    pub vocab_size: i32,
    pub page_size: i32,
    pub token_budget: i32,
    pub max_seqs: i32,
    pub target: [c_char; 32],
    pub num_drafted_tokens: u64,
    pub num_accepted_tokens: u64,
    pub num_slots: i32,
    pub num_slots_held: i32,
    pub num_restored_tokens: u64,
    pub num_pages_kept: u64,
    pub num_pages_restored: u64,
    pub num_pages_broken: u64,
}

unsafe extern "C" {
    pub fn ts_plan_open(path: *const c_char, verify: c_int, plan: *mut *mut ts_plan, error: *mut ts_error)
    -> ts_status;
    pub fn ts_plan_entry(
        plan: *const ts_plan,
        name: *const c_char,
        data: *mut *const u8,
        size: *mut usize,
    ) -> ts_status;
    pub fn ts_plan_num_ranks(plan: *const ts_plan) -> i32;
    pub fn ts_plan_close(plan: *mut ts_plan);
    pub fn ts_engine_open(
        plan: *mut ts_plan,
        options: *const ts_engine_options,
        engine: *mut *mut ts_engine,
        error: *mut ts_error,
    ) -> ts_status;
    pub fn ts_rank_run(plan: *mut ts_plan, options: *const ts_engine_options, error: *mut ts_error) -> ts_status;
    pub fn ts_replay(
        plan: *mut ts_plan,
        options: *const ts_engine_options,
        trace: *const c_char,
        report: *mut ts_replay_report,
        error: *mut ts_error,
    ) -> ts_status;
    pub fn ts_engine_recording(engine: *mut ts_engine, error: *mut ts_error) -> ts_status;
    pub fn ts_engine_failure(engine: *mut ts_engine, error: *mut ts_error) -> ts_status;
    pub fn ts_engine_shutdown(engine: *mut ts_engine);
    pub fn ts_engine_submit(engine: *mut ts_engine, request: *const ts_request, error: *mut ts_error) -> ts_status;
    pub fn ts_engine_retry_after_ms(engine: *mut ts_engine) -> i32;
    pub fn ts_engine_cancel(engine: *mut ts_engine, id: u64);
    pub fn ts_engine_poll(engine: *mut ts_engine, events: *mut ts_event, capacity: i32, timeout_ms: i32) -> i32;
    pub fn ts_engine_stats(engine: *mut ts_engine, stats: *mut ts_stats);
}
