//! The routes over a server whose plan is still loading. What needs a model is tested from outside.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, Response};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;

use super::*;

fn app(api_keys: &[&str]) -> Arc<App> {
    Arc::new(App::new(&ServerOptions {
        plan: PathBuf::from("some/where/model.tsp"),
        host: String::new(),
        port: 0,
        names: Vec::new(),
        api_keys: api_keys.iter().map(|key| key.to_string()).collect(),
        load: LoadOptions::default(),
        body_bytes_max: 100,
        read_timeout: Duration::from_secs(1),
        write_timeout: Duration::from_secs(1),
        drain_timeout: Duration::from_secs(1),
    }))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn send(app: &Arc<App>, method: Method, path: &str) -> Response<Body> {
    let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
    let service = TowerToHyperService::new(routes::router(app.clone()));
    block_on(service.call(request)).unwrap()
}

fn body(response: Response<Body>) -> String {
    String::from_utf8(block_on(to_bytes(response.into_body(), usize::MAX)).unwrap().to_vec()).unwrap()
}

fn error(response: Response<Body>) -> Value {
    let mut body: Value = serde_json::from_str(&body(response)).unwrap();
    body["error"].take()
}

#[test]
fn it_lives_while_it_loads() {
    let app = app(&[]);
    let health = send(&app, Method::GET, "/health");
    assert_eq!((health.status(), body(health).as_str()), (StatusCode::OK, r#"{"status":"ok"}"#));
    for (method, path) in [(Method::GET, "/ready"), (Method::GET, "/v1/models"), (Method::POST, "/v1/completions")] {
        let response = send(&app, method, path);
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        assert_eq!(error(response)["code"], "loading");
    }
    app.drain();
    assert_eq!(error(send(&app, Method::GET, "/ready"))["code"], "draining");
    let metrics = body(send(&app, Method::GET, "/metrics"));
    let counted = r#"http_requests_total{path="/ready",status="503",model_name="model"} 2"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[test]
fn errors_have_one_shape() {
    let app = app(&[]);
    let missing = send(&app, Method::GET, "/v1/nothing");
    assert_eq!(missing.status(), StatusCode::NOT_FOUND);
    let expected = serde_json::json!({
        "message": "there is no GET /v1/nothing; see /v1/models, /v1/chat/completions, /v1/completions",
        "type": "invalid_request_error", "param": null, "code": "unknown_url",
    });
    assert_eq!(error(missing), expected);
    let wrong = send(&app, Method::DELETE, "/v1/completions");
    assert_eq!(
        (wrong.status(), &wrong.headers()[header::ALLOW]),
        (StatusCode::METHOD_NOT_ALLOWED, &HeaderValue::from_static("POST"))
    );
    assert_eq!(error(wrong)["code"], "method_not_allowed");
}

#[test]
fn keys_guard_what_computes() {
    let app = app(&["key"]);
    for path in ["/v1/models", "/v1/models/a"] {
        let response = send(&app, Method::GET, path);
        assert_eq!(
            (response.status(), &response.headers()[header::WWW_AUTHENTICATE]),
            (StatusCode::UNAUTHORIZED, &HeaderValue::from_static("Bearer"))
        );
    }
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        assert_eq!(send(&app, Method::POST, path).status(), StatusCode::UNAUTHORIZED);
    }
    for path in ["/health", "/metrics", "/version"] {
        assert_eq!(send(&app, Method::GET, path).status(), StatusCode::OK);
    }
}

#[test]
fn a_drain_waits_for_the_last_request() {
    let app = app(&[]);
    block_on(async {
        app.idle().await;
        let (one, two) = (app.enter(), app.enter());
        let waiting = tokio::time::timeout(Duration::from_millis(20), app.idle()).await;
        assert!(waiting.is_err() && app.num_active() == 2);
        drop(one);
        tokio::join!(app.idle(), async { drop(two) });
        assert_eq!(app.num_active(), 0);
    });
}
