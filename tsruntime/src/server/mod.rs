//! The HTTP server: one thread for any number of connections, from the first answer of /health to the last drained stream.

mod app;
mod auth;
mod body;
mod generate;
mod logprobs;
mod reply;
mod routes;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio_io_timeout::TimeoutStream;

use crate::error::{Exit, Failure, say};
use crate::model::{LoadOptions, Model};
use app::App;

#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub plan: PathBuf,
    pub host: String,
    pub port: u16,
    /// Names under which the model answers; empty: the file's name and the manifest's.
    pub names: Vec<String>,
    /// Requests need one of these as bearer token; empty: none.
    pub api_keys: Vec<String>,
    pub load: LoadOptions,
    pub body_bytes_max: usize,
    /// For a request's head, and again for its body.
    pub read_timeout: Duration,
    /// For a client that takes none of what is sent to it.
    pub write_timeout: Duration,
    pub drain_timeout: Duration,
}

/// Bytes of a request's head, and of a response that waits for its client.
const CONNECTION_BUFFER_BYTES: usize = 64 << 10;
/// For the last bytes of the last answers.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// After an accept that failed, as when all file descriptors are taken.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Threads for what would hold the others up: tokenizing, rendering chats.
const BLOCKING_THREADS: usize = 2;

/// Serves until a signal has drained it. `started` is when the process began.
pub fn run(options: ServerOptions, started: Instant) -> Result<(), Failure> {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("ts-blocking")
        .build()?;
    let result = runtime.block_on(serve(options, started));
    // A chat that still renders is nobody's by now.
    runtime.shutdown_background();
    result
}

async fn serve(options: ServerOptions, started: Instant) -> Result<(), Failure> {
    let (listener, address) = listen(&options.host, options.port).await?;
    if !address.ip().is_loopback() && options.api_keys.is_empty() {
        say(format!("{address} is open to the network, and no --api-key is set"));
    }
    let mut signals = Signals::new()?;
    let app = Arc::new(App::new(&options));
    let mut loading = load(options.plan.clone(), options.load.clone());
    let connections = Connections { router: routes::router(app.clone()), graceful: GracefulShutdown::new(), options };
    let options = &connections.options;
    let mut deadline = None;
    let outcome = loop {
        let drain = deadline.is_some();
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => connections.start(stream),
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            loaded = &mut loading, if app.model().is_none() => {
                let model = loaded.unwrap_or_else(|_| Err(Failure::new(Exit::Failed, "loading the plan panicked")))?;
                announce(&model, address, started);
                app.loaded(model);
            }
            name = signals.next() => {
                if drain || app.model().is_none() {
                    let code = if drain { 128 + name.as_raw_value() } else { 0 };
                    std::process::exit(code);
                }
                say(format!("draining, at most {} s", options.drain_timeout.as_secs()));
                app.drain();
                deadline = Some(tokio::time::Instant::now() + options.drain_timeout);
            }
            () = app.idle(), if drain => break Ok(()),
            message = failure(app.model().cloned()) => {
                // Its requests have ended with errors, which now go to their clients.
                app.drain();
                app.cut_off().await;
                break Err(Failure::new(Exit::Failed, message));
            }
            () = sleep_until(deadline), if drain => {
                say(format!("{} requests were still running and are cut off", app.num_active()));
                app.cut_off().await;
                break Ok(());
            }
        }
    };
    drop(listener);
    if let Some(Err(failure)) = app.model().map(|model| model.engine.recording()) {
        say(format!("the run is not recorded to its end: {failure}"));
    }
    let Connections { graceful, .. } = connections;
    let _ = tokio::time::timeout(FLUSH_TIMEOUT, graceful.shutdown()).await;
    outcome
}

/// Waits until the model's engine can compute no more, and says why.
async fn failure(model: Option<Arc<Model>>) -> String {
    match model {
        Some(model) => model.engine.failure().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline).await;
    }
}

/// Binds first of all, so that a port in use is told before a plan is loaded.
async fn listen(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), Failure> {
    let failed = |error: std::io::Error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AddrInUse => ": another process listens there; choose another with --port",
            std::io::ErrorKind::PermissionDenied => {
                ": ports below 1024 need rights that this user lacks; choose another with --port"
            }
            _ => "",
        };
        Failure::new(Exit::Address, format!("cannot listen on {host}:{port}: {error}{hint}"))
    };
    let listener = TcpListener::bind((host, port)).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Loads the plan on a thread of its own.
fn load(plan: PathBuf, options: LoadOptions) -> oneshot::Receiver<Result<Model, Failure>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = sender.send(Model::load(&plan, &options));
    });
    receiver
}

/// The one line of standard output. Nobody need read it.
fn announce(model: &Model, address: SocketAddr, started: Instant) {
    let stats = model.engine.stats();
    let _ = writeln!(
        std::io::stdout(),
        "tsruntime: {} is ready at http://{address}/v1 after {:.0} ms ({}, {} threads, context {}, {} KV pages of {} tokens)",
        model.name,
        started.elapsed().as_secs_f64() * 1e3,
        stats.target_name(),
        stats.num_threads,
        model.limits.context,
        stats.num_pages,
        stats.page_size,
    );
}

struct Connections {
    router: Router,
    graceful: GracefulShutdown,
    options: ServerOptions,
}

impl Connections {
    fn start(&self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.options.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.options.read_timeout)
            .max_buf_size(CONNECTION_BUFFER_BYTES)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(self.router.clone()));
        // What a client does to its own connection is no news.
        tokio::spawn(drop_result(self.graceful.watch(connection)));
    }
}

async fn drop_result<T>(future: impl Future<Output = T>) {
    let _ = future.await;
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals, Failure> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        }
    }
}

/// As many connections as the system allows: the soft limit is often 1,024.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

pub fn json_response(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
