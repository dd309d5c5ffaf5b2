//! `tsruntime bench agent`: coding agents at work on an OpenAI-compatible server, and what they felt.
//!
//! An agent's session is a conversation of many turns over a long context: a first turn that brings a repository, then tool results and
//! short instructions, each answered before the next comes. What counts is how soon the first token of a turn comes, how fast the rest
//! follows, and how much all sessions together get out of the server.
//!
//! | module | what it is |
//! |---|---|
//! | `args` | the command line |
//! | `workload` | sessions: made up from a seed, or read from a trace |
//! | `client` | one turn over HTTP, timed |
//! | `drive` | sessions side by side |
//! | `report` | quantiles, as JSON and as a table |
//! | `picture` | tokens a second per user against per device, as SVG |

mod args;
mod client;
mod drive;
mod picture;
mod report;
mod workload;

use std::fs;
use std::io::{self, Write};

pub use args::AgentArgs;

use client::Endpoint;
use report::{Level, Report};

/// Why a benchmark ended without a report, or with one that does not count.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs the benchmark, prints the report, and writes the picture if one is wanted. An error if any turn failed.
pub fn run(arguments: &AgentArgs) -> Result<(), AgentError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure(arguments))
}

async fn measure(arguments: &AgentArgs) -> Result<(), AgentError> {
    let mut compared = Vec::new();
    for path in &arguments.compare {
        compared.push(Report::read(path)?);
    }
    let trace = arguments.trace.as_deref().map(workload::read_trace).transpose()?;
    let endpoint = Endpoint::connect(arguments).await?;
    let characters_per_token = endpoint.characters_per_token().await?;
    let mut levels = Vec::new();
    for &concurrency in &arguments.concurrency {
        let sessions = trace.clone().unwrap_or_else(|| workload::synthetic(arguments, concurrency));
        say(&format!("{concurrency} at once, {} sessions", sessions.len()));
        let served = drive::all(&endpoint, sessions, concurrency, characters_per_token).await;
        levels.push(Level::of(concurrency, &served, arguments.devices));
        say(&levels[levels.len() - 1].line());
    }
    let report = Report::new(arguments, &endpoint, levels);
    if let Some(path) = &arguments.svg {
        let all: Vec<&Report> = std::iter::once(&report).chain(&compared).collect();
        fs::write(path, picture::draw(&all)?)?;
    }
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", report.json())?
    } else {
        write!(out, "{}", report.table())?
    }
    match report.failure() {
        Some(failure) => Err(AgentError::Failed(failure)),
        None => Ok(()),
    }
}

/// Progress, on standard error.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "tsruntime: bench agent: {line}");
}
