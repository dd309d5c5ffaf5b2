//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use tsruntime_agent::AgentArgs;

use crate::engine;
use crate::engine_args::{EngineArgs, bytes, positive, seconds};
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
pub struct RankArgs {
    pub plan: PathBuf,
    #[arg(long, value_name = "R", value_parser = positive())]
    pub rank: i32,
    #[command(flatten)]
    pub engine: EngineArgs,
}

const LIMITS: &str = "Limits";

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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
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
