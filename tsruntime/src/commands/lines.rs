//! `tsruntime generate --jsonl`: many requests over one engine, a JSON object a line each way. What the Python package speaks.

use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};

use super::generate::complete;
use super::{block_on, ms};
use crate::error::{ApiError, Failure};
use crate::json;
use crate::model::Model;
use crate::request;

/// Lines read ahead of those in flight.
const LINES_AHEAD: usize = 64;
/// Requests in the engine at once; it has a place for each.
const IN_FLIGHT: usize = 256;

/// Answers every line of standard input, in the order in which the answers are ready; the first line out says that the model is loaded.
pub fn serve(model: &Arc<Model>, started: Instant) -> Result<(), Failure> {
    let limits = &model.limits;
    let ready = json!({
        "ready": model.name, "vocab_size": limits.vocab_size, "context": limits.context, "start_ms": ms(started.elapsed()),
    });
    if !write(&ready.to_string()) {
        return Ok(());
    }
    let (sender, mut lines) = mpsc::channel(LINES_AHEAD);
    // Ends with the process if nobody closes standard input.
    std::thread::spawn(move || {
        for line in io::stdin().lock().split(b'\n') {
            let end = line.is_err();
            if sender.blocking_send(line).is_err() || end {
                break;
            }
        }
    });
    let in_flight = limits.sequences.min(IN_FLIGHT);
    block_on(async {
        let places = Arc::new(Semaphore::new(in_flight));
        while let Some(line) = lines.recv().await {
            let line = line?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            let Ok(place) = places.clone().acquire_owned().await else { break };
            let model = model.clone();
            tokio::spawn(async move {
                let text = answer(&model, &line).await;
                drop(place);
                if !write(&text) {
                    // Whoever asked has gone.
                    std::process::exit(0);
                }
            });
        }
        // All places are free when all answers are written.
        let _ = places.acquire_many(in_flight as u32).await;
        Ok(())
    })
}

async fn answer(model: &Model, line: &[u8]) -> String {
    let (id, request) = match json::parse(line).and_then(|body| request::offline(body, &model.limits)) {
        Ok(parsed) => parsed,
        Err(error) => return failed(&id_of(line), &error),
    };
    match complete(model, &request, |_| Ok(())).await {
        Ok(None) => String::new(),
        Ok(Some(answer)) => {
            let timing = answer.timing();
            let mut text = serde_json::to_string(&answer.body(timing)).unwrap_or_default();
            // Beside the answer's own fields.
            text.insert_str(1, &format!("\"id\":{id},"));
            text
        }
        Err(error) => failed(&id, &error),
    }
}

/// The id of a line that is not a request, as far as it can be known.
fn id_of(line: &[u8]) -> Value {
    json::parse(line).ok().and_then(|body| body.get("id").cloned()).unwrap_or_default()
}

fn failed(id: &Value, error: &ApiError) -> String {
    let mut body = error.body();
    body["id"] = id.clone();
    body.to_string()
}

/// False if nobody reads any more.
fn write(line: &str) -> bool {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
}
