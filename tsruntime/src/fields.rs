//! The fields of one JSON object, taken one by one; every error names the field, what was found and what is wanted.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Characters of a value that an error message repeats.
const SHOWN_CHARS: usize = 60;

/// An object's fields. A field that is null counts as absent, as OpenAI's clients mean it.
pub struct Fields {
    map: Map<String, Value>,
    /// Where the object lies, with a dot at its end; empty for the request itself.
    path: String,
}

impl Fields {
    /// The request's own fields.
    pub fn of_body(body: Value) -> Result<Fields, ApiError> {
        match body {
            Value::Object(map) => Ok(Fields { map, path: String::new() }),
            other => Err(ApiError::bad_request(
                "invalid_type",
                format!("the body is {}; a JSON object is wanted", described(&other)),
            )),
        }
    }

    /// The fields of the object at `path`.
    pub fn of(value: Value, path: &str) -> Result<Fields, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields { map, path: format!("{path}.") }),
            other => Err(wrong(path, &other, "an object")),
        }
    }

    /// Where the field `name` lies.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.path(name), &other, "true or false")),
        }
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name).map(|value| string(value, &self.path(name))).transpose()
    }

    /// An integer within `range`.
    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        self.take(name).map(|value| integer(&value, &self.path(name), range)).transpose()
    }

    /// A number within `range`.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        self.take(name).map(|value| number(&value, &self.path(name), range)).transpose()
    }

    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong(&self.path(name), &other, "an array")),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(&self.path(name), &other, "an object")),
        }
    }

    /// Drops fields that change nothing here.
    pub fn ignore(&mut self, names: &[&str]) {
        names.iter().for_each(|name| drop(self.map.shift_remove(*name)));
    }

    /// Refuses a field that this server knows but cannot honour yet, unless its value asks for nothing.
    pub fn refuse(&mut self, name: &str, asks_nothing: impl FnOnce(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !asks_nothing(&value) => {
                let path = self.path(name);
                let message =
                    format!("`{path}` is not supported by this server; {} was found: leave it out", shown(&value));
                Err(ApiError::field(path, "unsupported_parameter", message))
            }
            _ => Ok(()),
        }
    }

    /// No other field may be left.
    pub fn done(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => {
                let path = self.path(name);
                let message = format!("`{path}` is not a field of this request; check its spelling, or leave it out");
                Err(ApiError::field(path, "unknown_parameter", message))
            }
        }
    }
}

pub fn string(value: Value, path: &str) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(wrong(path, &other, "a string")),
    }
}

pub fn integer(value: &Value, path: &str, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let wanted = || match (*range.start(), *range.end()) {
        (i64::MIN, i64::MAX) => "an integer of 64 bits".to_owned(),
        (low, i64::MAX) => format!("an integer of at least {low}"),
        (low, high) => format!("an integer from {low} to {high}"),
    };
    match value {
        Value::Number(found) => match found.as_i64() {
            Some(found) if range.contains(&found) => Ok(found),
            _ => Err(out_of_range(path, value, &wanted())),
        },
        other => Err(wrong(path, other, &wanted())),
    }
}

pub fn number(value: &Value, path: &str, range: RangeInclusive<f64>) -> Result<f32, ApiError> {
    let wanted = || format!("a number from {} to {}", range.start(), range.end());
    match value {
        // serde_json's numbers are finite.
        Value::Number(found) => match found.as_f64() {
            Some(found) if range.contains(&found) => Ok(found as f32),
            _ => Err(out_of_range(path, value, &wanted())),
        },
        other => Err(wrong(path, other, &wanted())),
    }
}

/// The error for a value of the wrong type.
pub fn wrong(path: &str, found: &Value, wanted: &str) -> ApiError {
    ApiError::field(path, "invalid_type", format!("`{path}` is {}; {wanted} is wanted", described(found)))
}

/// The error for a value of the right type that cannot be.
pub fn out_of_range(path: &str, found: &Value, wanted: &str) -> ApiError {
    ApiError::field(path, "invalid_value", format!("`{path}` is {}; {wanted} is wanted", shown(found)))
}

/// A value with its type.
fn described(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) | Value::Number(_) => shown(value),
        Value::String(_) => format!("the string {}", shown(value)),
        Value::Array(items) => format!("an array of {}", items.len()),
        Value::Object(_) => "an object".into(),
    }
}

/// A value as JSON, cut where it is long.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) | Value::Object(_) => described(value),
        Value::String(text) if text.chars().nth(SHOWN_CHARS).is_some() => {
            let start: String = text.chars().take(SHOWN_CHARS).collect();
            format!("{}…", Value::from(start))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::of_body(value).unwrap()
    }

    #[test]
    fn null_is_absent() {
        let mut body = fields(json!({"a": null, "b": null}));
        assert_eq!(body.boolean("a"), Ok(None));
        assert_eq!(body.number("b", 0.0..=1.0), Ok(None));
        assert!(body.done().is_ok());
    }

    #[test]
    fn wrong_types_name_field_found_and_wanted() {
        let long = "x".repeat(1000);
        let mut body = fields(json!({"a": "hot", "b": 1.5, "c": [1, 2], "d": 1, "e": long}));
        let message = |error: ApiError| (error.param.unwrap(), error.code.unwrap(), error.message);
        assert_eq!(
            message(body.number("a", 0.0..=2.0).unwrap_err()),
            ("a".into(), "invalid_type", "`a` is the string \"hot\"; a number from 0 to 2 is wanted".into())
        );
        assert_eq!(
            message(body.integer("b", 1..=9).unwrap_err()),
            ("b".into(), "invalid_value", "`b` is 1.5; an integer from 1 to 9 is wanted".into())
        );
        assert_eq!(
            message(body.string("c").unwrap_err()),
            ("c".into(), "invalid_type", "`c` is an array of 2; a string is wanted".into())
        );
        assert_eq!(
            message(body.boolean("d").unwrap_err()),
            ("d".into(), "invalid_type", "`d` is 1; true or false is wanted".into())
        );
        assert!(body.boolean("e").unwrap_err().message.len() < 150);
    }

    #[test]
    fn numbers_are_bounded() {
        for value in [json!(u64::MAX), json!(i64::MIN), json!(2_147_483_648u64), json!(-1), json!(1e300)] {
            let error = fields(json!({"n": value})).integer("n", 0..=i64::from(i32::MAX)).unwrap_err();
            assert_eq!(error.code, Some("invalid_value"), "{value}");
            assert!(error.message.contains("from 0 to 2147483647"), "{}", error.message);
        }
        assert_eq!(fields(json!({"n": 2_147_483_647})).integer("n", 0..=2_147_483_647), Ok(Some(2_147_483_647)));
        assert_eq!(fields(json!({"n": 2})).number("n", 0.0..=2.0), Ok(Some(2.0)));
        assert!(fields(json!({"n": 2.000001})).number("n", 0.0..=2.0).is_err());
    }

    #[test]
    fn unknown_and_unsupported_fields_are_told_apart() {
        let mut body = fields(json!({"tools": [{}], "functions": [], "user": 3, "temprature": 1}));
        assert_eq!(body.refuse("tools", |tools| tools == &json!([])).unwrap_err().code, Some("unsupported_parameter"));
        assert!(body.refuse("functions", |functions| functions == &json!([])).is_ok());
        body.ignore(&["user", "absent"]);
        let error = body.done().unwrap_err();
        assert_eq!((error.param.as_deref(), error.code), (Some("temprature"), Some("unknown_parameter")));
    }
}
