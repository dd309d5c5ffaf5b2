//! Paths and what they do.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::app::App;
use super::{auth, body, generate, json_response};
use crate::error::ApiError;
use crate::json;
use crate::metrics::Metrics;
use crate::model::Model;
use crate::request;

pub fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route_layer(middleware::from_fn_with_state(app.clone(), auth::require_key));
    Router::new()
        .merge(guarded)
        .route("/health", get(|| async { status("ok") }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(|| async { ok(&json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), count))
        .with_state(app)
}

fn ok(body: &Value) -> Response {
    json_response(StatusCode::OK, body)
}

fn status(status: &str) -> Response {
    ok(&json!({"status": status}))
}

async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    // Not the client's words: they would be labels without bound.
    let path = request.extensions().get::<MatchedPath>().map_or("other".into(), |path| path.as_str().to_owned());
    let response = next.run(request).await;
    app.metrics.http.with_label_values(&[path.as_str(), response.status().as_str()]).inc();
    response
}

async fn not_found(request: Request) -> ApiError {
    let message = format!(
        "there is no {} {}; see /v1/models, /v1/chat/completions, /v1/completions",
        request.method(),
        request.uri().path()
    );
    ApiError::new(StatusCode::NOT_FOUND, Some("unknown_url"), message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
}

async fn ready(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.ready().map(|_| status("ready"))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let stats = app.model().map(|model| model.engine.stats());
    ([(header::CONTENT_TYPE, Metrics::CONTENT_TYPE)], app.metrics.text(stats.as_ref())).into_response()
}

fn card(app: &App, model: &Model, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": app.created, "owned_by": "tsruntime", "root": model.name,
        "parent": null, "max_model_len": model.limits.context,
    })
}

async fn models(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let model = app.ready()?;
    let cards: Vec<Value> = app.names().map(|name| card(&app, model, name)).collect();
    Ok(ok(&json!({"object": "list", "data": cards})))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, ApiError> {
    let model = app.ready()?;
    Ok(ok(&card(&app, model, app.name(Some(&name))?)))
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let body = read(&app, request, app.read_timeout).await?;
    let (state, model) = (app.clone(), app.ready()?.clone());
    generate::off_thread(&app, move || {
        let (asked, prompt, strings) = request::tokenize(json::parse(&body)?)?;
        state.name(asked.as_deref())?;
        let ids = model.encode(&prompt)?;
        let text = |&id: &i32| model.token_text(id.cast_unsigned()).0;
        let strings = strings.then(|| ids.iter().map(text).collect::<Vec<_>>());
        Ok(ok(&json!({
            "count": ids.len(), "max_model_len": model.limits.context, "tokens": ids, "token_strs": strings,
        })))
    })
    .await
}

async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let body = read(&app, request, app.read_timeout).await?;
    let (state, model) = (app.clone(), app.ready()?.clone());
    generate::off_thread(&app, move || {
        let (asked, ids) = request::detokenize(json::parse(&body)?, &model.limits)?;
        state.name(asked.as_deref())?;
        Ok(ok(&json!({"prompt": model.decode(&ids, false)})))
    })
    .await
}

pub async fn read(app: &App, request: Request, timeout: Duration) -> Result<bytes::Bytes, ApiError> {
    body::read(request, app.body_bytes_max, timeout).await
}
