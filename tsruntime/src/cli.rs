//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use tsruntime_agent::AgentArgs;

use crate::engine;
use crate::model::LoadOptions;

const EXIT_CODES: &str = "\
Exit codes:
  0  done (a server: drained)
  1  the machine said no (files, memory, threads)
  2  the command or the request cannot be served as it is
  3  the plan is damaged, or holds nothing that this machine can run
  4  the address cannot be listened on
  5  a replay is not what was recorded";

/// Serves a compiled model: one plan.tsp, an OpenAI-compatible server, text at the command line, figures.
#[derive(Debug, Parser)]
#[command(name = "tsruntime", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a plan over HTTP until SIGTERM or SIGINT drains the server.
    Run(RunArgs),
    /// Run again what `run --record` has recorded, and check every step and every token.
    Replay(ReplayArgs),
    /// Generate text from one prompt, or from a JSON object a line of standard input.
    Generate(GenerateArgs),
    /// Measure prefill and decode speed, and how soon the first token comes.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Bench {
        #[command(subcommand)]
        load: Option<Load>,
        #[command(flatten)]
        arguments: Box<BenchArgs>,
    },
    /// Compute as another rank of a plan: what rank 0 starts.
    #[command(hide = true)]
    Rank(RankArgs),
    /// Compile and try tokenizers and chat templates.
    #[command(disable_help_flag = true)]
    Text {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Load {
    Agent(AgentArgs),
}

#[derive(Debug, Args)]
pub struct EngineArgs {
    /// Threads that compute, of each rank [default: every core that this process may use, shared with other ranks]
    #[arg(long, value_name = "N", value_parser = positive(), help_heading = ENGINE)]
    threads: Option<i32>,
    /// Memory for the KV cache, such as 512M or 4G [default: enough for a full context, within half of the free memory]
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = ENGINE)]
    kv_bytes: Option<i64>,
    /// Pages of the KV cache, instead of --kv-bytes
    #[arg(long, value_name = "N", value_parser = positive(), conflicts_with = "kv_bytes", help_heading = ENGINE)]
    num_pages: Option<i32>,
    /// Tokens that a step may hold, also the longest chunk of a prompt [default: the plan's limit]
    #[arg(long, value_name = "N", value_parser = positive(), help_heading = ENGINE)]
    token_budget: Option<i32>,
    /// Sequences that run at once [default: the plan's limit]
    #[arg(long, value_name = "N", value_parser = positive(), help_heading = ENGINE)]
    max_seqs: Option<i32>,
    /// Sequences that wait; with more, a client is told to come back [default: 1024]
    #[arg(long, value_name = "N", value_parser = positive(), help_heading = ENGINE)]
    max_queue: Option<i32>,
    /// Compute every prompt from its first token
    #[arg(long, help_heading = ENGINE)]
    no_prefix_cache: bool,
    /// Keep pages that the prefix cache evicts, in so much memory more, such as 4G (of each rank), and bring them back, checked,
    /// where a prompt needs them [default: they are lost, and computed again]
    #[arg(long, value_name = "BYTES", value_parser = bytes, conflicts_with = "no_prefix_cache", help_heading = ENGINE)]
    kv_offload: Option<i64>,
    /// Keep them in this folder of a local disk rather than in memory: in a file without a name, that ends with the process
    #[arg(long, value_name = "DIR", requires = "kv_offload", help_heading = ENGINE)]
    kv_offload_dir: Option<String>,
    /// Tokens of a sequence that a step may guess, from its own text and from what its tenant was told before, and verify, where
    /// that is worth its time: the output is the same, sooner where it repeats itself; 0: none
    #[arg(long, value_name = "N", default_value = "0", value_parser = clap::value_parser!(i32).range(0..=16), help_heading = ENGINE)]
    max_draft: i32,
    /// How long a tenant may be passed over by others before its oldest request goes first. A tenant is an API key, else a
    /// `cache_salt`; waits of a lower `priority` are longer in proportion
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, help_heading = ENGINE)]
    patience: Duration,
    /// Time per output token that prompts of others must leave: where sequences decode, a step takes on no more of other prompts
    /// than is predicted to fit into it, or 16 tokens [default: as much as --token-budget allows]
    #[arg(long, value_name = "MS", value_parser = milliseconds, help_heading = ENGINE)]
    target_tpot_ms: Option<Duration>,
    /// Schedule each step while the one before it runs, on a thread of its own: auto where --threads leaves a core for it
    #[arg(long, value_name = "WHEN", default_value = "off", value_enum, help_heading = ENGINE)]
    overlap_schedule: engine::Overlap,
    /// Run this target of the plan [default: the best that this machine can run]
    #[arg(long, value_name = "TARGET", help_heading = ENGINE)]
    target: Option<String>,
    /// When weights are hashed: `auto` does it for a file that is new to this machine or has changed
    #[arg(long, value_enum, default_value_t = Verify::Auto, help_heading = ENGINE)]
    verify: Verify,
    /// How long ranks wait for one that does not come, or does not move
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, help_heading = RANKS)]
    rank_timeout: Duration,
    /// Under torchrun, mpirun or Slurm: a name that all ranks of this run share [default: from the environment]
    #[arg(long, value_name = "NAME", help_heading = RANKS)]
    rendezvous: Option<String>,
    /// With ranks on several hosts: the MPI library, with the ABI of MPI 5, that is between them [default: libmpi_abi.so]
    #[arg(long, value_name = "FILE", env = "TSRUNTIME_MPI", help_heading = RANKS)]
    mpi: Option<String>,
}

