//! What a client asks for: JSON of /v1/completions, /v1/chat/completions and of offline generation, checked field by field.
//!
//! The types are our own, not openai-protocol's: those keep unknown fields, take several spellings of one field, and their errors name neither
//! the field nor what was wanted. A field that this server cannot honour must be refused, not dropped.

mod chat;
mod params;

use serde_json::Value;
use std::hash::{DefaultHasher, Hash, Hasher};
use tsruntime_text::Chat;

use crate::error::ApiError;
use crate::fields::{Fields, integer, string, wrong};
use params::{common, sampling};

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub vocab_size: u32,
    /// Tokens of prompt and output together.
    pub context: u32,
    /// Sequences that one request may ask for: prompts times n.
    pub sequences: usize,
}

#[derive(Debug, Clone)]
pub enum Prompt {
    Text { text: String, add_special_tokens: bool },
    Ids(Vec<i32>),
    Chat(Box<Chat>),
}

/// How to generate, and what to tell of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// None: as many as the context holds.
    pub max_tokens: Option<u32>,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<i32>,
    pub ignore_eos: bool,
    pub n: u32,
    /// How many of the most likely tokens to tell with each token; None: no logprobs at all.
    pub logprobs: Option<u32>,
    pub echo: bool,
    pub skip_special_tokens: bool,
    pub include_stop: bool,
    pub stream: bool,
    pub include_usage: bool,
    /// The tenant's: only requests of the same salt find each other's prompts in the prefix cache. Empty: none.
    pub cache_salt: String,
    /// How long the prefix cache keeps what a session has computed, for its next turn, and what names the session.
    pub lease_ms: u32,
    pub prompt_cache_key: String,
    /// Whose share of the engine it uses: that of its salt, unless the server knows whose API key it has. 0: of all that have neither.
    pub tenant: u64,
    /// As vLLM's: the lower one goes first.
    pub priority: i32,
    /// 0: none.
    pub timeout_ms: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// None: a new one for each request.
    pub seed: Option<u64>,
    pub logit_bias: Vec<(i32, f32)>,
}

#[derive(Debug, Clone)]
pub struct GenerateRequest {
    pub model: Option<String>,
    pub prompts: Vec<Prompt>,
    pub params: Params,
}

/// Tokens of a completion that does not say how many: OpenAI's default, which clients count on.
const COMPLETION_TOKENS: u32 = 16;
/// The most likely tokens that a served request may ask for.
const LOGPROBS_MAX: i64 = 20;

/// The body of /v1/completions.
pub fn completion(body: Value, limits: &Limits) -> Result<GenerateRequest, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let mut params = common(&mut fields, limits)?;
    params.logprobs = fields.integer("logprobs", 0..=LOGPROBS_MAX)?.map(|count| count as u32);
    params.max_tokens.get_or_insert(COMPLETION_TOKENS);
    params.echo = fields.boolean("echo")?.unwrap_or(false);
    if params.echo && params.logprobs.is_some() {
        let message = "`echo` with `logprobs` asks for logprobs of the prompt, which are not supported by this server: leave one of them out";
        return Err(ApiError::field("echo", "unsupported_parameter", message));
    }
    let n = i64::from(params.n);
    fields.refuse("best_of", |best_of| best_of.as_i64() == Some(n))?;
    fields.refuse("suffix", |suffix| suffix == "")?;
    let request = GenerateRequest { model: fields.string("model")?, prompts: prompts(&mut fields, limits)?, params };
    check_count(&request, limits)?;
    fields.done()?;
    Ok(request)
}

/// The body of /v1/chat/completions.
pub fn chat(body: Value, limits: &Limits) -> Result<GenerateRequest, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let mut params = common(&mut fields, limits)?;
    let max_completion_tokens = fields.integer("max_completion_tokens", 1..=i64::from(i32::MAX))?;
    params.max_tokens = max_completion_tokens.map(|count| count as u32).or(params.max_tokens);
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=LOGPROBS_MAX)?;
    if top.is_some() && !logprobs {
        return Err(ApiError::field(
            "top_logprobs",
            "invalid_value",
            "`top_logprobs` is set; `logprobs`: true is wanted with it",
        ));
    }
    params.logprobs = logprobs.then_some(top.unwrap_or(0) as u32);
    let prompts = vec![Prompt::Chat(Box::new(chat::conversation(&mut fields)?))];
    let request = GenerateRequest { model: fields.string("model")?, prompts, params };
    check_count(&request, limits)?;
    fields.done()?;
    Ok(request)
}

/// One line of offline generation: a completion or, with `messages`, a chat; one sequence, as many logprobs as the vocabulary has tokens.
pub fn offline(body: Value, limits: &Limits) -> Result<(Value, GenerateRequest), ApiError> {
    let mut fields = Fields::of_body(body)?;
    let id = fields.take("id").unwrap_or(Value::Null);
    let mut params = common(&mut fields, limits)?;
    params.logprobs = fields.integer("logprobs", 0..=i64::from(limits.vocab_size))?.map(|count| count as u32);
    fields.refuse("n", |n| n.as_i64() == Some(1))?;
    if params.n != 1 || params.stream {
        return Err(ApiError::field(
            "n",
            "unsupported_parameter",
            "a line asks for one whole answer; `n` and `stream` are for the server",
        ));
    }
    let prompts = match fields.take("messages") {
        Some(messages) => vec![Prompt::Chat(Box::new(chat::conversation_of(messages, &mut fields)?))],
        None => {
            params.max_tokens.get_or_insert(COMPLETION_TOKENS);
            prompts(&mut fields, limits)?
        }
    };
    if prompts.len() != 1 {
        return Err(ApiError::field("prompt", "invalid_value", "a line holds one prompt; write a line for each"));
    }
    fields.done()?;
    Ok((id, GenerateRequest { model: None, prompts, params }))
}

