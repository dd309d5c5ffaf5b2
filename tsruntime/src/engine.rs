//! The engine behind its C ABI: plans, requests and their events, without raw pointers.

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::engine_options::path;
pub use crate::engine_options::{Options, Overlap};
use crate::error::{Exit, Failure};
use crate::ffi;
use crate::plan::Plan;

/// Events taken in one call of the poll thread.
const POLL_EVENTS: usize = 256;

/// Computes a rank's part of every step of rank 0's engine, until that ends.
pub fn follow(plan: &Plan, options: &Options) -> Result<(), Failure> {
    options.with_raw(|raw| call(|error| unsafe { ffi::ts_rank_run(plan.raw(), raw, error) }))
}

/// What a replay has repeated.
pub type Replayed = ffi::ts_replay_report;

/// Runs a recorded run again. The report tells how far it came, also where it differs.
pub fn replay(plan: &Plan, options: &Options, trace: &Path) -> (Replayed, Result<(), Failure>) {
    let mut report = Replayed::default();
    let result = path(trace).and_then(|trace| {
        options.with_raw(|raw| {
            call(|error| unsafe { ffi::ts_replay(plan.raw(), raw, trace.as_ptr(), &mut report, error) })
        })
    });
    (report, result)
}

/// One sequence to generate. Fields mean what ts_request says.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: Arc<[i32]>,
    pub max_tokens: i32,
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    pub logit_bias: Arc<[ffi::ts_logit_bias]>,
    pub stop_tokens: Arc<[i32]>,
    pub ignore_eos: bool,
    pub num_logprobs: i32,
    pub cache_salt: Arc<str>,
    pub lease_ms: i32,
    pub session: u64,
    pub tenant: u64,
    pub priority: i32,
    pub timeout_ms: i32,
}

/// Why the engine did not take a request, or gave one up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("the engine's queue is full")]
    Busy { retry_after: Duration },
    #[error("{0}")]
    BadRequest(String),
    #[error("the engine is shutting down")]
    Closed,
    #[error("{0}")]
    TimedOut(String),
    #[error("{0}")]
    Failed(String),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Token(Token),
    Finished(Finish),
}

/// One output token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub id: u32,
    /// Natural logarithm, of the model's own distribution.
    pub logprob: f32,
    /// The most likely ids with theirs, as many as were asked for.
    pub top: Box<[(u32, f32)]>,
    /// Prompt tokens that came from the prefix cache; told with the first token.
    pub num_cached: u32,
    /// Of these, brought back from the second tier for this request.
    pub num_restored: u32,
    /// Why there were no more; with the same token.
    pub miss: Option<Miss>,
}

/// What the prefix cache did not hold of a prompt, that it might have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Miss {
    pub reason: &'static str,
    /// The prompt's token from which on it was missed.
    pub token: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// An end token or a stop token: the last token before this.
    Stop,
    Length,
    Cancelled,
    /// Its timeout is over.
    TimedOut(String),
    Error(String),
}

pub type Sender = mpsc::UnboundedSender<(usize, Event)>;

/// An open engine, and the thread that hands its events out. It lives as long as the process: see [`Engine::open`].
pub struct Engine {
    raw: NonNull<ffi::ts_engine>,
    /// Where each live request's events go, with its place among its caller's requests.
    routes: Mutex<HashMap<u64, (Sender, usize)>>,
    next_id: AtomicU64,
    /// Set when the last event has been handed out: nothing, or why the engine can compute no more.
    end: watch::Sender<Option<Result<(), String>>>,
}

unsafe impl Send for Engine {}
unsafe impl Sync for Engine {}