#[derive(Debug, Args)]
pub struct RankArgs {
    pub plan: PathBuf,
    #[arg(long, value_name = "R", value_parser = positive())]
    pub rank: i32,
    #[command(flatten)]
    pub engine: EngineArgs,
}

const ENGINE: &str = "Engine";
const RANKS: &str = "Plans of several ranks";
const LIMITS: &str = "Limits";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Verify {
    Auto,
    Always,
}

fn positive() -> clap::builder::RangedI64ValueParser<i32> {
    clap::value_parser!(i32).range(1..)
}

impl EngineArgs {
    pub fn options(&self) -> LoadOptions {
        LoadOptions {
            engine: engine::Options {
                num_threads: self.threads.unwrap_or(0),
                num_pages: self.num_pages.unwrap_or(0),
                kv_bytes: self.kv_bytes.unwrap_or(0),
                token_budget: self.token_budget.unwrap_or(0),
                max_seqs: self.max_seqs.unwrap_or(0),
                max_queue: self.max_queue.unwrap_or(0),
                prefix_cache: !self.no_prefix_cache,
                max_draft: self.max_draft,
                target_tpot_us: self
                    .target_tpot_ms
                    .map_or(0, |target| i32::try_from(target.as_micros()).unwrap_or(i32::MAX)),
                overlap_schedule: self.overlap_schedule,
                patience_ms: i32::try_from(self.patience.as_millis()).unwrap_or(i32::MAX).max(1),
                target: self.target.clone(),
                rank: 0,
                rank_timeout_ms: i32::try_from(self.rank_timeout.as_millis()).unwrap_or(i32::MAX).max(1),
                rendezvous: self.rendezvous.clone(),
                rank_pids: Vec::new(),
                ranks_here: 0,
                mpi_library: self.mpi.clone(),
                record: None,
                offload_bytes: self.kv_offload.unwrap_or(0),
                offload_folder: self.kv_offload_dir.clone(),
            },
            always_verify: self.verify == Verify::Always,
            plain_users: false,
        }
    }
}

const RUN_EXAMPLES: &str = "\
Examples:
  tsruntime run plan.tsp
  tsruntime run plan.tsp --port 9000 --kv-bytes 4G --served-model-name qwen
  tsruntime run plan.tsp --kv-bytes 4G --kv-offload 100G --kv-offload-dir /var/tmp
  TSRUNTIME_API_KEY=secret tsruntime run plan.tsp --host 0.0.0.0";

