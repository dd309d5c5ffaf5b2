//! Chat templates, rendered as transformers' `apply_chat_template` renders them.

use std::collections::BTreeMap;
use std::io::{self, Write};

use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::error::TextError;
use crate::python;

/// Names under which a template finds the checkpoint's special tokens.
pub(crate) const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Published templates have at most 30 KB.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Instructions of one rendering, a quarter of a second of them. A turn of a published template takes under 100.
const FUEL: u64 = 5_000_000;
/// Bytes of one rendering: more than any context holds.
const OUTPUT_BYTES_MAX: usize = 32 << 20;
/// A template that does not parse within this much stack is not one to serve. Reserved, not touched, until it is needed.
const CHECK_STACK_BYTES: usize = 512 << 20;

/// Why a chat could not be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "message")]
pub enum TemplateError {
    #[error(
        "this model has no chat template; use completions, or build the plan from a checkpoint with a chat_template"
    )]
    None,
    #[error("this model has several chat templates and none is the default; they are: {0}")]
    NoDefault(String),
    /// The template's own `raise_exception`: these messages cannot be rendered.
    #[error("{0}")]
    Raised(String),
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// The template wanted more instructions, memory, stack, output or time than any template needs.
    #[error("the chat template exceeded its budget: {0}")]
    Budget(String),
    /// The process that renders could not be started or spoken to.
    #[error("the chat template could not be run: {0}")]
    Process(String),
}

/// One chat to render.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    pub messages: Vec<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<serde_json::Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    pub add_generation_prompt: bool,
    /// Further variables of the template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub kwargs: Map<String, serde_json::Value>,
}

/// A checkpoint's chat templates, by name, and the special tokens that they may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Templates {
    pub(crate) templates: BTreeMap<String, String>,
    pub(crate) tokens: Map<String, serde_json::Value>,
}

impl Templates {
    /// Opens the `template` blob of [`crate::CompiledText`]: None if it is empty, as it is without a chat template.
    pub fn open(blob: &[u8]) -> Result<Option<Templates>, TextError> {
        if blob.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(blob)
            .map(Some)
            .map_err(|error| TextError::Corrupt(format!("its chat template: {error}")))
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings")
    }

    /// Parses every template; a name with its error if one does not. Runs with a large stack, since parsers recurse.
    pub(crate) fn check(&self) -> Result<(), (String, TemplateError)> {
        let templates = self.clone();
        let check = move || {
            templates.templates.keys().try_for_each(|name| match Renderer::with_only(&templates, Some(name)) {
                Ok(_) => Ok(()),
                Err(error) => Err((name.clone(), error)),
            })
        };
        let thread = std::thread::Builder::new().stack_size(CHECK_STACK_BYTES).spawn(check);
        let failed = |error: String| (String::new(), TemplateError::Process(error));
        thread
            .map_err(|error| failed(error.to_string()))?
            .join()
            .unwrap_or_else(|_| Err(failed("parsing it panicked".into())))
    }

    /// The name of the template for a chat, as transformers chooses it.
    fn choose(&self, tools: bool) -> Result<&str, TemplateError> {
        let has = |name: &str| self.templates.contains_key(name);
        if tools && has("tool_use") {
            Ok("tool_use")
        } else if has("default") {
            Ok("default")
        } else {
            let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
            Err(TemplateError::NoDefault(names.join(", ")))
        }
    }
}

/// Templates, parsed. It bounds instructions, recursion and output, but not memory, stack or the time of one operation:
/// a process that must survive any template renders with [`crate::Sandbox`] instead.
pub struct Renderer {
    environment: Environment<'static>,
    templates: Templates,
}

/// What `raise_exception` was given.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message.to_string())))
}

/// transformers' `generation` tag marks what the assistant wrote; without a tracker it is a scope.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let inner = at + 2;
        let word = rest[inner..].trim_start_matches(['-', '+']).trim_start();
        let start = rest.len() - word.len();
        let (tag, with) =
            if word.starts_with("endgeneration") { ("endgeneration", "endwith") } else { ("generation", "with") };
        let ends = word
            .strip_prefix(tag)
            .is_some_and(|after| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}"));
        if ends {
            out.push_str(&rest[..start]);
            out.push_str(with);
            rest = &rest[start + tag.len()..];
        } else {
            out.push_str(&rest[..inner]);
            rest = &rest[inner..];
        }
    }
    out + rest
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = minijinja::syntax::SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().expect("Jinja's own delimiters"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("length", python::length);
    environment.add_filter("count", python::length);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("number", python::is_number);
    environment.add_test("float", python::is_float);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", python::strftime_now);
    environment
}

/// A sink that takes so many bytes and no more.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other("output"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// minijinja's own limits, by the words of their errors.
const LIMITS: [&str; 5] =
    ["too many elements", "string is too large", "sequence is too large", "recursion limit", "recursion"];

