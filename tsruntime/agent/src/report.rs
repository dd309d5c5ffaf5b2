//! What a run showed, as JSON and as a table.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::AgentError;
use crate::args::AgentArgs;
use crate::client::{Answer, Endpoint};
use crate::drive::Served;

/// Quantiles of one figure over all turns of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

/// One run at one concurrency. Times are in milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Level {
    pub concurrency: u32,
    pub turns: usize,
    pub failed: usize,
    pub wall_s: f64,
    /// From a turn's request to its first token.
    pub first_token_ms: Quantiles,
    /// From one token of an answer to the next, on average.
    pub per_token_ms: Quantiles,
    /// What the median turn's user sees while the answer comes.
    pub tokens_per_s_user: f64,
    /// Output of all sessions, think time included.
    pub tokens_per_s_total: f64,
    pub tokens_per_s_device: f64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    /// Prompt tokens that the server found in its cache, as a share; None if it does not say.
    pub prefix_hit_rate: Option<f64>,
    /// The first failure.
    pub failure: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub name: String,
    pub model: String,
    pub url: String,
    pub workload: Value,
    pub levels: Vec<Level>,
}

impl Quantiles {
    /// By the nearest rank; zeros for nothing.
    fn of(mut values: Vec<f64>) -> Quantiles {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).map_or(0.0, |&value| rounded(value))
        };
        Quantiles { p50: at(0.50), p95: at(0.95), p99: at(0.99) }
    }
}

/// To three decimals.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

impl Level {
    pub fn of(concurrency: u32, served: &Served, devices: u32) -> Level {
        let answers = &served.answers;
        let sum = |of: fn(&Answer) -> u64| answers.iter().map(of).sum::<u64>();
        let (prompt_tokens, output_tokens) = (sum(|answer| answer.prompt_tokens), sum(|answer| answer.output_tokens));
        let cached: Option<u64> = answers.iter().map(|answer| answer.cached_tokens).sum();
        let wall_s = served.wall.as_secs_f64();
        let per_token_ms =
            Quantiles::of(answers.iter().filter_map(|answer| Some(answer.seconds_per_token()? * 1e3)).collect());
        let total = if wall_s > 0.0 { output_tokens as f64 / wall_s } else { 0.0 };
        Level {
            concurrency,
            turns: answers.len(),
            failed: served.failures.len(),
            wall_s: rounded(wall_s),
            first_token_ms: Quantiles::of(
                answers.iter().map(|answer| answer.first_token.as_secs_f64() * 1e3).collect(),
            ),
            per_token_ms,
            tokens_per_s_user: if per_token_ms.p50 > 0.0 { rounded(1e3 / per_token_ms.p50) } else { 0.0 },
            tokens_per_s_total: rounded(total),
            tokens_per_s_device: rounded(total / f64::from(devices)),
            prompt_tokens,
            output_tokens,
            prefix_hit_rate: cached.map(|cached| rounded(cached as f64 / prompt_tokens.max(1) as f64)),
            failure: served.failures.first().cloned(),
        }
    }

    /// One line of progress.
    pub fn line(&self) -> String {
        format!(
            "{} turns in {:.1} s, {} failed; first token {:.0} ms, {:.1} tokens/s a user, {:.1} in all",
            self.turns,
            self.wall_s,
            self.failed,
            self.first_token_ms.p50,
            self.tokens_per_s_user,
            self.tokens_per_s_total
        )
    }
}

impl Report {
    pub fn new(arguments: &AgentArgs, endpoint: &Endpoint, levels: Vec<Level>) -> Report {
        let workload = match &arguments.trace {
            Some(path) => json!({"trace": path.file_name().map(|name| name.to_string_lossy())}),
            None => json!({
                "turns": [arguments.turns.start(), arguments.turns.end()], "first_tokens": arguments.first,
                "next_tokens": arguments.next, "output_tokens": arguments.output, "system_tokens": arguments.system,
                "think_s": arguments.think, "seed": arguments.seed,
            }),
        };
        let name = arguments.name.clone().unwrap_or_else(|| endpoint.model.clone());
        Report { name, model: endpoint.model.clone(), url: arguments.url.clone(), workload, levels }
    }

