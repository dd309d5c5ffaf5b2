//! One turn over HTTP, timed.

use std::time::{Duration, Instant};

use eventsource_stream::Eventsource;
use futures_util::StreamExt;
use reqwest::{RequestBuilder, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::AgentError;
use crate::args::AgentArgs;
use crate::workload::code;

/// Characters that tell how many of them a token takes.
const SAMPLE_CHARACTERS: usize = 4_000;

/// An OpenAI-compatible server.
pub struct Endpoint {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
    timeout: Duration,
    ignore_eos: bool,
    pub model: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct Message {
    pub role: &'static str,
    pub content: String,
}

/// What one turn gave, and when.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub text: String,
    pub prompt_tokens: u64,
    /// None if the server does not say.
    pub cached_tokens: Option<u64>,
    pub output_tokens: u64,
    /// From the request to its first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub rest: Duration,
}

impl Endpoint {
    pub async fn connect(arguments: &AgentArgs) -> Result<Endpoint, AgentError> {
        let url = arguments.url.trim_end_matches('/').to_owned();
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(AgentError::Usage(format!("--url {url}: wanted http://HOST:PORT/v1 or https://HOST/v1")));
        }
        let http = reqwest::Client::builder().no_proxy().build().map_err(|error| failed(&url, &error))?;
        let mut endpoint = Endpoint {
            http,
            url,
            key: arguments.api_key.clone(),
            timeout: Duration::from_secs_f64(arguments.timeout),
            ignore_eos: !arguments.stop_at_eos,
            model: String::new(),
        };
        endpoint.model = match &arguments.model {
            Some(model) => model.clone(),
            None => endpoint.first_model().await?,
        };
        Ok(endpoint)
    }

    async fn first_model(&self) -> Result<String, AgentError> {
        let models = self.json(self.http.get(format!("{}/models", self.url))).await.map_err(AgentError::Failed)?;
        let first = models["data"][0]["id"].as_str().map(ToOwned::to_owned);
        first.ok_or_else(|| AgentError::Failed(format!("{} lists no model: name one with --model", self.url)))
    }

    /// Of code, as the server's tokenizer sees it: the count that it reports for a sample.
    pub async fn characters_per_token(&self) -> Result<f64, AgentError> {
        let body = |content: String| json!({"model": self.model, "max_tokens": 1, "messages": [{"role": "user", "content": content}]});
        let samples = [code(0, SAMPLE_CHARACTERS / 2), code(0, SAMPLE_CHARACTERS)];
        let characters = samples[1].len() - samples[0].len();
        let mut tokens = [0.0; 2];
        for (tokens, sample) in tokens.iter_mut().zip(samples) {
            let url = format!("{}/chat/completions", self.url);
            let answer = self.json(self.http.post(url).json(&body(sample))).await;
            *tokens = answer.map_err(AgentError::Failed)?["usage"]["prompt_tokens"].as_f64().unwrap_or(0.0);
        }
        // The difference leaves out what the chat template adds.
        let tokens = tokens[1] - tokens[0];
        if tokens < 1.0 {
            return Err(AgentError::Failed(format!("{} does not report usage.prompt_tokens", self.url)));
        }
        Ok(characters as f64 / tokens)
    }

    /// Streams the answer to a conversation; what went wrong in one line.
    pub async fn answer(&self, messages: &[Message], output_tokens: u32) -> Result<Answer, String> {
        let mut body = json!({
            "model": self.model, "messages": messages, "max_tokens": output_tokens, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true},
        });
        if self.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        let sent = Instant::now();
        let request = self.http.post(format!("{}/chat/completions", self.url)).json(&body).timeout(self.timeout);
        let response = self.send(request).await?;
        let mut answer = Answer::default();
        let (mut first, mut last, mut chunks) = (None, sent, 0);
        let mut events = response.bytes_stream().eventsource();
        while let Some(event) = events.next().await {
            let event = event.map_err(|error| format!("the stream broke off: {error}"))?;
            if event.data == "[DONE]" {
                let first = first.ok_or("the answer is empty")?;
                if answer.output_tokens == 0 {
                    answer.output_tokens = chunks;
                }
                answer.first_token = first - sent;
                answer.rest = last - first;
                return Ok(answer);
            }
            let chunk: Value = serde_json::from_str(&event.data).map_err(|error| format!("not JSON: {error}"))?;
            if let Some(error) = chunk.get("error") {
                return Err(format!("the server gave up: {}", error["message"].as_str().unwrap_or("no reason")));
            }
            if let Some(text) = text_of(&chunk) {
                last = Instant::now();
                first.get_or_insert(last);
                chunks += 1;
                answer.text += text;
            }
            answer.note_usage(&chunk["usage"]);
        }
        Err("the stream ended before [DONE]".into())
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Response, String> {
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(|error| failed(&self.url, &error).to_string())?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body: Value = response.json().await.unwrap_or_default();
        Err(format!("{status}: {}", body["error"]["message"].as_str().unwrap_or("no reason given")))
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, String> {
        let response = self.send(request.timeout(self.timeout)).await?;
        response.json().await.map_err(|error| format!("{}: not JSON: {error}", self.url))
    }
}

/// What a chunk adds to the answer, reasoning included.
fn text_of(chunk: &Value) -> Option<&str> {
    let delta = &chunk["choices"][0]["delta"];
    ["content", "reasoning_content"].iter().find_map(|key| delta[key].as_str()).filter(|text| !text.is_empty())
}

impl Answer {
    fn note_usage(&mut self, usage: &Value) {
        if let Some(tokens) = usage["prompt_tokens"].as_u64() {
            self.prompt_tokens = tokens;
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
            self.output_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
        }
    }

    /// From one token to the next, on average; None for answers of one token.
    pub fn seconds_per_token(&self) -> Option<f64> {
        (self.output_tokens > 1).then(|| self.rest.as_secs_f64() / (self.output_tokens - 1) as f64)
    }
}

/// reqwest's own words end where the reason begins.
fn failed(url: &str, error: &reqwest::Error) -> AgentError {
    let mut reason: &dyn std::error::Error = error;
    while let Some(source) = reason.source() {
        reason = source;
    }
    AgentError::Failed(if error.is_timeout() {
        format!("{url}: no answer in time")
    } else {
        format!("{url}: {reason}")
    })
}
