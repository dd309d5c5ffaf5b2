//! A loaded plan: engine, text and the facts that requests are checked against.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;
use tsruntime_text::{DecodeOptions, EncodeOptions, TemplateError, Text, Tokenizer};

use crate::engine::{self, Engine};
use crate::error::{ApiError, Exit, Failure};
use crate::ffi::ts_logit_bias;
use crate::plan::Plan;
use crate::ranks;
use crate::request::{Limits, Params, Prompt, number_of};

/// The part of `tsp/manifest` that the front reads; the engine has checked all of it.
#[derive(Debug, Deserialize)]
struct Manifest {
    model: ModelFacts,
}

#[derive(Debug, Deserialize)]
struct ModelFacts {
    name: String,
    vocab_size: u32,
    eos_token_ids: Vec<i32>,
}

pub struct Model {
    pub engine: &'static Engine,
    /// None for a plan without: token ids in, token ids out.
    pub text: Option<Text>,
    /// What the manifest calls the model.
    pub name: String,
    pub limits: Limits,
    /// Names this build: the same plan and target give the same bits.
    pub fingerprint: String,
    eos_token_ids: Vec<i32>,
    token_bytes_max: usize,
    /// Control tokens in what users write are plain text.
    plain_users: bool,
}

/// What [`Model::load`] is told.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    pub engine: engine::Options,
    pub always_verify: bool,
    pub plain_users: bool,
}

/// Requests that wait, unless the options say otherwise: the engine's own default.
pub const MAX_QUEUE: usize = 1024;

/// A prompt as the engine takes it.
pub struct Tokens {
    pub ids: Arc<[i32]>,
    /// Output tokens that may follow.
    pub max_tokens: u32,
}

