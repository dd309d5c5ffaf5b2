//! JSON from clients: bytes to a value, or one error that says where it went wrong.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::ApiError;

/// Parses one JSON value. Beyond what serde_json refuses (more than 128 levels, numbers beyond f64, lone surrogates, trailing bytes), a
/// key that appears twice is an error: two readers of such an object may each believe something else.
pub fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let message = format!("the body is not UTF-8: byte {} begins no character", error.valid_up_to());
        ApiError::bad_request("invalid_json", message)
    })?;
    if text.trim_ascii().is_empty() {
        return Err(ApiError::bad_request("invalid_json", "the body is empty; a JSON object is wanted"));
    }
    let strict: Strict = serde_json::from_str(text)
        .map_err(|error| ApiError::bad_request("invalid_json", format!("the body is not valid JSON: {error}")))?;
    Ok(strict.0)
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Strict, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> DeserializeSeed<'de> for StrictVisitor {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(StrictVisitor)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let value = access.next_value_seed(StrictVisitor)?;
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} appears twice in one object")));
            }
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(bytes: &[u8]) -> String {
        let error = parse(bytes).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (400, Some("invalid_json")));
        error.message
    }

    #[test]
    fn values_are_kept() {
        let text = r#"{"a": [1, -2, 3.5, 18446744073709551615, null, true, "é\ud83d\ude00"], "b": {"a": {}}}"#;
        let expected = json!({"a": [1, -2, 3.5, u64::MAX, null, true, "é😀"], "b": {"a": {}}});
        assert_eq!(parse(text.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let cases: [(&[u8], &str); 12] = [
            (b"", "the body is empty"),
            (b" \n", "the body is empty"),
            (b"{\"a\": \n 1,}", "line 2 column 4"),
            (b"{\"a\": 1} x", "trailing characters at line 1 column 10"),
            (b"{\"a\": 1, \"a\": 1}", "\"a\" appears twice in one object at line 1 column 16"),
            (b"[{\"x\": {\"y\": 1, \"\\u0079\": 2}}]", "\"y\" appears twice"),
            (b"{\"a\": 1e999}", "number out of range at line 1 column 11"),
            (b"{\"a\": NaN}", "expected value at line 1 column 7"),
            (b"{\"a\": \"\\ud800\"}", "hex escape at line 1"),
            (b"{\"a\": \"\xff\"}", "byte 7 begins no character"),
            (b"{\"a\": \"\0\"}", "control character"),
            (b"{'a': 1}", "key must be a string at line 1 column 2"),
        ];
        for (bytes, expected) in cases {
            let message = message(bytes);
            assert!(message.contains(expected), "{}: {message}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn depth_is_bounded() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = |levels: usize| open.repeat(levels) + "1" + &close.repeat(levels);
            assert!(parse(deep(100).as_bytes()).is_ok());
            assert!(message(deep(100_000).as_bytes()).contains("recursion limit"));
            assert!(message(open.repeat(100_000).as_bytes()).contains("recursion limit"));
        }
    }
}
