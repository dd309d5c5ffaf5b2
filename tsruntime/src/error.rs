//! Errors for those who asked: over HTTP, and at the command line.

use std::io::Write;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::EngineError;

/// An answer that is an error, in OpenAI's shape: `{"error": {message, type, param, code}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    pub kind: &'static str,
    /// The field of the request that is at fault.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// When a client that is sent away may try again.
    pub retry_after: Duration,
}

/// Where nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl ApiError {
    pub fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> ApiError {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            _ if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ApiError { status, message: message.into(), kind, param: None, code, retry_after: RETRY_AFTER }
    }

    pub fn bad_request(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, Some(code), message)
    }

    /// A field whose value cannot be used. The message says what was found and what is wanted.
    pub fn field(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::bad_request(code, message) }
    }

    pub fn busy() -> ApiError {
        let message = "all places in the queue are taken; try again after the seconds of Retry-After";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("server_busy"), message)
    }

    pub fn unavailable(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Some(code), message)
    }

    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, None, message)
    }

    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

/// Whole seconds, at least one: what Retry-After takes.
fn seconds_up(duration: Duration) -> u64 {
    (duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).max(1)
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            say(&self.message);
        }
        let mut response = crate::server::json_response(self.status, &self.body());
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds_up(self.retry_after)));
        }
        if self.status == StatusCode::GATEWAY_TIMEOUT {
            // OpenAI's clients would send it again, and have another wait as long.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> ApiError {
        match error {
            EngineError::Busy { retry_after } => ApiError { retry_after, ..ApiError::busy() },
            EngineError::BadRequest(message) => ApiError::bad_request("invalid_value", message),
            EngineError::TimedOut(message) => ApiError::new(StatusCode::GATEWAY_TIMEOUT, Some("timeout"), message),
            EngineError::Closed => ApiError::unavailable("draining", "the server is shutting down"),
            EngineError::Failed(message) => ApiError::internal(message),
        }
    }
}

/// Why a command ends without having done its work: one line for standard error, and the exit code.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The machine said no: files, memory, threads.
    Failed = 1,
    /// What was asked for cannot be served. clap's own usage errors have this code too.
    Usage = 2,
    /// The plan is damaged, or not for this machine.
    Plan = 3,
    /// The address cannot be listened on.
    Address = 4,
    /// A replay is not what was recorded.
    Differs = 5,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into() }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        let exit = if error.status.is_client_error() { Exit::Usage } else { Exit::Failed };
        Failure::new(exit, error.message)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Failure {
        ApiError::from(error).into()
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::new(Exit::Failed, error.to_string())
    }
}

/// A line on standard error; nobody need be there to read it.
pub fn say(message: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "tsruntime: {message}");
}
