//! Sessions side by side.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::client::{Answer, Endpoint, Message};
use crate::workload::Session;

/// All that a run gave.
#[derive(Debug, Default)]
pub struct Served {
    pub answers: Vec<Answer>,
    /// Why turns failed; a session ends with its first.
    pub failures: Vec<String>,
    pub wall: Duration,
}

/// Runs `concurrency` sessions at once until none is left.
pub async fn all(endpoint: &Endpoint, sessions: Vec<Session>, concurrency: u32, characters_per_token: f64) -> Served {
    let begun = Instant::now();
    let waiting = Arc::new(Mutex::new(VecDeque::from(sessions)));
    let worker = || async {
        let mut served = Served::default();
        loop {
            let session = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(session) = session else { return served };
            tokio::time::sleep(session.start.saturating_sub(begun.elapsed())).await;
            if let Err(failure) = converse(endpoint, session, characters_per_token, &mut served.answers).await {
                served.failures.push(failure);
            }
        }
    };
    let mut total = Served::default();
    for served in join_all((0..concurrency).map(|_| worker())).await {
        total.answers.extend(served.answers);
        total.failures.extend(served.failures);
    }
    total.wall = begun.elapsed();
    total
}

/// One session, turn after turn.
async fn converse(
    endpoint: &Endpoint,
    session: Session,
    characters_per_token: f64,
    answers: &mut Vec<Answer>,
) -> Result<(), String> {
    let mut messages = Vec::new();
    if let Some(system) = &session.system {
        messages.push(Message { role: "system", content: system.text(characters_per_token) });
    }
    for turn in session.turns {
        tokio::time::sleep(turn.think).await;
        messages.push(Message { role: "user", content: turn.input.text(characters_per_token) });
        let answer = endpoint.answer(&messages, turn.output_tokens).await?;
        messages.push(Message { role: "assistant", content: answer.text.clone() });
        answers.push(answer);
    }
    Ok(())
}
