//! API keys.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};

use super::app::App;
use crate::error::ApiError;

pub async fn require_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match check(&app.api_keys, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn check(keys: &[String], headers: &HeaderMap) -> Result<(), ApiError> {
    if keys.is_empty() {
        return Ok(());
    }
    let Some(token) = bearer(headers) else {
        return Err(refusal("no API key was given; send it as `Authorization: Bearer KEY`"));
    };
    // Every key is compared, and all of its bytes: the time tells nothing but lengths.
    let known = keys.iter().fold(Choice::from(0), |known, key| known | key.as_bytes().ct_eq(token));
    if bool::from(known) { Ok(()) } else { Err(refusal("the API key is not one of this server's")) }
}

/// The key that a request carries, right or wrong.
pub fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    // The scheme's name has no case.
    let token = value.filter(|value| value.len() > 7 && value[..7].eq_ignore_ascii_case(b"bearer "));
    token.map(|value| value[7..].trim_ascii())
}

fn refusal(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(keys: &[&str], value: Option<&[u8]>) -> bool {
        let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
        let mut headers = HeaderMap::new();
        if let Some(value) = value {
            headers.insert(header::AUTHORIZATION, value.try_into().unwrap());
        }
        check(&keys, &headers).inspect_err(|error| assert_eq!(error.status, StatusCode::UNAUTHORIZED)).is_ok()
    }

    #[test]
    fn keys_are_exact() {
        assert!(allowed(&[], None));
        for value in [&b"Bearer two"[..], b"bearer two", b"Bearer  two "] {
            assert!(allowed(&["one", "two"], Some(value)));
        }
        for value in
            [&b"Bearer tw"[..], b"Bearer twoo", b"Bearer ", b"two", b"Basic two", b"Bearer TWO", b"Bearer \xff"]
        {
            assert!(!allowed(&["one", "two"], Some(value)));
        }
        assert!(!allowed(&["one"], None));
    }
}
