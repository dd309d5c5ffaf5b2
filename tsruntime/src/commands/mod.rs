//! What each command does.

mod bench;
mod generate;
mod lines;
mod replay;

use std::time::Instant;

pub use bench::bench;
pub use generate::generate;
pub use replay::replay;

use tsruntime_agent::{AgentArgs, AgentError};

use crate::cli::RunArgs;
use crate::error::{Exit, Failure};
use crate::model::LoadOptions;
use crate::server::{self, ServerOptions};

/// `tsruntime run`.
pub fn run(arguments: RunArgs, started: Instant) -> Result<(), Failure> {
    if arguments.api_key.iter().any(|key| key.trim().is_empty() || key.trim() != key) {
        return Err(Failure::new(Exit::Usage, "an API key is empty, or has white space around it"));
    }
    let mut load = LoadOptions { plain_users: arguments.sanitize_control_tokens, ..arguments.engine.options() };
    load.engine.record = arguments.record;
    server::run(
        ServerOptions {
            plan: arguments.plan,
            host: arguments.host,
            port: arguments.port,
            names: arguments.served_model_name,
            api_keys: arguments.api_key,
            load,
            body_bytes_max: usize::try_from(arguments.max_body_bytes).unwrap_or(usize::MAX),
            read_timeout: arguments.read_timeout,
            write_timeout: arguments.write_timeout,
            drain_timeout: arguments.drain_timeout,
        },
        started,
    )
}

/// `tsruntime bench agent`.
pub fn agent(arguments: &AgentArgs) -> Result<(), Failure> {
    tsruntime_agent::run(arguments).map_err(|error| {
        let exit = if matches!(error, AgentError::Usage(_)) { Exit::Usage } else { Exit::Failed };
        Failure::new(exit, error.to_string())
    })
}

/// Runs a command's asynchronous part on this thread.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

/// Milliseconds, to the microsecond.
fn ms(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Per second, to a thousandth; 0 if there was no time.
fn rate(count: u64, duration: std::time::Duration) -> f64 {
    if duration.is_zero() { 0.0 } else { (count as f64 / duration.as_secs_f64() * 1e3).round() / 1e3 }
}
