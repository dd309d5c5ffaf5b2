//! Options of every command that opens an engine, and how values are written.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::engine;
use crate::model::LoadOptions;

const ENGINE: &str = "Engine";
const RANKS: &str = "Plans of several ranks";

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Verify {
    Auto,
    Always,
}

pub fn positive() -> clap::builder::RangedI64ValueParser<i32> {
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

/// A number of bytes, with K, M, G or T for powers of 1,024.
pub fn bytes(text: &str) -> Result<i64, String> {
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

pub fn seconds(text: &str) -> Result<Duration, String> {
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
}
