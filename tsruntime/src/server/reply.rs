//! Answers to /v1/chat/completions and /v1/completions: whole objects and the chunks of a stream.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::app::now;
use super::logprobs;
use crate::generation::Usage;
use crate::model::{Model, random_seed};
use crate::output::Delta;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    Chat,
    Completion,
}

/// What all parts of one answer have in common.
pub struct Reply {
    api: Api,
    model: Arc<Model>,
    id: String,
    created: u64,
    /// The name that the client used.
    name: String,
    logprobs: bool,
    /// Chunks carry `usage`, which is null in all but the last.
    include_usage: bool,
    /// For each output, the prompt's text if the client wants to have it back.
    echo: Vec<String>,
    /// For each output, characters told so far.
    offsets: Vec<usize>,
}

impl Reply {
    pub fn new(
        api: Api,
        model: Arc<Model>,
        name: String,
        logprobs: bool,
        include_usage: bool,
        echo: Vec<String>,
    ) -> Reply {
        let prefix = if api == Api::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:016x}{:016x}", random_seed(), random_seed());
        let offsets = echo.iter().map(|text| text.chars().count()).collect();
        Reply { api, model, id, created: now(), name, logprobs, include_usage, echo, offsets }
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.name,
            "system_fingerprint": self.model.fingerprint, "choices": choices,
        })
    }

    /// The first chunks of a stream: they tell the role, or the prompt.
    pub fn opening(&self) -> Vec<Value> {
        let chunk = |index: usize, echo: &String| match self.api {
            Api::Chat => {
                let delta = json!({"role": "assistant", "content": ""});
                Some(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
            }
            Api::Completion if echo.is_empty() => None,
            Api::Completion => Some(json!({"index": index, "text": echo, "logprobs": null, "finish_reason": null})),
        };
        let choices = self.echo.iter().enumerate().filter_map(|(index, echo)| chunk(index, echo));
        choices.map(|choice| self.chunk_of(vec![choice])).collect()
    }

    /// A chunk with what is new of one output.
    pub fn chunk(&mut self, index: usize, delta: &Delta) -> Value {
        let logprobs = if delta.tokens.is_empty() { Value::Null } else { self.logprobs(index, delta) };
        let finish = delta.finish.map(|finish| finish.name());
        let choice = match self.api {
            Api::Chat => {
                let mut new = Map::new();
                if !delta.text.is_empty() {
                    new.insert("content".into(), delta.text.as_str().into());
                }
                json!({"index": index, "delta": new, "logprobs": logprobs, "finish_reason": finish})
            }
            Api::Completion => {
                json!({"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish})
            }
        };
        self.chunk_of(vec![choice])
    }

    /// The last chunk, if the client asked for it.
    pub fn usage_chunk(&self, usage: &Usage) -> Option<Value> {
        self.include_usage.then(|| {
            let mut chunk = self.chunk_of(Vec::new());
            chunk["usage"] = usage.json();
            chunk
        })
    }

    fn chunk_of(&self, choices: Vec<Value>) -> Value {
        let object = if self.api == Api::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut chunk = self.envelope(object, choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// The whole answer: all that is new of every output, at once.
    pub fn whole(&mut self, outputs: &[Delta], usage: &Usage) -> Value {
        let mut choices = Vec::with_capacity(outputs.len());
        for (index, delta) in outputs.iter().enumerate() {
            let logprobs = self.logprobs(index, delta);
            let finish = delta.finish.map(|finish| finish.name());
            choices.push(match self.api {
                Api::Chat => {
                    let message = json!({"role": "assistant", "content": delta.text, "refusal": null});
                    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
                }
                Api::Completion => {
                    let text = self.echo[index].clone() + &delta.text;
                    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
                }
            });
        }
        let object = if self.api == Api::Chat { "chat.completion" } else { "text_completion" };
        let mut whole = self.envelope(object, choices);
        whole["usage"] = usage.json();
        whole
    }

    fn logprobs(&mut self, index: usize, delta: &Delta) -> Value {
        match self.api {
            _ if !self.logprobs => Value::Null,
            Api::Chat => logprobs::chat(&self.model, &delta.tokens),
            Api::Completion => logprobs::completion(&self.model, &delta.tokens, &mut self.offsets[index]),
        }
    }
}

impl Usage {
    fn json(&self) -> Value {
        let mut details = json!({"cached_tokens": self.cached_tokens});
        if self.restored_tokens > 0 {
            details["restored_tokens"] = json!(self.restored_tokens);
        }
        if let Some(miss) = self.miss {
            details["cache_miss"] = json!({"reason": miss.reason, "token": miss.token});
        }
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
        })
    }
}
