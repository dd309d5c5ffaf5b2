//! `tsruntime generate`.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use serde::ser::{Serialize, SerializeSeq, Serializer};
use serde_json::{Value, json};

use super::{block_on, lines, ms, rate};
use crate::cli::GenerateArgs;
use crate::engine::{EngineError, Event, Finish, Token};
use crate::error::{ApiError, Failure};
use crate::model::{Model, random_seed};
use crate::output::{Delta, FinishReason, Output};
use crate::request::{self, GenerateRequest};
use crate::run::Run;

pub fn generate(arguments: &GenerateArgs, started: Instant) -> Result<(), Failure> {
    let model = Arc::new(Model::load(&arguments.plan, &arguments.engine.options())?);
    if arguments.jsonl {
        return lines::serve(&model, started);
    }
    let start_ms = ms(started.elapsed());
    // The flags go through the same checks as a server's requests.
    let (_, request) = request::offline(body(arguments), &model.limits)?;
    let mut out = io::stdout().lock();
    let show = |text: &str| match arguments.json {
        true => Ok(()),
        false => out.write_all(text.as_bytes()).and_then(|()| out.flush()),
    };
    let answer = block_on(async { Ok(complete(&model, &request, show).await?) })?;
    // Whoever read the text has seen enough.
    let Some(answer) = answer else { return Ok(()) };
    if arguments.json {
        let mut timing = answer.timing();
        timing["start_ms"] = start_ms.into();
        serde_json::to_writer(&mut out, &answer.body(timing)).map_err(io::Error::from)?;
    }
    writeln!(out)?;
    Ok(())
}

/// The request that the flags describe, as the body of an offline line.
fn body(arguments: &GenerateArgs) -> Value {
    let mut body = json!({
        "max_tokens": arguments.max_tokens, "temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p,
        "min_p": arguments.min_p, "repetition_penalty": arguments.repetition_penalty, "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty, "seed": arguments.seed, "stop": arguments.stop,
        "stop_token_ids": arguments.stop_token_id, "ignore_eos": arguments.ignore_eos, "logprobs": arguments.logprobs,
    });
    match (&arguments.prompt, &arguments.ids) {
        (Some(text), _) if arguments.chat => body["messages"] = json!([{"role": "user", "content": text}]),
        (Some(text), _) => {
            body["prompt"] = text.as_str().into();
            body["add_special_tokens"] = (!arguments.no_special_tokens).into();
        }
        (None, ids) => body["prompt"] = ids.as_deref().unwrap_or_default().into(),
    }
    body
}

/// A whole answer to one offline request.
pub struct Answer {
    prompt_ids: Arc<[i32]>,
    tokens: Vec<Token>,
    text: String,
    finish: FinishReason,
    logprobs: bool,
    num_cached: u32,
    submitted: Instant,
    first: Instant,
    last: Instant,
}

/// Generates one output; `show` gets its text as it grows. None if it could not be shown: nobody is there any more.
pub async fn complete(
    model: &Model,
    request: &GenerateRequest,
    mut show: impl FnMut(&str) -> io::Result<()>,
) -> Result<Option<Answer>, ApiError> {
    let GenerateRequest { prompts, params, .. } = request;
    let tokens = model.tokens(&prompts[0], params.max_tokens)?;
    let seed = params.sampling.seed.unwrap_or_else(random_seed);
    let mut output = Output::new(model.tokenizer(), params, model.stop_tokens(params));
    let mut run = Run::new(model.engine);
    let submitted = Instant::now();
    run.submit(&model.request(&tokens, params, seed, 0))?;
    let mut answer = Answer {
        prompt_ids: tokens.ids,
        tokens: Vec::new(),
        text: String::new(),
        finish: FinishReason::Length,
        logprobs: params.logprobs.is_some(),
        num_cached: 0,
        submitted,
        first: submitted,
        last: submitted,
    };
    while let Some((_, event)) = run.next().await {
        let Delta { text, finish, .. } = match event {
            Event::Token(token) => {
                answer.last = Instant::now();
                if answer.tokens.is_empty() {
                    answer.first = answer.last;
                }
                answer.tokens.push(token.clone());
                output.token(token)
            }
            Event::Finished(finish) => match (output.finished(&finish), finish) {
                (Some(delta), _) => delta,
                (None, Finish::Error(message)) => return Err(EngineError::Failed(message).into()),
                (None, Finish::TimedOut(message)) => return Err(EngineError::TimedOut(message).into()),
                (None, _) => return Err(EngineError::Closed.into()),
            },
        };
        if show(&text).is_err() {
            return Ok(None);
        }
        answer.text += &text;
        if let Some(finish) = finish {
            answer.finish = finish;
            break;
        }
    }
    answer.num_cached = output.num_cached;
    Ok(Some(answer))
}

impl Answer {
    pub fn timing(&self) -> Value {
        let num = self.tokens.len() as u64;
        let decode = self.last - self.first;
        json!({
            "first_token_ms": ms(self.first - self.submitted),
            "total_ms": ms(self.last - self.submitted),
            "decode_tokens_per_s": rate(num.saturating_sub(1), decode),
            "cached_tokens": self.num_cached,
        })
    }

    pub fn body(&self, timing: Value) -> impl Serialize {
        AnswerBody { answer: self, timing }
    }
}

struct AnswerBody<'a> {
    answer: &'a Answer,
    timing: Value,
}

impl Serialize for AnswerBody<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let answer = self.answer;
        let ids: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("prompt_ids", &*answer.prompt_ids)?;
        map.serialize_entry("ids", &ids)?;
        map.serialize_entry("text", &answer.text)?;
        map.serialize_entry("finish_reason", answer.finish.name())?;
        if answer.logprobs {
            map.serialize_entry("logprobs", &Tops(&answer.tokens))?;
            let own: Vec<f32> = answer.tokens.iter().map(|token| token.logprob).collect();
            map.serialize_entry("token_logprobs", &own)?;
        } else {
            map.serialize_entry("logprobs", &())?;
        }
        map.serialize_entry("timing", &self.timing)?;
        map.end()
    }
}

/// For each token, `[id, logprob]` of the most likely ones. Written as it is: with a whole vocabulary a token these are megabytes.
struct Tops<'a>(&'a [Token]);

impl Serialize for Tops<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(self.0.len()))?;
        self.0.iter().try_for_each(|token| seq.serialize_element(&token.top))?;
        seq.end()
    }
}