    /// A report that --json has printed.
    pub fn read(path: &Path) -> Result<Report, AgentError> {
        let wrong = |error: String| AgentError::Usage(format!("{}: {error}", path.display()));
        let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| wrong(format!("no report of bench agent: {error}")))
    }

    pub fn json(&self) -> Value {
        json!(self)
    }

    pub fn table(&self) -> String {
        let mut text = format!("{} at {}: {}\n\n", self.name, self.url, self.workload);
        text += "at once  turns  failed  first token ms, p50   p95   p99  token ms, p50   p95   p99  tokens/s a user  \
                 in total  a device  hit rate\n";
        for level in &self.levels {
            let Level { first_token_ms: first, per_token_ms: token, .. } = level;
            let hits = level.prefix_hit_rate.map_or("-".into(), |rate| format!("{:.0}%", rate * 1e2));
            // A String takes whatever is written to it.
            let _ = writeln!(
                text,
                "{:>7}{:>7}{:>8}{:>21.0}{:>6.0}{:>6.0}{:>15.1}{:>6.1}{:>6.1}{:>17.1}{:>10.1}{:>10.1}{:>10}",
                level.concurrency,
                level.turns,
                level.failed,
                first.p50,
                first.p95,
                first.p99,
                token.p50,
                token.p95,
                token.p99,
                level.tokens_per_s_user,
                level.tokens_per_s_total,
                level.tokens_per_s_device,
                hits
            );
        }
        text
    }

    /// Why the figures do not count, if turns failed.
    pub fn failure(&self) -> Option<String> {
        let failed: usize = self.levels.iter().map(|level| level.failed).sum();
        let turns: usize = self.levels.iter().map(|level| level.turns).sum();
        let reason = self.levels.iter().find_map(|level| level.failure.as_deref())?;
        Some(format!("{failed} sessions broke off after {turns} turns in all; the first because: {reason}"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn answer(first_ms: u64, rest_ms: u64, output_tokens: u64, cached_tokens: Option<u64>) -> Answer {
        let (first_token, rest) = (Duration::from_millis(first_ms), Duration::from_millis(rest_ms));
        Answer { prompt_tokens: 100, cached_tokens, output_tokens, first_token, rest, ..Answer::default() }
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let hundred = Quantiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!(hundred, Quantiles { p50: 50.0, p95: 95.0, p99: 99.0 });
        assert_eq!(Quantiles::of(vec![7.0]), Quantiles { p50: 7.0, p95: 7.0, p99: 7.0 });
        assert_eq!(Quantiles::of(vec![]), Quantiles::default());
    }

    #[test]
    fn a_level_sums_up_its_turns() {
        let served = Served {
            answers: vec![answer(10, 90, 10, Some(50)), answer(30, 180, 10, Some(100)), answer(20, 0, 1, Some(0))],
            failures: vec!["gone".into()],
            wall: Duration::from_secs(2),
        };
        let level = Level::of(3, &served, 2);
        assert_eq!((level.turns, level.failed, level.output_tokens, level.prompt_tokens), (3, 1, 21, 300));
        assert_eq!(level.first_token_ms, Quantiles { p50: 20.0, p95: 30.0, p99: 30.0 });
        assert_eq!(level.per_token_ms, Quantiles { p50: 10.0, p95: 20.0, p99: 20.0 });
        assert_eq!((level.tokens_per_s_user, level.tokens_per_s_total, level.tokens_per_s_device), (100.0, 10.5, 5.25));
        assert_eq!(level.prefix_hit_rate, Some(0.5));
        assert_eq!(level.failure.as_deref(), Some("gone"));
    }

    #[test]
    fn a_server_that_does_not_tell_has_no_hit_rate() {
        let served = Served {
            answers: vec![answer(1, 1, 2, None), answer(1, 1, 2, Some(9))],
            wall: Duration::from_secs(1),
            ..Served::default()
        };
        assert_eq!(Level::of(1, &served, 1).prefix_hit_rate, None);
    }
}