fn translate(error: &Error) -> TemplateError {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(raised) = inner.downcast_ref::<Raised>() {
            return TemplateError::Raised(raised.0.clone());
        }
        cause = inner.source();
    }
    let text = error.to_string();
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::Budget(format!("more than {FUEL} instructions"));
    }
    if error.kind() == ErrorKind::WriteFailure {
        return TemplateError::Budget(format!("more than {OUTPUT_BYTES_MAX} bytes of output"));
    }
    if LIMITS.iter().any(|limit| text.contains(limit)) {
        TemplateError::Budget(text)
    } else {
        TemplateError::Failed(text)
    }
}

impl Renderer {
    pub fn new(templates: &Templates) -> Result<Renderer, TemplateError> {
        Renderer::with_only(templates, None)
    }

    fn with_only(templates: &Templates, only: Option<&str>) -> Result<Renderer, TemplateError> {
        let mut environment = environment();
        for (name, source) in
            templates.templates.iter().filter(|(name, _)| only.is_none_or(|only| only == name.as_str()))
        {
            if source.len() > SOURCE_BYTES_MAX {
                return Err(TemplateError::Budget(format!(
                    "{} bytes of source, {SOURCE_BYTES_MAX} are the most",
                    source.len()
                )));
            }
            environment
                .add_template_owned(name.clone(), without_generation(source))
                .map_err(|error| translate(&error))?;
        }
        Ok(Renderer { environment, templates: templates.clone() })
    }

    /// The prompt of a chat.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        let name = self.templates.choose(chat.tools.is_some())?;
        let template = self.environment.get_template(name).map_err(|error| translate(&error))?;
        let messages: Vec<serde_json::Value> = chat.messages.iter().map(message).collect();
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, value) in self.templates.tokens.iter().chain(&chat.kwargs) {
            context.insert(name, python::value(value));
        }
        context.insert("messages", Value::from_iter(messages.iter().map(python::value)));
        let list = |list: &Option<Vec<serde_json::Value>>| {
            list.as_ref().map(|list| Value::from_iter(list.iter().map(python::value)))
        };
        context.insert("tools", list(&chat.tools).into());
        context.insert("documents", list(&chat.documents).into());
        context.insert("add_generation_prompt", chat.add_generation_prompt.into());
        let mut out = Bounded(Vec::new());
        template.render_captured_to(Value::from_pairs(context), &mut out).map_err(|error| translate(&error))?;
        String::from_utf8(out.0).map_err(|error| TemplateError::Failed(error.to_string()))
    }
}

/// A message as transformers hands it to a template: without null fields, and with its reasoning under each of the names in use.
fn message(message: &serde_json::Value) -> serde_json::Value {
    let Some(fields) = message.as_object() else { return message.clone() };
    let mut fields: Map<String, serde_json::Value> = fields
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| fields.get(*name).cloned());
    if let Some(reasoning) = reasoning {
        fields.insert("reasoning_content".into(), reasoning.clone());
        fields.entry("thinking").or_insert(reasoning);
    }
    fields.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn templates(source: &str) -> Templates {
        Templates { templates: [("default".to_owned(), source.to_owned())].into(), tokens: Map::new() }
    }

    fn render(source: &str, messages: serde_json::Value) -> Result<String, TemplateError> {
        let messages = messages.as_array().unwrap().clone();
        Renderer::new(&templates(source))?.render(&Chat { messages, ..Chat::default() })
    }

    #[test]
    fn blocks_are_trimmed_and_messages_found() {
        let source = "{% for message in messages %}\n  {%- generation -%}\n<{{ message.role }}> {{ message['content'] | tojson }}\n{% endgeneration %}\n{% endfor %}\n";
        assert_eq!(render(source, json!([{"role": "user", "content": "é \"<"}])).unwrap(), "<user> \"é \\\"<\"\n");
    }

    #[test]
    fn an_exception_of_the_template_is_told_apart() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert_eq!(error, TemplateError::Raised("roles must alternate".into()));
        assert!(matches!(render("{{ 1 + 'a' }}", json!([])), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn limits_that_need_no_process() {
        let nested = "(".repeat(200_000);
        let cases = [
            format!("{{{{ {nested} }}}}"),
            format!("{{{{ {} }}}}", "(".repeat(100_000)),
            "{% for i in range(10**9) %}x{% endfor %}".into(),
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".into(),
            "{{ 'a' * 10**9 }}".into(),
            "{% for i in range(1000) %}{{ 'a' * 10**7 }}{% endfor %}".into(),
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        ];
        for source in cases {
            let error = render(&source, json!([])).unwrap_err();
            assert!(matches!(error, TemplateError::Budget(_)), "{:.60}: {error}", source);
        }
    }

    #[test]
    fn names_choose_a_template_as_transformers_does() {
        let named = |names: &[&str]| Templates {
            templates: names.iter().map(|name| (name.to_string(), name.to_string())).collect(),
            tokens: Map::new(),
        };
        assert_eq!(named(&["default", "tool_use"]).choose(true).unwrap(), "tool_use");
        assert_eq!(named(&["default", "tool_use"]).choose(false).unwrap(), "default");
        assert_eq!(named(&["default", "rag"]).choose(true).unwrap(), "default");
        assert_eq!(named(&["a", "b"]).choose(false).unwrap_err(), TemplateError::NoDefault("a, b".into()));
    }
}
