//! All sequences of one request, from submission to their last token.

use std::sync::Arc;
use std::time::Instant;

use crate::engine::{EngineError, Event, Finish, Miss};
use crate::metrics::Metrics;
use crate::model::{Model, Tokens, random_seed};
use crate::output::{Delta, Output};
use crate::request::Params;
use crate::run::Run;

/// Token counts of one request, as OpenAI reports them: each prompt counts once, however many outputs it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cached_tokens: u64,
    /// Of these, brought back from the second tier.
    pub restored_tokens: u64,
    /// Why the prefix cache held no more of the prompt, if there is just one.
    pub miss: Option<Miss>,
}

/// Running sequences: those of the first prompt, then those of the second, ... Dropping it cancels what still runs.
pub struct Generation {
    run: Run,
    outputs: Vec<Output>,
    prompt_tokens: Vec<usize>,
    n: usize,
    meter: Option<Meter>,
}

/// What is measured of a request, as its client sees it.
struct Meter {
    metrics: Arc<Metrics>,
    arrived: Instant,
    /// When each output's first and last token came.
    tokens: Vec<Option<(Instant, Instant)>>,
}

/// An index of a sequence, and what is new.
pub type Step = Result<(usize, Delta), EngineError>;

impl Generation {
    /// Submits `params.n` sequences for each prompt, or none.
    pub fn start(model: &Model, prompts: &[Tokens], params: &Params) -> Result<Generation, EngineError> {
        let n = params.n as usize;
        let mut run = Run::new(model.engine);
        let mut outputs = Vec::with_capacity(prompts.len() * n);
        let stop_tokens = model.stop_tokens(params);
        let seed = params.sampling.seed.unwrap_or_else(random_seed);
        for prompt in prompts {
            for index in 0..n {
                run.submit(&model.request(prompt, params, seed, index))?;
                outputs.push(Output::new(model.tokenizer(), params, stop_tokens.clone()));
            }
        }
        let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).collect();
        Ok(Generation { run, outputs, prompt_tokens, n, meter: None })
    }

    /// Measures this request, which arrived at `arrived`.
    pub fn measured(mut self, metrics: Arc<Metrics>, arrived: Instant) -> Generation {
        self.prompt_tokens.iter().for_each(|&count| metrics.prompt_tokens.observe(count as f64));
        self.meter = Some(Meter { metrics, arrived, tokens: vec![None; self.outputs.len()] });
        self
    }

    pub fn num_outputs(&self) -> usize {
        self.outputs.len()
    }

    /// The next news of any sequence; None when all have ended.
    pub async fn next(&mut self) -> Option<Step> {
        loop {
            let (index, event) = self.run.next().await?;
            if let Some(step) = self.step(index, event) {
                return Some(step);
            }
        }
    }

    /// News that are there already.
    pub fn try_next(&mut self) -> Option<Step> {
        loop {
            let (index, event) = self.run.try_next()?;
            if let Some(step) = self.step(index, event) {
                return Some(step);
            }
        }
    }

    fn step(&mut self, index: usize, event: Event) -> Option<Step> {
        let output = &mut self.outputs[index];
        let delta = match event {
            Event::Token(token) => {
                if let Some(meter) = &mut self.meter {
                    meter.token(index);
                }
                let delta = output.token(token);
                if delta.finish.is_some() {
                    self.run.cancel(index);
                }
                delta
            }
            Event::Finished(finish) => match (output.finished(&finish), finish) {
                (Some(delta), _) => delta,
                (None, Finish::Error(message)) => return Some(Err(EngineError::Failed(message))),
                (None, Finish::TimedOut(message)) => return Some(Err(EngineError::TimedOut(message))),
                (None, _) => return Some(Err(EngineError::Closed)),
            },
        };
        if let (Some(reason), Some(meter)) = (delta.finish, &self.meter) {
            meter.finished(index, self.outputs[index].num_tokens, reason.name());
        }
        delta.tells().then_some(Ok((index, delta)))
    }

    pub fn usage(&self) -> Usage {
        let prompts = || self.outputs.iter().step_by(self.n);
        Usage {
            prompt_tokens: self.prompt_tokens.iter().map(|&count| count as u64).sum(),
            completion_tokens: self.outputs.iter().map(|output| u64::from(output.num_tokens)).sum(),
            cached_tokens: prompts().map(|output| u64::from(output.num_cached)).sum(),
            restored_tokens: prompts().map(|output| u64::from(output.num_restored)).sum(),
            miss: self.outputs.first().filter(|_| self.prompt_tokens.len() == 1).and_then(|output| output.miss),
        }
    }
}

impl Meter {
    fn token(&mut self, index: usize) {
        let now = Instant::now();
        let first = match self.tokens[index] {
            None => {
                self.metrics.first_token.observe((now - self.arrived).as_secs_f64());
                now
            }
            Some((first, last)) => {
                self.metrics.inter_token.observe((now - last).as_secs_f64());
                first
            }
        };
        self.tokens[index] = Some((first, now));
    }

    fn finished(&self, index: usize, num_tokens: u32, reason: &str) {
        let metrics = &self.metrics;
        metrics.request_latency.observe(self.arrived.elapsed().as_secs_f64());
        metrics.generation_tokens.observe(f64::from(num_tokens));
        metrics.finished.with_label_values(&[reason]).inc();
        if let (Some((first, last)), 2..) = (self.tokens[index], num_tokens) {
            metrics.time_per_token.observe((last - first).as_secs_f64() / f64::from(num_tokens - 1));
        }
    }
}