#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// The plan to serve
    pub plan: PathBuf,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// A name under which the model answers; may be given more than once [default: the plan's file name, and the model's own]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// Keys that requests must carry one of, separated by commas. Better set in the environment, where other users do not see them
    #[arg(long, value_name = "KEY", env = "TSRUNTIME_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Vec<String>,
    /// Take control tokens that are spelled out in messages as plain text, so that no user can speak for another
    #[arg(long)]
    pub sanitize_control_tokens: bool,
    /// Record all that enters the engine in this new file, so that `tsruntime replay` can run it again. It has the prompts in it, as
    /// token ids, for whoever may read it: nobody but you
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
    /// The largest body of a request
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = bytes, help_heading = LIMITS)]
    pub max_body_bytes: i64,
    /// How long a client may take to send a request's head, and again its body
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, help_heading = LIMITS)]
    pub read_timeout: Duration,
    /// How long a client may take nothing of what is sent to it
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, help_heading = LIMITS)]
    pub write_timeout: Duration,
    /// How long running requests may take to finish after SIGTERM or SIGINT; a second signal ends at once
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, help_heading = LIMITS)]
    pub drain_timeout: Duration,
}

const REPLAY_NOTES: &str = "\
The engine's options are those of the trace. Every step must hold the same rows, tokens and pages, and give the same output tokens; the
first that does not is told, and ends the replay with exit code 5. A trace that ends in the middle, because the server was killed, is
replayed up to there.

Examples:
  tsruntime run plan.tsp --record run.trace
  tsruntime replay plan.tsp run.trace";

#[derive(Debug, Args)]
#[command(after_help = REPLAY_NOTES)]
pub struct ReplayArgs {
    /// The plan that was served
    pub plan: PathBuf,
    /// What `tsruntime run --record` wrote
    pub trace: PathBuf,
    /// Threads that compute, of each rank [default: every core that this process may use, shared with other ranks]
    #[arg(long, value_name = "N", value_parser = positive())]
    threads: Option<i32>,
    /// Run this target of the plan [default: the recorded one]
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    /// If the recorded run kept evicted pages (--kv-offload): keep them in this folder [default: in memory]
    #[arg(long, value_name = "DIR")]
    kv_offload_dir: Option<String>,
    /// Print one JSON object: steps, requests, output_tokens, bytes_cut_off, difference
    #[arg(long)]
    pub json: bool,
    /// With ranks on several hosts: the MPI library, with the ABI of MPI 5, that is between them [default: libmpi_abi.so]
    #[arg(long, value_name = "FILE", env = "TSRUNTIME_MPI")]
    mpi: Option<String>,
}

