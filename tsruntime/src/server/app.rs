//! What all requests share.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use tokio::sync::{Notify, Semaphore};

use super::ServerOptions;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::model::{MAX_QUEUE, Model};

/// For the errors of requests that are cut off to reach their clients.
const CUT_OFF_TIMEOUT: Duration = Duration::from_secs(2);

pub struct App {
    model: OnceLock<Arc<Model>>,
    given_names: Vec<String>,
    /// Whether the manifest's name is one more.
    alias: bool,
    draining: AtomicBool,
    active: AtomicUsize,
    went_idle: Notify,
    pub metrics: Arc<Metrics>,
    pub api_keys: Vec<String>,
    pub body_bytes_max: usize,
    pub read_timeout: Duration,
    /// Requests that may wait for a thread that tokenizes them.
    pub preparing: Semaphore,
    /// Seconds since 1970.
    pub created: u64,
}

/// A request that a drain waits for.
pub struct Active(Arc<App>);

impl App {
    pub fn new(options: &ServerOptions) -> App {
        let mut names = options.names.clone();
        if names.is_empty() {
            names.extend(options.plan.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
        let metrics = Metrics::new(names.first().map_or("", String::as_str), env!("CARGO_PKG_VERSION"));
        App {
            model: OnceLock::new(),
            draining: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            went_idle: Notify::new(),
            metrics: Arc::new(metrics),
            api_keys: options.api_keys.clone(),
            body_bytes_max: options.body_bytes_max,
            read_timeout: options.read_timeout,
            preparing: Semaphore::new(MAX_QUEUE),
            created: now(),
            alias: options.names.is_empty(),
            given_names: names,
        }
    }

    pub fn model(&self) -> Option<&Arc<Model>> {
        self.model.get()
    }

    pub fn loaded(&self, model: Model) {
        let _ = self.model.set(Arc::new(model));
    }

    /// Refuses new work from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The model, if this server takes work.
    pub fn ready(&self) -> Result<&Arc<Model>, ApiError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("draining", "the server is shutting down"));
        }
        self.model().ok_or_else(|| ApiError::unavailable("loading", "the plan is still loading; try again in a moment"))
    }

    pub fn enter(self: &Arc<App>) -> Active {
        self.active.fetch_add(1, Ordering::Relaxed);
        Active(self.clone())
    }

    pub fn num_active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    /// Until no request is active.
    pub async fn idle(&self) {
        while self.num_active() > 0 {
            self.went_idle.notified().await;
        }
    }

    /// Ends the requests that still run with an error, and gives them a moment to tell it.
    pub async fn cut_off(&self) {
        if let Some(model) = self.model() {
            model.engine.shutdown();
        }
        let _ = tokio::time::timeout(CUT_OFF_TIMEOUT, self.idle()).await;
    }

    /// The names under which the model answers.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let given = self.given_names.iter().map(String::as_str);
        let own = self.model().filter(|_| self.alias).map(|model| model.name.as_str());
        given.chain(own.filter(|own| !self.given_names.iter().any(|name| name == own)))
    }

    /// The name to answer with for the one that a request has.
    pub fn name<'a>(&'a self, asked: Option<&'a str>) -> Result<&'a str, ApiError> {
        let own = self.given_names.first().map_or("", String::as_str);
        let Some(asked) = asked else { return Ok(own) };
        if self.names().any(|name| name == asked) {
            return Ok(asked);
        }
        let message = format!("the model {asked:?} does not exist; this server has {own:?}");
        let error = ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message);
        Err(ApiError { param: Some("model".into()), ..error })
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.went_idle.notify_one();
        }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