fn check_count(request: &GenerateRequest, limits: &Limits) -> Result<(), ApiError> {
    let (prompts, n) = (request.prompts.len(), request.params.n);
    if prompts * n as usize > limits.sequences {
        let message = format!(
            "{prompts} prompts times `n` {n} are {} sequences; at most {} are taken in one request",
            prompts * n as usize,
            limits.sequences
        );
        return Err(ApiError::field("n", "invalid_value", message));
    }
    Ok(())
}

/// `prompt`: a text, texts, token ids, or lists of token ids.
fn prompts(fields: &mut Fields, limits: &Limits) -> Result<Vec<Prompt>, ApiError> {
    const WANTED: &str = "a text, a list of texts, a list of token ids or a list of such lists";
    let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let text = |text: String| Prompt::Text { text, add_special_tokens };
    let items = match fields.take("prompt") {
        None => {
            return Err(ApiError::field(
                "prompt",
                "missing_required_parameter",
                format!("`prompt` is missing; {WANTED} is wanted"),
            ));
        }
        Some(Value::String(one)) => return Ok(vec![text(one)]),
        Some(Value::Array(items)) if !items.is_empty() => items,
        Some(Value::Array(_)) => {
            return Err(ApiError::field("prompt", "invalid_value", "`prompt` is empty; at least one token is wanted"));
        }
        Some(other) => return Err(wrong("prompt", &other, WANTED)),
    };
    match &items[0] {
        Value::Number(_) => Ok(vec![Prompt::Ids(token_ids(&items, "prompt", limits)?)]),
        Value::String(_) => {
            items.into_iter().enumerate().map(|(i, item)| string(item, &format!("prompt[{i}]")).map(text)).collect()
        }
        Value::Array(_) => {
            let ids = |(i, item): (usize, Value)| match item {
                Value::Array(ids) => token_ids(&ids, &format!("prompt[{i}]"), limits).map(Prompt::Ids),
                other => Err(wrong(&format!("prompt[{i}]"), &other, "a list of token ids, like those before it,")),
            };
            items.into_iter().enumerate().map(ids).collect()
        }
        other => Err(wrong("prompt[0]", other, "a text, a token id or a list of token ids")),
    }
}

/// Token ids that the vocabulary has.
pub fn token_ids(items: &[Value], path: &str, limits: &Limits) -> Result<Vec<i32>, ApiError> {
    let range = 0..=i64::from(limits.vocab_size) - 1;
    let id = |(i, item)| match integer(item, "", range.clone()) {
        Ok(id) => Ok(id as i32),
        // The path is made only for an error: prompts are long.
        Err(_) => integer(item, &format!("{path}[{i}]"), range.clone()).map(|id| id as i32),
    };
    items.iter().enumerate().map(id).collect()
}

/// The body of /tokenize: the prompt, and whether the tokens' texts are wanted too.
pub fn tokenize(body: Value) -> Result<(Option<String>, Prompt, bool), ApiError> {
    let mut fields = Fields::of_body(body)?;
    let model = fields.string("model")?;
    let strings = fields.boolean("return_token_strs")?.unwrap_or(false);
    let prompt = match (fields.string("prompt")?, fields.take("messages")) {
        (Some(text), None) => {
            Prompt::Text { text, add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true) }
        }
        (None, Some(messages)) => Prompt::Chat(Box::new(chat::conversation_of(messages, &mut fields)?)),
        _ => {
            let message = "one of `prompt` (a text) and `messages` (a chat) is wanted";
            return Err(ApiError::field("prompt", "missing_required_parameter", message));
        }
    };
    fields.done()?;
    Ok((model, prompt, strings))
}

/// The body of /detokenize.
pub fn detokenize(body: Value, limits: &Limits) -> Result<(Option<String>, Vec<i32>), ApiError> {
    let mut fields = Fields::of_body(body)?;
    let model = fields.string("model")?;
    let Some(items) = fields.array("tokens")? else {
        let message = "`tokens` is missing; a list of token ids is wanted";
        return Err(ApiError::field("tokens", "missing_required_parameter", message));
    };
    let ids = token_ids(&items, "tokens", limits)?;
    fields.done()?;
    Ok((model, ids))
}

impl Sampling {
    /// What the OpenAI API does unless told otherwise.
    pub fn plain() -> Sampling {
        sampling(&mut Fields::of_body(Value::Object(Default::default())).expect("an object"), 1)
            .expect("nothing to refuse")
    }
}

/// A number that stands for a name; never 0.
pub fn number_of(name: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish().max(1)
}

#[cfg(test)]
mod tests;
