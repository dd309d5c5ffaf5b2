//! A request's body, within its bounds.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body as _;

use crate::error::ApiError;

/// The JSON text of a request: at most `bytes_max`, within `timeout`.
pub async fn read(request: Request, bytes_max: usize, timeout: Duration) -> Result<Bytes, ApiError> {
    check_type(request.headers())?;
    let mut body = request.into_body();
    let too_large = || {
        let message = format!("the body is larger than {bytes_max} bytes, the most that this server takes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
    };
    // What the head promises, before a byte of it is read.
    if body.size_hint().lower() > bytes_max as u64 {
        return Err(too_large());
    }
    let all = async {
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                ApiError::bad_request("invalid_body", format!("the body could not be read: {error}"))
            })?;
            if let Some(data) = frame.data_ref() {
                if bytes.len() + data.len() > bytes_max {
                    return Err(too_large());
                }
                bytes.extend_from_slice(data);
            }
        }
        Ok(bytes.freeze())
    };
    tokio::time::timeout(timeout, all).await.unwrap_or_else(|_| {
        let message = format!("the body did not arrive within {} s", timeout.as_secs_f32());
        Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, Some("body_timeout"), message))
    })
}

/// Wants JSON by name. A page of another origin can send other types without asking, but not this one.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let unsupported = |message: String| {
        Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, Some("unsupported_media_type"), message))
    };
    let text =
        |name| headers.get(name).map(|value: &axum::http::HeaderValue| String::from_utf8_lossy(value.as_bytes()));
    let found = text(header::CONTENT_TYPE);
    let essence = found.as_deref().map(|value| value.split(';').next().unwrap_or("").trim().to_ascii_lowercase());
    if essence.as_deref() != Some("application/json") {
        let found = found.map_or("missing".into(), |value| format!("{value:?}"));
        return unsupported(format!("the Content-Type is {found}; application/json is wanted"));
    }
    match text(header::CONTENT_ENCODING) {
        Some(coding) if !coding.eq_ignore_ascii_case("identity") => {
            unsupported(format!("the Content-Encoding is {coding:?}; bodies are taken as they are, without one"))
        }
        _ => Ok(()),
    }
}
