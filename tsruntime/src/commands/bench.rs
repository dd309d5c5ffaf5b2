//! `tsruntime bench`.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{block_on, ms, rate};
use crate::cli::BenchArgs;
use crate::engine::{EngineError, Event, Finish, Request};
use crate::error::{Exit, Failure};
use crate::model::{LoadOptions, Model};
use crate::request::Sampling;
use crate::run::Run;

/// Tokens of the prompt whose first token ends the start: enough to be a prompt, too few to measure prefill by.
const START_PROMPT: u32 = 16;

/// One run of the whole batch.
struct Timing {
    /// From submission until every sequence has its first token.
    prefill: Duration,
    /// From then until the last token.
    decode: Duration,
    /// Tokens that came in that time.
    decoded: u64,
    /// From submission until the first token of all.
    first: Duration,
}

pub fn bench(arguments: &BenchArgs, started: Instant) -> Result<(), Failure> {
    // A prompt that is found in the cache measures nothing.
    let mut options = arguments.engine.options();
    options.engine.prefix_cache = false;
    let model = Model::load(arguments.plan(), &options)?;
    let start = started.elapsed();
    check(&model, arguments, &options)?;
    let first = block_on(batch(&model, 0, START_PROMPT.min(model.limits.context - 1), 1, 1))?;
    // The engine's time to the token, without what lay between.
    let first_token = start + first.first;
    let mut runs = Vec::new();
    for repeat in 0..arguments.repeat {
        let seed = u64::from(repeat + 1) << 32;
        runs.push(block_on(batch(&model, seed, arguments.prompt, arguments.decode, arguments.batch))?);
    }
    let prompt_tokens = u64::from(arguments.prompt) * u64::from(arguments.batch);
    let prefill = runs.iter().map(|run| rate(prompt_tokens, run.prefill)).collect();
    let decode = runs.iter().map(|run| rate(run.decoded, run.decode)).collect();
    let stats = model.engine.stats();
    let report = json!({
        "model": model.name, "target": stats.target_name(), "threads": stats.num_threads,
        "prompt": arguments.prompt, "decode": arguments.decode, "batch": arguments.batch, "repeat": arguments.repeat,
        "prefill_tokens_per_s": median(prefill),
        "decode_tokens_per_s": median(decode),
        "start_ms": ms(start),
        "first_token_ms": ms(first_token),
        "resident_bytes": memory("VmRSS:"),
        "resident_bytes_max": memory("VmHWM:"),
        "schedule_us_per_step": (stats.schedule_ns as f64 / 1e3 / stats.num_steps.max(1) as f64 * 1e3).round() / 1e3,
    });
    Ok(print(&report, arguments.json)?)
}

fn check(model: &Model, arguments: &BenchArgs, options: &LoadOptions) -> Result<(), Failure> {
    let total = u64::from(arguments.prompt) + u64::from(arguments.decode);
    let stats = model.engine.stats();
    let pages = total.div_ceil(stats.page_size as u64) * u64::from(arguments.batch);
    let refuse = |message: String| Err(Failure::new(Exit::Usage, message));
    if total > u64::from(model.limits.context) {
        return refuse(format!(
            "--prompt {} and --decode {} are {total} tokens, but the context holds {}",
            arguments.prompt, arguments.decode, model.limits.context
        ));
    }
    if arguments.batch > stats.max_seqs as u32 {
        return refuse(format!("--batch is {}, but at most {} sequences run at once", arguments.batch, stats.max_seqs));
    }
    if pages > stats.num_pages as u64 {
        // Preempted sequences would be computed twice.
        let hint = if options.engine.num_pages == 0 { "give more with --kv-bytes" } else { "raise --num-pages" };
        return refuse(format!("the batch needs {pages} KV pages, but there are {}: {hint}", stats.num_pages));
    }
    Ok(())
}

/// Runs `batch` prompts of `prompt` tokens each, which no cache knows.
async fn batch(model: &Model, seed: u64, prompt: u32, decode: u32, batch: u32) -> Result<Timing, Failure> {
    let mut run = Run::new(model.engine);
    let plain = Sampling::plain();
    let mut random = seed;
    let mut token = || {
        // Knuth's multiplier; the high bits are good enough to tell prompts apart.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((random >> 33) % u64::from(model.limits.vocab_size)) as i32
    };
    let requests: Vec<Request> = (0..batch)
        .map(|_| Request {
            prompt: (0..prompt).map(|_| token()).collect::<Arc<[i32]>>(),
            max_tokens: decode as i32,
            temperature: 0.0,
            top_k: plain.top_k,
            top_p: plain.top_p,
            min_p: plain.min_p,
            repetition_penalty: plain.repetition_penalty,
            presence_penalty: plain.presence_penalty,
            frequency_penalty: plain.frequency_penalty,
            seed: 0,
            logit_bias: Arc::default(),
            stop_tokens: Arc::default(),
            ignore_eos: true,
            num_logprobs: -1,
            cache_salt: "".into(),
            lease_ms: 0,
            session: 0,
            tenant: 0,
            priority: 0,
            timeout_ms: 0,
        })
        .collect();
    let submitted = Instant::now();
    requests.iter().try_for_each(|request| run.submit(request))?;
    let mut counts = vec![0u64; batch as usize];
    let mut timing = Timing { prefill: Duration::ZERO, decode: Duration::ZERO, decoded: 0, first: Duration::ZERO };
    let mut prefilled = 0;
    while let Some((index, event)) = run.next().await {
        let now = submitted.elapsed();
        match event {
            Event::Token(_) => {
                if prefilled == batch {
                    timing.decoded += 1;
                    timing.decode = now - timing.prefill;
                }
                if counts.iter().all(|&count| count == 0) {
                    timing.first = now;
                }
                counts[index] += 1;
                if counts[index] == 1 {
                    prefilled += 1;
                    timing.prefill = now;
                }
            }
            Event::Finished(Finish::Error(message)) => return Err(EngineError::Failed(message).into()),
            Event::Finished(_) => {}
        }
    }
    Ok(timing)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// A line of /proc/self/status, in bytes.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().map_or(0, |kib| kib << 10)
}

fn print(report: &Value, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        return writeln!(out, "{report}");
    }
    let number = |name: &str| report[name].as_f64().unwrap_or(0.0);
    writeln!(out, "{} on {}, {} threads", text(&report["model"]), text(&report["target"]), report["threads"])?;
    writeln!(
        out,
        "prefill      {:>10.1} tokens/s  (prompt {}, batch {})",
        number("prefill_tokens_per_s"),
        report["prompt"],
        report["batch"]
    )?;
    writeln!(out, "decode       {:>10.1} tokens/s  ({} tokens)", number("decode_tokens_per_s"), report["decode"])?;
    writeln!(out, "ready        {:>10.1} ms", number("start_ms"))?;
    writeln!(out, "first token  {:>10.1} ms", number("first_token_ms"))?;
    writeln!(out, "memory       {:>10.1} MiB", number("resident_bytes") / f64::from(1 << 20))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!((median(vec![3.0, 1.0, 2.0]), median(vec![4.0, 1.0])), (2.0, 2.5));
    }

    #[test]
    fn this_process_has_memory() {
        assert!(memory("VmRSS:") > 1 << 16 && memory("VmHWM:") > 1 << 16);
        assert_eq!(memory("VmNothing:"), 0);
    }
}
