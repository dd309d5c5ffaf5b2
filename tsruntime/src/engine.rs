//! The engine behind its C ABI: plans, requests and their events, without raw pointers.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::{Exit, Failure};
use crate::ffi;

/// Events taken in one call of the poll thread.
const POLL_EVENTS: usize = 256;

/// A mapped and checked plan.
pub struct Plan(NonNull<ffi::ts_plan>);

// engine.h: every function may be called from any thread; a plan's entries do not change.
unsafe impl Send for Plan {}
unsafe impl Sync for Plan {}

impl Plan {
    /// Maps the file and checks all but the weights.
    pub fn open(path: &Path, always_verify: bool) -> Result<Arc<Plan>, Failure> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Failure::new(Exit::Usage, "the plan's path has a NUL byte in it"))?;
        let mut plan = ptr::null_mut();
        call(|error| unsafe { ffi::ts_plan_open(name.as_ptr(), i32::from(always_verify), &mut plan, error) })?;
        Ok(Arc::new(Plan(NonNull::new(plan).expect("TS_OK comes with a plan"))))
    }

    /// An entry's bytes, in place; None if there is none of that name.
    pub fn entry(self: &Arc<Plan>, name: &str) -> Option<Bytes> {
        let name = CString::new(name).ok()?;
        let (mut data, mut size) = (ptr::null(), 0);
        let status = unsafe { ffi::ts_plan_entry(self.0.as_ptr(), name.as_ptr(), &mut data, &mut size) };
        (status == ffi::TS_OK).then(|| Bytes::from_owner(Entry { data, size, _plan: self.clone() }))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        unsafe { ffi::ts_plan_close(self.0.as_ptr()) }
    }
}

/// Bytes of a plan, which they keep mapped.
struct Entry {
    data: *const u8,
    size: usize,
    _plan: Arc<Plan>,
}

unsafe impl Send for Entry {}

impl AsRef<[u8]> for Entry {
    fn as_ref(&self) -> &[u8] {
        if self.size == 0 {
            return &[];
        }
        // Valid and unchanged until ts_plan_close, says engine.h; `_plan` has not been dropped.
        unsafe { std::slice::from_raw_parts(self.data, self.size) }
    }
}

/// How an engine is opened; 0 and None leave the choice to it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub num_threads: i32,
    pub num_pages: i32,
    pub kv_bytes: i64,
    pub token_budget: i32,
    pub max_seqs: i32,
    pub max_queue: i32,
    pub prefix_cache: bool,
    pub target: Option<String>,
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
}

/// Why the engine did not take a request, or gave one up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("the engine's queue is full")]
    Busy,
    #[error("{0}")]
    BadRequest(String),
    #[error("the engine is shutting down")]
    Closed,
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
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// An end token or a stop token: the last token before this.
    Stop,
    Length,
    Cancelled,
    Error(String),
}

type Sender = mpsc::UnboundedSender<(usize, Event)>;

/// An open engine, and the thread that hands its events out. It lives as long as the process: see [`Engine::open`].
pub struct Engine {
    raw: NonNull<ffi::ts_engine>,
    /// Where each live request's events go, with its place among its caller's requests.
    routes: Mutex<HashMap<u64, (Sender, usize)>>,
    next_id: AtomicU64,
}

unsafe impl Send for Engine {}
unsafe impl Sync for Engine {}

impl Engine {
    /// Opens the engine and starts its poll thread. Neither is ever closed: a process opens one engine, serves with it and exits, and
    /// the kernel takes back threads and memory faster than anyone could join and free them.
    pub fn open(plan: &Arc<Plan>, options: &Options) -> Result<&'static Engine, Failure> {
        let target = options.target.as_deref().map(CString::new).transpose();
        let target = target.map_err(|_| Failure::new(Exit::Usage, "the target's name has a NUL byte in it"))?;
        let raw_options = ffi::ts_engine_options {
            size: size_of::<ffi::ts_engine_options>() as u32,
            num_threads: options.num_threads,
            num_pages: options.num_pages,
            kv_bytes: options.kv_bytes,
            token_budget: options.token_budget,
            max_seqs: options.max_seqs,
            max_queue: options.max_queue,
            prefix_cache: i32::from(options.prefix_cache),
            target: target.as_ref().map_or(ptr::null(), |target| target.as_ptr()),
        };
        let mut raw = ptr::null_mut();
        call(|error| unsafe { ffi::ts_engine_open(plan.0.as_ptr(), &raw_options, &mut raw, error) })?;
        std::mem::forget(plan.clone());
        let raw = NonNull::new(raw).expect("TS_OK comes with an engine");
        let engine: &'static Engine =
            Box::leak(Box::new(Engine { raw, routes: Mutex::default(), next_id: AtomicU64::new(1) }));
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
                // After a shutdown nobody is left; whoever still waits must not wait for ever.
                for (_, (sender, index)) in routes.drain() {
                    let _ = sender.send((index, Event::Finished(Finish::Error("the engine has stopped".into()))));
                }
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

    fn submit(&self, request: &Request, sender: &Sender, index: usize) -> Result<u64, EngineError> {
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
            ffi::TS_BUSY => EngineError::Busy,
            ffi::TS_BAD_REQUEST => EngineError::BadRequest(error.text()),
            ffi::TS_CLOSED => EngineError::Closed,
            _ => EngineError::Failed(error.text()),
        })
    }

    fn cancel(&self, id: u64) {
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
    })
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
fn call(function: impl FnOnce(*mut ffi::ts_error) -> ffi::ts_status) -> Result<(), Failure> {
    let mut error = ffi::ts_error { message: [0; 1000] };
    let exit = match function(&mut error) {
        ffi::TS_OK => return Ok(()),
        ffi::TS_BAD_PLAN | ffi::TS_NO_TARGET => Exit::Plan,
        ffi::TS_BAD_REQUEST => Exit::Usage,
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

/// Requests of one caller, and their events in one stream. Dropping it cancels what still runs.
pub struct Run {
    engine: &'static Engine,
    sender: Sender,
    receiver: mpsc::UnboundedReceiver<(usize, Event)>,
    /// Ids of the requests by index; None once its last event was taken, or it was cancelled.
    live: Vec<Option<u64>>,
}

impl Run {
    pub fn new(engine: &'static Engine) -> Run {
        let (sender, receiver) = mpsc::unbounded_channel();
        Run { engine, sender, receiver, live: Vec::new() }
    }

    /// Adds a request; its events carry its index: 0, 1, 2, ...
    pub fn submit(&mut self, request: &Request) -> Result<(), EngineError> {
        let id = self.engine.submit(request, &self.sender, self.live.len())?;
        self.live.push(Some(id));
        Ok(())
    }

    /// Ends one request; no more of its events come.
    pub fn cancel(&mut self, index: usize) {
        if let Some(id) = self.live[index].take() {
            self.engine.cancel(id);
        }
    }

    /// The next event of any live request; None when all have finished.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        while self.live.iter().any(Option::is_some) {
            // `sender` keeps the channel open.
            let (index, event) = self.receiver.recv().await?;
            if let Some(event) = self.take(index, event) {
                return Some((index, event));
            }
        }
        None
    }

    /// An event that is there already.
    pub fn try_next(&mut self) -> Option<(usize, Event)> {
        loop {
            let (index, event) = self.receiver.try_recv().ok()?;
            if let Some(event) = self.take(index, event) {
                return Some((index, event));
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) -> Option<Event> {
        self.live[index]?;
        if matches!(event, Event::Finished(_)) {
            self.live[index] = None;
        }
        Some(event)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        (0..self.live.len()).for_each(|index| self.cancel(index));
    }
}
