//! /v1/chat/completions and /v1/completions, whole and streamed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{self, Stream};

use super::app::{Active, App};
use super::reply::{Api, Reply};
use super::{auth, json_response, routes};
use crate::error::ApiError;
use crate::generation::{Generation, Step};
use crate::json;
use crate::model::{Model, Tokens};
use crate::output::Delta;
use crate::request::{self, GenerateRequest, Prompt, number_of};

/// A stream that has nothing to tell sends a comment this often, which finds out whether its client is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generate(app, request, Api::Chat).await
}

pub async fn completion(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generate(app, request, Api::Completion).await
}

async fn generate(app: Arc<App>, request: Request, api: Api) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let model = app.ready()?.clone();
    // From here on a drain waits for this request.
    let active = app.enter();
    let key = if app.api_keys.is_empty() { None } else { auth::bearer(request.headers()).map(|key| number_of(&key)) };
    let body = routes::read(&app, request, app.read_timeout).await?;
    let state = app.clone();
    let Started { reply, mut generation, stream } =
        off_thread(&app, move || start(&state, model, api, key, &body)).await?;
    generation = generation.measured(app.metrics.clone(), arrived);
    if stream { Ok(streamed(reply, generation, active)) } else { whole(reply, generation).await }
}

/// Runs what may take long on a thread where nobody else waits for it. Its result is dropped if the client is gone by then.
pub async fn off_thread<T: Send + 'static>(
    app: &App,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let _place = app.preparing.try_acquire().map_err(|_| ApiError::busy())?;
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::internal("preparing the request panicked")))
}

struct Started {
    reply: Reply,
    generation: Generation,
    stream: bool,
}

/// From a body to running sequences.
fn start(app: &App, model: Arc<Model>, api: Api, key: Option<u64>, body: &Bytes) -> Result<Started, ApiError> {
    let parse = if api == Api::Chat { request::chat } else { request::completion };
    let GenerateRequest { model: asked, prompts, mut params } = parse(json::parse(body)?, &model.limits)?;
    params.tenant = key.unwrap_or(params.tenant);
    let name = app.name(asked.as_deref())?.to_owned();
    let tokens = prompts.iter().map(|prompt| model.tokens(prompt, params.max_tokens));
    let tokens: Vec<Tokens> = tokens.collect::<Result<_, _>>()?;
    let mut echo = Vec::with_capacity(prompts.len() * params.n as usize);
    for prompt in &prompts {
        let text = if params.echo { text_of(&model, prompt) } else { String::new() };
        echo.extend(std::iter::repeat_n(text, params.n as usize));
    }
    let generation = Generation::start(&model, &tokens, &params)?;
    let reply = Reply::new(api, model, name, params.logprobs.is_some(), params.include_usage, echo);
    Ok(Started { reply, generation, stream: params.stream })
}

fn text_of(model: &Model, prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text { text, .. } => text.clone(),
        Prompt::Ids(ids) => model.decode(ids, true),
        // Only completions are echoed.
        Prompt::Chat(_) => String::new(),
    }
}

/// Waits for all outputs. A client that goes away drops this future, and with it the generation, which cancels.
async fn whole(mut reply: Reply, mut generation: Generation) -> Result<Response, ApiError> {
    let mut outputs: Vec<Delta> = (0..generation.num_outputs()).map(|_| Delta::default()).collect();
    while let Some(step) = generation.next().await {
        let (index, delta) = step?;
        outputs[index].extend(delta);
    }
    Ok(json_response(StatusCode::OK, &reply.whole(&outputs, &generation.usage())))
}

fn streamed(reply: Reply, generation: Generation, active: Active) -> Response {
    let events = Events { queue: VecDeque::new(), opened: false, reply, generation: Some(generation), _active: active };
    let mut response = Sse::new(events.stream()).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Proxies that gather what they pass on: not this.
    response.headers_mut().insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// A stream's events. Nothing is taken from the generation before the client has room for it.
struct Events {
    queue: VecDeque<String>,
    opened: bool,
    reply: Reply,
    /// None once all is in the queue.
    generation: Option<Generation>,
    _active: Active,
}

impl Events {
    fn stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut events| async move {
            let data = events.next().await?;
            Some((Ok(Event::default().data(data)), events))
        })
    }

    async fn next(&mut self) -> Option<String> {
        if !self.opened {
            self.opened = true;
            self.queue.extend(self.reply.opening().iter().map(ToString::to_string));
        }
        while self.queue.is_empty() {
            let generation = self.generation.as_mut()?;
            match generation.next().await {
                Some(step) => self.take(step),
                None => {
                    let usage = self.reply.usage_chunk(&generation.usage());
                    self.queue.extend(usage.map(|chunk| chunk.to_string()));
                    self.queue.push_back("[DONE]".into());
                    self.generation = None;
                }
            }
        }
        self.queue.pop_front()
    }

    /// Queues a step and all that came with it: a client that reads slowly gets fewer, longer chunks.
    fn take(&mut self, first: Step) {
        let Some(generation) = &mut self.generation else { return };
        let mut news: Vec<(usize, Delta)> = Vec::new();
        let mut failed = None;
        let mut next = Some(first);
        while let Some(step) = next {
            match step {
                Ok((index, delta)) => match news.iter_mut().find(|(of, _)| *of == index) {
                    Some((_, earlier)) => earlier.extend(delta),
                    None => news.push((index, delta)),
                },
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
            next = generation.try_next();
        }
        self.queue.extend(news.iter().map(|(index, delta)| self.reply.chunk(*index, delta).to_string()));
        if let Some(error) = failed {
            self.queue.push_back(ApiError::from(error).body().to_string());
            self.generation = None;
        }
    }
}