impl Engine {
    /// Opens the engine and starts its poll thread. Neither is ever closed: a process opens one engine, serves with it and exits, and
    /// the kernel takes back threads and memory faster than anyone could join and free them.
    pub fn open(plan: &Arc<Plan>, options: &Options) -> Result<&'static Engine, Failure> {
        let mut raw = ptr::null_mut();
        options
            .with_raw(|options| call(|error| unsafe { ffi::ts_engine_open(plan.raw(), options, &mut raw, error) }))?;
        std::mem::forget(plan.clone());
        let raw = NonNull::new(raw).expect("TS_OK comes with an engine");
        let engine: &'static Engine = Box::leak(Box::new(Engine {
            raw,
            routes: Mutex::default(),
            next_id: AtomicU64::new(1),
            end: watch::Sender::new(None),
        }));
        std::thread::Builder::new().name("ts-poll".into()).spawn(move || engine.poll())?;
        Ok(engine)
    }

    pub fn stats(&self) -> Stats {
        // Zeros are valid for every field.
        let mut raw: ffi::ts_stats = unsafe { std::mem::zeroed() };
        raw.size = size_of::<ffi::ts_stats>() as u32;
        unsafe { ffi::ts_engine_stats(self.raw.as_ptr(), &mut raw) };
        Stats(raw)
    }

    /// Takes no more requests, and ends those that run with [`Finish::Cancelled`].
    pub fn shutdown(&self) {
        unsafe { ffi::ts_engine_shutdown(self.raw.as_ptr()) }
    }

    /// Whether all of the run was recorded that is to be; if not, why.
    pub fn recording(&self) -> Result<(), Failure> {
        call(|error| unsafe { ffi::ts_engine_recording(self.raw.as_ptr(), error) })
    }

    /// Whether the last event has been handed out.
    pub fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Waits until the engine can compute no more, and says why. Never, if it ends otherwise.
    pub async fn failure(&self) -> String {
        let mut end = self.end.subscribe();
        let failed = end.wait_for(|end| matches!(end, Some(Err(_)))).await;
        match failed.as_deref() {
            Ok(Some(Err(reason))) => reason.clone(),
            _ => std::future::pending().await,
        }
    }

    fn routes(&self) -> MutexGuard<'_, HashMap<u64, (Sender, usize)>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves events to whom they belong. Never waits for a receiver: a channel holds at most its request's own max_tokens.
    fn poll(&self) {
        let mut events = vec![unsafe { std::mem::zeroed::<ffi::ts_event>() }; POLL_EVENTS];
        loop {
            let num = unsafe { ffi::ts_engine_poll(self.raw.as_ptr(), events.as_mut_ptr(), POLL_EVENTS as i32, -1) };
            let mut routes = self.routes();
            let Ok(num) = usize::try_from(num) else {
                let end = call(|error| unsafe { ffi::ts_engine_failure(self.raw.as_ptr(), error) });
                // After a shutdown nobody is left; whoever still waits must not wait for ever.
                let reason =
                    end.as_ref().err().map_or("the engine has stopped".into(), |failure| failure.message.clone());
                for (_, (sender, index)) in routes.drain() {
                    let _ = sender.send((index, Event::Finished(Finish::Error(reason.clone()))));
                }
                self.end.send_replace(Some(end.map_err(|failure| failure.message)));
                return;
            };
            for event in &events[..num] {
                let finished = event.kind == ffi::TS_EVENT_FINISHED;
                let route = if finished { routes.remove(&event.id) } else { routes.get(&event.id).cloned() };
                if let Some((sender, index)) = route {
                    // A receiver that is gone has cancelled.
                    let _ = sender.send((index, unsafe { owned(event) }));
                }
            }
        }
    }

    pub fn submit(&self, request: &Request, sender: &Sender, index: usize) -> Result<u64, EngineError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let raw = ffi::ts_request {
            size: size_of::<ffi::ts_request>() as u32,
            id,
            prompt: request.prompt.as_ptr(),
            num_prompt: count(request.prompt.len()),
            max_tokens: request.max_tokens,
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            min_p: request.min_p,
            repetition_penalty: request.repetition_penalty,
            presence_penalty: request.presence_penalty,
            frequency_penalty: request.frequency_penalty,
            seed: request.seed,
            logit_bias: request.logit_bias.as_ptr(),
            num_logit_bias: count(request.logit_bias.len()),
            stop_tokens: request.stop_tokens.as_ptr(),
            num_stop_tokens: count(request.stop_tokens.len()),
            ignore_eos: i32::from(request.ignore_eos),
            num_logprobs: request.num_logprobs,
            cache_salt: request.cache_salt.as_ptr(),
            num_cache_salt: count(request.cache_salt.len()),
            lease_ms: request.lease_ms,
            session: request.session,
            tenant: request.tenant,
            priority: request.priority,
            timeout_ms: request.timeout_ms,
        };
        // Before submitting: the first event may come before the call returns.
        self.routes().insert(id, (sender.clone(), index));
        let mut error = ffi::ts_error { message: [0; 1000] };
        let status = unsafe { ffi::ts_engine_submit(self.raw.as_ptr(), &raw, &mut error) };
        if status == ffi::TS_OK {
            return Ok(id);
        }
        self.routes().remove(&id);
        Err(match status {
            ffi::TS_BUSY => {
                let ms = unsafe { ffi::ts_engine_retry_after_ms(self.raw.as_ptr()) };
                EngineError::Busy { retry_after: Duration::from_millis(u64::try_from(ms).unwrap_or(0)) }
            }
            ffi::TS_BAD_REQUEST => EngineError::BadRequest(error.text()),
            ffi::TS_CLOSED => EngineError::Closed,
            _ => EngineError::Failed(error.text()),
        })
    }

    pub fn cancel(&self, id: u64) {
        self.routes().remove(&id);
        unsafe { ffi::ts_engine_cancel(self.raw.as_ptr(), id) }
    }
}

