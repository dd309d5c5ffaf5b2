//! Python's ways where templates can tell: `repr` of floats, `json.dumps`, `strftime`, and what has a length.

use std::fmt::Write;

use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, Value};

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// A float that Python writes otherwise than Rust: with an exponent.
#[derive(Debug)]
struct Float(f64);

impl Object for Float {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&float_repr(self.0))
    }
}

/// A JSON value as a template sees it.
pub(crate) fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(bool) => Value::from(*bool),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(int), ..) => Value::from(int),
            (_, Some(int), _) => Value::from(int),
            (.., Some(float)) if float_repr(float).contains('e') => Value::from_object(Float(float)),
            (.., float) => Value::from(float),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => Value::from_iter(items.iter().map(value)),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, field)| (name.as_str(), value(field))))
        }
    }
}

/// Jinja's `length`: an undefined value has none, which counts as zero.
pub(crate) fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| invalid(format!("an object of type {} has no length", value.kind())))
}

/// Jinja's `iterable`: `none` is not, an undefined value is.
pub(crate) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.is_undefined() || value.try_iter().is_ok())
}

pub(crate) fn is_number(value: &Value) -> bool {
    value.is_number() || is_float(value)
}

pub(crate) fn is_float(value: &Value) -> bool {
    value.is_number() && !value.is_integer() || value.downcast_object_ref::<Float>().is_some()
}

/// How `json.dumps` was asked to write.
struct Style {
    ensure_ascii: bool,
    /// One level of indentation; None for a single line.
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// The `tojson` filter of transformers: `json.dumps(x, ensure_ascii, indent, separators, sort_keys)`, nothing escaped for HTML.
pub(crate) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let argument = |given: Option<Value>, name: &str| -> Result<Value, Error> {
        Ok(given.or(kwargs.get::<Option<Value>>(name)?).unwrap_or(Value::from(())))
    };
    let (ensure_ascii, indent) = (argument(ensure_ascii, "ensure_ascii")?, argument(indent, "indent")?);
    let (separators, sort_keys) = (argument(separators, "separators")?, argument(None, "sort_keys")?);
    kwargs.assert_all_used()?;
    let indent = match indent.kind() {
        ValueKind::None => None,
        ValueKind::String => indent.as_str().map(str::to_owned),
        _ => Some(" ".repeat(usize::try_from(i64::try_from(indent)?.clamp(0, 64)).unwrap_or(0))),
    };
    let (item, key) = match separators.kind() {
        ValueKind::None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        _ => {
            let part = |at: usize| separators.get_item_by_index(at).map(|part| part.to_string());
            (part(0)?, part(1)?)
        }
    };
    let style = Style { ensure_ascii: ensure_ascii.is_true(), indent, item, key, sort_keys: sort_keys.is_true() };
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(out)
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.container("[", "]", items, depth, out)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    items.push((Some(self.key_text(&key)?), value.get_item(&key)?));
                }
                if self.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container("{", "}", items.into_iter(), depth, out)?;
            }
            kind => match value.downcast_object_ref::<Float>() {
                Some(float) => out.push_str(&float_repr(float.0)),
                None => return Err(invalid(format!("an {kind} value is not JSON serializable"))),
            },
        }
        Ok(())
    }

    fn key_text(&self, key: &Value) -> Result<String, Error> {
        match key.kind() {
            ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
            ValueKind::None => Ok("null".into()),
            ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
            ValueKind::Number => Ok(number(key)),
            kind => Err(invalid(format!("a key of kind {kind} is not JSON serializable"))),
        }
    }

    fn container(
        &self,
        open: &str,
        close: &str,
        items: impl Iterator<Item = (Option<String>, Value)>,
        depth: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push_str(open);
        let mut empty = true;
        for (key, item) in items {
            if !empty {
                out.push_str(&self.item);
            }
            empty = false;
            line(depth + 1, out);
            if let Some(key) = key {
                self.string(&key, out);
                out.push_str(&self.key);
            }
            self.write(&item, depth + 1, out)?;
        }
        if !empty {
            line(depth, out);
        }
        out.push_str(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for char in text.chars() {
            match char {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                _ if char < ' ' || self.ensure_ascii && !char.is_ascii() => {
                    for unit in char.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(char),
            }
        }
        out.push('"');
    }
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) if float.is_nan() => "NaN".into(),
        Ok(float) if float.is_infinite() => if float > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        Ok(float) => float_repr(float),
        Err(_) => value.to_string(),
    }
}

/// `repr` of a finite float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(crate) fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').expect("Rust writes an exponent");
    let exponent: i32 = exponent.parse().expect("Rust writes a number");
    if (-4..16).contains(&exponent) {
        let plain = format!("{float}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// `strftime_now` of transformers: local time, in the format of C's strftime.
pub(crate) fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Zoned::now();
    jiff::fmt::strtime::format(format, &now).map_err(|error| invalid(format!("strftime_now({format:?}): {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1e-5, "1e-05"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (-0.0, "-0.0"),
        ];
        for (float, text) in cases {
            assert_eq!(float_repr(float), text);
        }
    }
}