impl ReplayArgs {
    pub fn options(&self) -> LoadOptions {
        let engine = engine::Options {
            num_threads: self.threads.unwrap_or(0),
            target: self.target.clone(),
            mpi_library: self.mpi.clone(),
            offload_folder: self.kv_offload_dir.clone(),
            rank_timeout_ms: 60_000,
            ..engine::Options::default()
        };
        LoadOptions { engine, ..LoadOptions::default() }
    }
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  tsruntime generate plan.tsp -p 'def fib(n):' --max-tokens 64
  tsruntime generate plan.tsp --chat -p 'Hello' --temperature 0.7 --seed 1
  tsruntime generate plan.tsp --ids 1,2,3 --logprobs 5 --json
  echo '{\"prompt\": \"a\", \"max_tokens\": 4}' | tsruntime generate plan.tsp --jsonl";

#[derive(Debug, Args)]
#[command(after_help = GENERATE_EXAMPLES)]
#[group(id = "input", required = true, multiple = false, args = ["prompt", "ids", "jsonl"])]
pub struct GenerateArgs {
    pub plan: PathBuf,
    /// The prompt, as text
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// The prompt, as token ids
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub ids: Option<Vec<i64>>,
    /// Read requests from standard input, a JSON object a line with the fields of /v1/completions or /v1/chat/completions and an `id`, and
    /// write an answer a line, in the order in which they finish
    #[arg(long)]
    pub jsonl: bool,
    /// The prompt is a user's message: the plan's chat template goes around it
    #[arg(long, requires = "prompt")]
    pub chat: bool,
    /// Do not add what the tokenizer adds to a text, such as a beginning-of-sequence token
    #[arg(long)]
    pub no_special_tokens: bool,
    /// Print one JSON object: prompt_ids, ids, text, finish_reason, logprobs, timing
    #[arg(long)]
    pub json: bool,
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: i64,
    /// 0 takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<i64>,
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f64>,
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f64>,
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f64>,
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<i64>,
    /// A text that ends the output; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// A token that ends the output; may be given more than once
    #[arg(long, value_name = "ID")]
    pub stop_token_id: Vec<i64>,
    /// End tokens do not end the output
    #[arg(long)]
    pub ignore_eos: bool,
    /// Tell the K most likely tokens with each token; K may be as large as the vocabulary
    #[arg(long, value_name = "K", requires = "json")]
    pub logprobs: Option<i64>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

const BENCH_EXAMPLES: &str = "\
Examples:
  tsruntime bench plan.tsp --prompt 512 --decode 64 --batch 1
  tsruntime bench plan.tsp --prompt 128 --decode 32 --batch 16 --threads 2 --json
  tsruntime bench agent --help";

#[derive(Debug, Args)]
#[command(after_help = BENCH_EXAMPLES)]
pub struct BenchArgs {
    /// The plan to measure
    #[arg(required = true)]
    plan: Option<PathBuf>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub decode: u32,
    /// Prompts at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Measured runs; the medians are told
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

impl BenchArgs {
    pub fn plan(&self) -> &Path {
        self.plan.as_deref().expect("clap demands a plan where no load is named")
    }
}

/// A number of bytes, with K, M, G or T for powers of 1,024.
fn bytes(text: &str) -> Result<i64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("wanted a number of bytes, such as 1000000, 512M or 4G".into()),
    };
    let count: i64 = digits.parse().map_err(|_| "wanted a number of bytes, such as 1000000, 512M or 4G")?;
    count.checked_mul(1 << shift).filter(|&bytes| bytes >= 0).ok_or("wanted at most 8 EiB, and no less than 0".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "wanted a number of seconds")?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| duration.as_secs() <= 86400 && !duration.is_zero())
        .ok_or("wanted more than 0 seconds, at most a day".into())
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let ms: f64 = text.parse().map_err(|_| "wanted a number of milliseconds")?;
    Duration::try_from_secs_f64(ms / 1e3)
        .ok()
        .filter(|duration| duration.as_micros() >= 1 && duration.as_secs() <= 60)
        .ok_or("wanted at least 0.001 ms, at most a minute".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_times() {
        assert_eq!(
            (bytes("10"), bytes("2K"), bytes("3GiB"), bytes("1mb")),
            (Ok(10), Ok(2048), Ok(3 << 30), Ok(1 << 20))
        );
        for text in ["", "G", "-1", "1.5G", "9999999T", "1X", "1 G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "0", "-1", "nan", "inf", "1e9"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bench_is_of_a_plan_or_under_a_load() {
        let parse = |words: &str| Cli::try_parse_from(words.split(' ')).map(|cli| cli.command);
        let Ok(Command::Bench { load: None, arguments }) = parse("tsruntime bench a.tsp --batch 2") else { panic!() };
        assert_eq!((arguments.plan(), arguments.batch), (Path::new("a.tsp"), 2));
        assert!(matches!(parse("tsruntime bench agent --first 10"), Ok(Command::Bench { load: Some(_), .. })));
        for words in ["tsruntime bench", "tsruntime bench a.tsp agent", "tsruntime bench agent a.tsp"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }

    #[test]
    fn a_generation_needs_one_input() {
        let parse = |words: &str| Cli::try_parse_from(words.split(' '));
        assert!(parse("tsruntime generate a.tsp -p x").is_ok());
        assert!(parse("tsruntime generate a.tsp --ids 1,2 --temperature 0 --seed -1 --top-k -1").is_ok());
        for words in [
            "tsruntime generate a.tsp",
            "tsruntime generate a.tsp -p x --ids 1",
            "tsruntime generate a.tsp --ids 1,x",
            "tsruntime generate a.tsp -p x --logprobs 2",
            "tsruntime run a.tsp --threads 0",
            "tsruntime run a.tsp --port 65536",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