/// Counts beyond i32 saturate, and the engine refuses them.
fn count(len: usize) -> i32 {
    i32::try_from(len).unwrap_or(i32::MAX)
}

/// Copies what the event's pointers show, which the next poll takes away.
unsafe fn owned(event: &ffi::ts_event) -> Event {
    if event.kind == ffi::TS_EVENT_FINISHED {
        return Event::Finished(match event.finish {
            ffi::TS_FINISH_STOP => Finish::Stop,
            ffi::TS_FINISH_LENGTH => Finish::Length,
            ffi::TS_FINISH_CANCELLED => Finish::Cancelled,
            ffi::TS_FINISH_TIMEOUT => Finish::TimedOut(unsafe { text_at(event.message) }),
            _ => Finish::Error(unsafe { text_at(event.message) }),
        });
    }
    let top = (0..usize::try_from(event.num_top).unwrap_or(0))
        .map(|i| unsafe { ((*event.top_tokens.add(i)).cast_unsigned(), *event.top_logprobs.add(i)) })
        .collect();
    Event::Token(Token {
        id: event.token.cast_unsigned(),
        logprob: event.logprob,
        top,
        num_cached: u32::try_from(event.num_cached).unwrap_or(0),
        num_restored: u32::try_from(event.num_restored).unwrap_or(0),
        miss: miss(event),
    })
}

fn miss(event: &ffi::ts_event) -> Option<Miss> {
    let reason = match event.miss {
        ffi::TS_MISS_NEW => "new",
        ffi::TS_MISS_EVICTED => "evicted",
        ffi::TS_MISS_BROKEN => "broken",
        _ => return None,
    };
    Some(Miss { reason, token: u32::try_from(event.miss_at).unwrap_or(0) })
}

unsafe fn text_at(text: *const c_char) -> String {
    if text.is_null() {
        return "the engine gave no reason".into();
    }
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl ffi::ts_error {
    fn text(&self) -> String {
        let bytes = self.message.map(|byte| byte.cast_unsigned());
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }
}

/// Calls a function that fills a ts_error; its failures end a command.
pub fn call(function: impl FnOnce(*mut ffi::ts_error) -> ffi::ts_status) -> Result<(), Failure> {
    let mut error = ffi::ts_error { message: [0; 1000] };
    let exit = match function(&mut error) {
        ffi::TS_OK => return Ok(()),
        ffi::TS_BAD_PLAN | ffi::TS_NO_TARGET => Exit::Plan,
        ffi::TS_BAD_REQUEST => Exit::Usage,
        ffi::TS_DIFFERS => Exit::Differs,
        _ => Exit::Failed,
    };
    Err(Failure::new(exit, error.text()))
}

/// What ts_engine_stats tells.
pub struct Stats(ffi::ts_stats);

impl std::ops::Deref for Stats {
    type Target = ffi::ts_stats;

    fn deref(&self) -> &ffi::ts_stats {
        &self.0
    }
}

impl Stats {
    /// The plan's target that runs.
    pub fn target_name(&self) -> String {
        let bytes: Vec<u8> =
            self.0.target.iter().map(|byte| byte.cast_unsigned()).take_while(|&byte| byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Tokens that one sequence may have: the model's context, or what the KV cache holds (the last token needs no place in it).
    pub fn context(&self) -> u32 {
        let cache = i64::from(self.0.num_pages) * i64::from(self.0.page_size) + 1;
        u32::try_from(cache.min(i64::from(self.0.max_context))).unwrap_or(0)
    }
}
