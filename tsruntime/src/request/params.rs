//! The fields that all generating requests share.

use std::ops::RangeInclusive;

use serde_json::Value;

use super::{Limits, Params, Sampling, number_of, token_ids};
use crate::error::ApiError;
use crate::fields::{Fields, number, out_of_range, string, wrong};

const N_MAX: i64 = 128;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
const STOP_TOKENS_MAX: usize = 1024;
const SALT_BYTES_MAX: usize = 1024;
const LEASE_MS_MAX: i64 = 3_600_000;
const PRIORITIES: RangeInclusive<i64> = -8..=7;
const TIMEOUT_S: RangeInclusive<f64> = 0.001..=86_400.0;
const INT32_MAX: i64 = i32::MAX as i64;

/// Fields of OpenAI's API that change nothing about what is generated.
const HARMLESS: [&str; 7] =
    ["user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_retention"];

/// All but what prompts and logprobs look like.
pub fn common(fields: &mut Fields, limits: &Limits) -> Result<Params, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let cache_salt = cache_salt(fields)?;
    let timeout_s = fields.number("timeout", TIMEOUT_S)?.unwrap_or(0.0);
    let params = Params {
        max_tokens: fields.integer("max_tokens", 1..=INT32_MAX)?.map(|count| count as u32),
        sampling: sampling(fields, limits.vocab_size)?,
        stop: stop(fields)?,
        stop_token_ids: stop_token_ids(fields, limits)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        n: fields.integer("n", 1..=N_MAX)?.unwrap_or(1) as u32,
        logprobs: None,
        echo: false,
        skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
        include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        stream,
        include_usage: include_usage(fields, stream)?,
        tenant: if cache_salt.is_empty() { 0 } else { number_of(&cache_salt) },
        cache_salt,
        priority: fields.integer("priority", PRIORITIES)?.unwrap_or(0) as i32,
        timeout_ms: (f64::from(timeout_s) * 1e3).round() as u32,
        lease_ms: fields.integer("lease_ms", 0..=LEASE_MS_MAX)?.unwrap_or(0) as u32,
        prompt_cache_key: fields.string("prompt_cache_key")?.unwrap_or_default(),
    };
    if params.lease_ms > 0 && params.prompt_cache_key.is_empty() {
        let message = "`lease_ms` is set; a `prompt_cache_key` that names the session is wanted with it";
        return Err(ApiError::field("lease_ms", "invalid_value", message));
    }
    fields.ignore(&HARMLESS);
    unsupported(fields)?;
    Ok(params)
}

pub fn sampling(fields: &mut Fields, vocab_size: u32) -> Result<Sampling, ApiError> {
    // -1 and 0 both mean off, as elsewhere.
    let top_k = fields.integer("top_k", -1..=INT32_MAX)?.unwrap_or(0).max(0);
    // 0 keeps the most likely token alone, as the smallest positive number does.
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0).max(f32::MIN_POSITIVE);
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_k: top_k as i32,
        top_p,
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
        logit_bias: logit_bias(fields, vocab_size)?,
    })
}

fn logit_bias(fields: &mut Fields, vocab_size: u32) -> Result<Vec<(i32, f32)>, ApiError> {
    let biases = fields.object("logit_bias")?.unwrap_or_default();
    let mut pairs = Vec::with_capacity(biases.len());
    for (key, value) in &biases {
        let path = format!("logit_bias.{key}");
        // A second spelling of an id ("7" and "07") would be a second bias for it.
        let id = key.parse().ok().filter(|id: &u32| *id < vocab_size && id.to_string() == *key);
        let id = id.ok_or_else(|| {
            let message =
                format!("`logit_bias` has the key {key:?}; a token id from 0 to {} is wanted", vocab_size - 1);
            ApiError::field("logit_bias", "invalid_value", message)
        })?;
        pairs.push((id as i32, number(value, &path, -100.0..=100.0)?));
    }
    Ok(pairs)
}

fn cache_salt(fields: &mut Fields) -> Result<String, ApiError> {
    let Some(salt) = fields.string("cache_salt")? else { return Ok(String::new()) };
    if salt.is_empty() || salt.len() > SALT_BYTES_MAX {
        let message = format!("`cache_salt` has {} bytes; 1 to {SALT_BYTES_MAX} are wanted", salt.len());
        return Err(ApiError::field("cache_salt", "invalid_value", message));
    }
    Ok(salt)
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(items)) => {
            let one = |(i, item)| string(item, &format!("stop[{i}]"));
            items.into_iter().enumerate().map(one).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong("stop", &other, "a string or an array of strings")),
    };
    if stops.len() > STOPS_MAX {
        let message = format!("`stop` has {} strings; at most {STOPS_MAX} are wanted", stops.len());
        return Err(ApiError::field("stop", "invalid_value", message));
    }
    if let Some(stop) = stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        let message = format!("`stop` has a string of {} bytes; 1 to {STOP_BYTES_MAX} are wanted", stop.len());
        return Err(ApiError::field("stop", "invalid_value", message));
    }
    Ok(stops)
}

fn stop_token_ids(fields: &mut Fields, limits: &Limits) -> Result<Vec<i32>, ApiError> {
    let items = fields.array("stop_token_ids")?.unwrap_or_default();
    if items.len() > STOP_TOKENS_MAX {
        let message = format!("`stop_token_ids` has {} ids; at most {STOP_TOKENS_MAX} are wanted", items.len());
        return Err(ApiError::field("stop_token_ids", "invalid_value", message));
    }
    token_ids(&items, "stop_token_ids", limits)
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        let message = "`stream_options` is set; `stream`: true is wanted with it";
        return Err(ApiError::field("stream_options", "invalid_value", message));
    }
    let mut options = Fields::of(options, "stream_options")?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.ignore(&["include_obfuscation"]);
    options.done()?;
    Ok(include_usage)
}

/// Fields that others serve and this server does not yet. Their place is here.
fn unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    let off = |value: &Value| matches!(value, Value::Bool(false)) || value.as_i64() == Some(0);
    fields.refuse("tools", empty)?;
    fields.refuse("functions", empty)?;
    fields.refuse("tool_choice", |choice| choice == "none" || choice == "auto")?;
    fields.refuse("function_call", |choice| choice == "none" || choice == "auto")?;
    if let Some(format) = fields.take("response_format") {
        let mut format = Fields::of(format, "response_format")?;
        let kind = format.take("type").unwrap_or_default();
        if kind != "text" {
            return Err(out_of_range("response_format.type", &kind, "\"text\", the only format of this server,"));
        }
        format.done()?;
    }
    fields.refuse("modalities", |kinds| kinds == &Value::from(vec!["text"]))?;
    fields.refuse("verbosity", |verbosity| verbosity == "medium")?;
    fields.refuse("length_penalty", |penalty| penalty.as_f64() == Some(1.0))?;
    for name in ["min_tokens", "prompt_logprobs", "use_beam_search", "truncate_prompt_tokens", "return_token_ids"] {
        fields.refuse(name, off)?;
    }
    for name in [
        "audio",
        "prediction",
        "reasoning_effort",
        "web_search_options",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "documents",
    ] {
        fields.refuse(name, |_| false)?;
    }
    Ok(())
}
