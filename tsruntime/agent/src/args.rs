//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  tsruntime bench agent
  tsruntime bench agent --first 4000 --next 200 --output 100 --turns 3-5 --concurrency 1,2,4 --svg agents.svg
  tsruntime bench agent --url http://127.0.0.1:8001/v1 --name peer --json > peer.json
  tsruntime bench agent --compare peer.json --svg both.svg
  tsruntime bench agent --trace sessions.jsonl --concurrency 8

A trace has a JSON object a line, a turn each; lines of one session are its turns, in order:
  {\"session\": \"a\", \"start_s\": 0, \"think_s\": 1.5, \"input_tokens\": 800, \"output_tokens\": 500}
`content` gives the user's words instead of `input_tokens`; `start_s` counts on a session's first line only.

Exit codes:
  0  every turn was answered
  1  turns failed, or the server could not be reached
  2  the command line or the trace is wrong";

/// Measure any OpenAI-compatible server under coding agents: long contexts, many turns, shared prefixes.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct AgentArgs {
    /// The server's base URL; over https its certificate must be signed by whom the system trusts, or SSL_CERT_FILE
    #[arg(long, default_value = "http://127.0.0.1:8000/v1")]
    pub url: String,
    /// The model to ask for [default: the first that the server lists]
    #[arg(long)]
    pub model: Option<String>,
    /// A bearer token for the server
    #[arg(long, value_name = "KEY", env = "TSRUNTIME_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// What the report calls this server [default: the model's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Sessions at once, a run each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,4,8,16", value_parser = count(1))]
    pub concurrency: Vec<u32>,
    /// Sessions of a run [default: one for each at once]
    #[arg(long, value_name = "N", value_parser = count(1))]
    pub sessions: Option<u32>,
    /// Turns of a session
    #[arg(long, value_name = "MIN-MAX", default_value = "10-15", value_parser = range)]
    pub turns: RangeInclusive<u32>,
    /// Tokens of the first turn, the system prompt included
    #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = count(1))]
    pub first: u32,
    /// Tokens that each later turn brings
    #[arg(long, value_name = "N", default_value_t = 800, value_parser = count(1))]
    pub next: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = count(1))]
    pub output: u32,
    /// Tokens of the system prompt, which all sessions share; at most those of the first turn
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = count(0))]
    pub system: u32,
    /// Mean of the exponentially distributed pause between an answer and the next turn
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    pub think: f64,
    /// Replay the sessions of this file instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sessions", "turns", "first", "next", "output", "think"])]
    pub trace: Option<PathBuf>,
    /// Do not ask the server to go on after an end token: some refuse to. Answers may then be short
    #[arg(long)]
    pub stop_at_eos: bool,
    /// Devices that the server runs on, by which its total is divided
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1))]
    pub devices: u32,
    /// How long a turn may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = seconds)]
    pub timeout: f64,
    /// The sessions depend on this alone. A server that has seen them finds them in its cache: give a second run another
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Draw tokens a second per user against tokens a second per device
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// A report of another server, drawn into the same picture; may be given more than once
    #[arg(long, value_name = "FILE", requires = "svg")]
    pub compare: Vec<PathBuf>,
    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
}

fn count(min: i64) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(min..=1 << 24)
}

fn range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (min, max) = text.split_once('-').unwrap_or((text, text));
    let parse = |word: &str| word.parse::<u32>().ok().filter(|turns| (1..=10_000).contains(turns));
    match (parse(min), parse(max)) {
        (Some(min), Some(max)) if min <= max => Ok(min..=max),
        _ => Err("wanted turns such as 12, or 10-15".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: Option<f64> = text.parse().ok();
    seconds.filter(|s| (0.0..=86_400.0).contains(s)).ok_or_else(|| "wanted seconds, from 0 to a day".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!((range("10-15"), range("3")), (Ok(10..=15), Ok(3..=3)));
        for text in ["", "0", "5-4", "-3", "a-b", "1-99999"] {
            assert!(range(text).is_err(), "{text}");
        }
        assert_eq!(seconds("0.5"), Ok(0.5));
        for text in ["", "-1", "nan", "1e9"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
