//! Figures for Prometheus. Names follow vLLM's, with our prefix: what dashboards and load balancers of this field look for.

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
    exponential_buckets,
};

use crate::engine::Stats;

type FromStats = fn(&Stats) -> u64;

pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    offload_usage: Gauge,
    /// Counters that the engine keeps, brought up to its values at every scrape.
    engine: [(IntCounter, FromStats); 14],
    /// Requests by path and status.
    pub http: IntCounterVec,
    /// Finished sequences by reason.
    pub finished: IntCounterVec,
    pub first_token: Histogram,
    pub inter_token: Histogram,
    pub time_per_token: Histogram,
    pub request_latency: Histogram,
    pub prompt_tokens: Histogram,
    pub generation_tokens: Histogram,
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("names and buckets are constants");
    registry.register(Box::new(metric.clone())).expect("every name is registered once");
    metric
}

impl Metrics {
    pub fn new(model: &str, version: &str) -> Metrics {
        let labels = [("model_name".to_owned(), model.to_owned())].into();
        let registry = Registry::new_custom(None, Some(labels)).expect("a fresh registry");
        let name = |name: &str| format!("tsruntime:{name}");
        let opts = |at: &str, help: &str| Opts::new(name(at), help);
        let gauge = |at: &str, help: &str| registered(&registry, Gauge::with_opts(opts(at, help)));
        let counter = |at: &str, help: &str| registered(&registry, IntCounter::with_opts(opts(at, help)));
        let histogram = |at: &str, help: &str, buckets: prometheus::Result<Vec<f64>>| {
            let opts = HistogramOpts::new(name(at), help).buckets(buckets.expect("constants"));
            registered(&registry, Histogram::with_opts(opts))
        };
        let counted =
            |at: &str, help: &str, labels: &[&str]| registered(&registry, IntCounterVec::new(opts(at, help), labels));
        let info = registered(&registry, GaugeVec::new(opts("build_info", "Always 1."), &["version"]));
        info.with_label_values(&[version]).set(1.0);
        let seconds = || exponential_buckets(0.001, 2.0, 18); // 1 ms to 131 s
        let tokens = || exponential_buckets(1.0, 2.0, 18);
        Metrics {
            running: gauge("num_requests_running", "Sequences that run now."),
            waiting: gauge("num_requests_waiting", "Sequences that wait to run."),
            kv_usage: gauge("kv_cache_usage_perc", "KV pages in use by running sequences, 1 for all."),
            offload_usage: gauge(
                "kv_offload_usage_perc",
                "Pages that the second tier holds, 1 for all it has room for.",
            ),
            engine: [
                (counter("prompt_tokens_total", "Prompt tokens processed, cached ones included."), |s| {
                    s.num_prompt_tokens
                }),
                (counter("generation_tokens_total", "Tokens generated."), |s| s.num_output_tokens),
                (counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."), |s| {
                    s.num_prompt_tokens
                }),
                (counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache."), |s| {
                    s.num_cached_tokens
                }),
                (counter("external_prefix_cache_hits_total", "Of these, brought back from the second tier."), |s| {
                    s.num_restored_tokens
                }),
                (counter("kv_offload_pages_stored_total", "Evicted pages copied to the second tier."), |s| {
                    s.num_pages_kept
                }),
                (counter("kv_offload_pages_loaded_total", "Pages brought back from it."), |s| s.num_pages_restored),
                (counter("kv_offload_pages_failed_total", "Pages that could not be, or came back changed."), |s| {
                    s.num_pages_broken
                }),
                (counter("num_preemptions_total", "Sequences preempted for lack of KV pages."), |s| s.num_preemptions),
                (counter("spec_decode_num_draft_tokens_total", "Tokens guessed ahead."), |s| s.num_drafted_tokens),
                (counter("spec_decode_num_accepted_tokens_total", "Of these, tokens of outputs."), |s| {
                    s.num_accepted_tokens
                }),
                (counter("steps_total", "Steps of the engine."), |s| s.num_steps),
                (counter("step_microseconds_total", "Time in steps."), |s| s.step_ns / 1000),
                (counter("schedule_microseconds_total", "Time in scheduling them."), |s| s.schedule_ns / 1000),
            ],
            http: counted("http_requests_total", "HTTP requests by path and status.", &["path", "status"]),
            finished: counted("request_success_total", "Finished sequences by reason.", &["finished_reason"]),
            first_token: histogram("time_to_first_token_seconds", "Arrival to first token.", seconds()),
            inter_token: histogram(
                "inter_token_latency_seconds",
                "Time between two tokens of a sequence.",
                exponential_buckets(0.0002, 2.0, 18),
            ),
            time_per_token: histogram(
                "request_time_per_output_token_seconds",
                "Mean time between the tokens of a sequence.",
                exponential_buckets(0.0002, 2.0, 18),
            ),
            request_latency: histogram("e2e_request_latency_seconds", "Arrival to last token.", seconds()),
            prompt_tokens: histogram("request_prompt_tokens", "Tokens of a prompt.", tokens()),
            generation_tokens: histogram("request_generation_tokens", "Tokens of an output.", tokens()),
            registry,
        }
    }

    /// The exposition text. `stats` is None while the plan is loading.
    pub fn text(&self, stats: Option<&Stats>) -> Vec<u8> {
        if let Some(stats) = stats {
            self.running.set(stats.num_running.into());
            self.waiting.set(stats.num_waiting.into());
            // Pages that are only cached are free to be taken.
            let used = stats.num_pages - stats.num_pages_free - stats.num_pages_cached;
            self.kv_usage.set(f64::from(used) / f64::from(stats.num_pages.max(1)));
            self.offload_usage.set(f64::from(stats.num_slots_held) / f64::from(stats.num_slots.max(1)));
            for (counter, value) in &self.engine {
                counter.inc_by(value(stats).saturating_sub(counter.get()));
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory");
        text
    }

    pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_every_name_with_its_model() {
        let metrics = Metrics::new("demo", "1.2.3");
        metrics.http.with_label_values(&["/health", "200"]).inc();
        metrics.first_token.observe(0.5);
        let text = String::from_utf8(metrics.text(None)).unwrap();
        for line in [
            "tsruntime:build_info{version=\"1.2.3\",model_name=\"demo\"} 1",
            "tsruntime:num_requests_running{model_name=\"demo\"} 0",
            "tsruntime:prompt_tokens_total{model_name=\"demo\"} 0",
            "tsruntime:http_requests_total{path=\"/health\",status=\"200\",model_name=\"demo\"} 1",
            "tsruntime:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.512\"} 1",
            "tsruntime:time_to_first_token_seconds_count{model_name=\"demo\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