impl Model {
    /// Opens a plan. The tokenizer is read while the engine maps and checks the weights.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Model, Failure> {
        let plan = Plan::open(path, options.always_verify)?;
        let bad = |message: String| Failure::new(Exit::Plan, format!("{}: {message}", path.display()));
        let manifest = plan.entry("tsp/manifest").ok_or_else(|| bad("the plan has no manifest".into()))?;
        let manifest: Manifest =
            serde_json::from_slice(&manifest).map_err(|error| bad(format!("its manifest: {error}")))?;
        let engine_options = ranks::started(path, &plan, options)?;
        let (engine, text) = std::thread::scope(|scope| {
            let text = scope.spawn(|| open_text(&plan));
            let engine = Engine::open(&plan, &engine_options);
            (engine, text.join().unwrap_or_else(|_| Err("opening its text panicked".into())))
        });
        let (engine, text) = (engine?, text.map_err(bad)?);
        if plan.num_ranks() > 1 {
            ranks::opened(engine, &engine_options);
        }
        let ModelFacts { name, vocab_size, eos_token_ids } = manifest.model;
        let stats = engine.stats();
        let seal = plan.entry("tsp/seal").unwrap_or_default();
        let seal: String = seal.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
        let sequences = usize::try_from(options.engine.max_queue).ok().filter(|&queue| queue > 0).unwrap_or(MAX_QUEUE);
        Ok(Model {
            engine,
            name,
            limits: Limits { vocab_size, context: stats.context(), sequences },
            fingerprint: format!("fp_{seal}_{}", stats.target_name()),
            eos_token_ids,
            token_bytes_max: text.as_ref().map_or(1, |text| text.tokenizer().token_bytes_max().max(1)),
            plain_users: options.plain_users,
            text,
        })
    }

    /// Token ids of a prompt, and how many may follow them. Takes milliseconds for long texts, and blocks while a chat is rendered.
    pub fn tokens(&self, prompt: &Prompt, max_tokens: Option<u32>) -> Result<Tokens, ApiError> {
        let param = if matches!(prompt, Prompt::Chat(_)) { "messages" } else { "prompt" };
        let ids: Arc<[i32]> = self.encode(prompt)?.into();
        if ids.is_empty() {
            return Err(ApiError::field(
                param,
                "invalid_value",
                format!("`{param}` is empty; at least one token is wanted"),
            ));
        }
        let (num, context) = (ids.len(), self.limits.context as usize);
        if num >= context {
            return Err(self.too_long(param, &format!("{num} tokens")));
        }
        let room = (context - num) as u32;
        let max_tokens = max_tokens.unwrap_or(room);
        if max_tokens > room {
            let total = num + max_tokens as usize;
            let message = format!(
                "the prompt has {num} tokens and max_tokens asks for {max_tokens} more, together {total}, but the context holds {context}: \
                 shorten the prompt or lower max_tokens"
            );
            return Err(ApiError::field("max_tokens", "context_length_exceeded", message));
        }
        Ok(Tokens { ids, max_tokens })
    }

    /// Token ids of a prompt, however many.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<i32>, ApiError> {
        let ids = match prompt {
            Prompt::Ids(ids) => return Ok(ids.clone()),
            Prompt::Text { text, add_special_tokens } => {
                self.check_bytes("prompt", text.len())?;
                let options = EncodeOptions { add_special_tokens: *add_special_tokens, ..EncodeOptions::default() };
                self.text()?.tokenizer().encode(text, &options)
            }
            Prompt::Chat(chat) => self.text()?.render_ids(chat, self.plain_users).map_err(|error| match error {
                TemplateError::Process(_) => ApiError::internal(error.to_string()),
                TemplateError::Raised(message) => {
                    let message = format!("the chat template refuses these messages: {message}");
                    ApiError::field("messages", "invalid_value", message)
                }
                other => ApiError::field("messages", "invalid_value", other.to_string()),
            })?,
        };
        Ok(ids.into_iter().map(u32::cast_signed).collect())
    }

    fn text(&self) -> Result<&Text, ApiError> {
        self.text.as_ref().ok_or_else(|| {
            let message = "this plan was built without a tokenizer: send token ids, to /v1/completions";
            ApiError::bad_request("unsupported_value", message)
        })
    }

    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.text.as_ref().map(Text::tokenizer)
    }

    /// The text of token ids; empty without a tokenizer.
    pub fn decode(&self, ids: &[i32], skip_special_tokens: bool) -> String {
        let ids: Vec<u32> = ids.iter().map(|id| id.cast_unsigned()).collect();
        let options = DecodeOptions { skip_special_tokens, continues: false };
        self.tokenizer().map_or(String::new(), |tokenizer| tokenizer.decode(&ids, options))
    }

    /// The text of one token, and its bytes. A part of a character is U+FFFD; without a tokenizer its id stands for it.
    pub fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self
            .tokenizer()
            .map_or_else(|| format!("token_id:{id}").into_bytes(), |tokenizer| tokenizer.token_bytes(id));
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }

    /// A text that cannot fit, whatever its tokens are, is not worth encoding.
    fn check_bytes(&self, param: &str, bytes: usize) -> Result<(), ApiError> {
        let least = bytes / self.token_bytes_max;
        if least > self.limits.context as usize {
            return Err(self.too_long(param, &format!("{bytes} bytes, at least {least} tokens")));
        }
        Ok(())
    }

    fn too_long(&self, param: &str, found: &str) -> ApiError {
        let message = format!(
            "the prompt has {found}, but the context holds {}, with at least one for the output: shorten the prompt",
            self.limits.context
        );
        ApiError::field(param, "context_length_exceeded", message)
    }

    /// The tokens that end an output, ascending.
    pub fn stop_tokens(&self, params: &Params) -> Arc<[i32]> {
        let mut ids = params.stop_token_ids.clone();
        if !params.ignore_eos {
            ids.extend(&self.eos_token_ids);
        }
        ids.sort_unstable();
        ids.dedup();
        ids.into()
    }

    /// The engine's request for one sequence: the `index`th of its HTTP request, whose seed it varies.
    pub fn request(&self, tokens: &Tokens, params: &Params, seed: u64, index: usize) -> engine::Request {
        let sampling = &params.sampling;
        let bias = |&(token, bias): &(i32, f32)| ts_logit_bias { token, bias };
        engine::Request {
            prompt: tokens.ids.clone(),
            max_tokens: tokens.max_tokens as i32,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: seed.wrapping_add(index as u64),
            logit_bias: sampling.logit_bias.iter().map(bias).collect(),
            stop_tokens: params.stop_token_ids.as_slice().into(),
            ignore_eos: params.ignore_eos,
            num_logprobs: params.logprobs.map_or(-1, |count| count as i32),
            cache_salt: params.cache_salt.as_str().into(),
            lease_ms: params.lease_ms as i32,
            session: session(params, index),
            tenant: params.tenant,
            priority: params.priority,
            timeout_ms: params.timeout_ms as i32,
        }
    }
}

/// The plan's text, if it has one. Errors say what is wrong with it.
fn open_text(plan: &Arc<Plan>) -> Result<Option<Text>, String> {
    let Some(tokenizer) = plan.entry("tsp/text/tokenizer") else { return Ok(None) };
    let template = plan.entry("tsp/text/template").unwrap_or_default();
    let worker = ["/proc/self/exe", "text", "worker"].map(OsString::from).to_vec();
    Text::open(tokenizer, &template, worker).map(Some).map_err(|error| error.to_string())
}

/// What names a session to the engine: another for each tenant, and for each sequence of a request; 0 for none.
fn session(params: &Params, index: usize) -> u64 {
    if params.prompt_cache_key.is_empty() {
        return 0;
    }
    number_of(&(&params.cache_salt, &params.prompt_cache_key, index))
}

/// A seed for a request that names none.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(Instant::now())
}
