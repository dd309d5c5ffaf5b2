//! `messages`, and what else shapes a chat's prompt.

use serde_json::{Map, Value, json};
use tsruntime_text::Chat;

use crate::error::ApiError;
use crate::fields::{Fields, out_of_range, wrong};

const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// The chat of a request.
pub fn conversation(fields: &mut Fields) -> Result<Chat, ApiError> {
    let Some(messages) = fields.take("messages") else {
        let message = "`messages` is missing; an array of messages is wanted";
        return Err(ApiError::field("messages", "missing_required_parameter", message));
    };
    conversation_of(messages, fields)
}

pub fn conversation_of(messages: Value, fields: &mut Fields) -> Result<Chat, ApiError> {
    let messages = match messages {
        Value::Array(messages) if messages.is_empty() => {
            return Err(ApiError::field(
                "messages",
                "invalid_value",
                "`messages` is empty; at least one message is wanted",
            ));
        }
        Value::Array(messages) => messages,
        other => return Err(wrong("messages", &other, "an array of messages")),
    };
    let messages = messages.into_iter().enumerate().map(|(i, item)| message(item, &format!("messages[{i}]")));
    let chat = Chat {
        messages: messages.collect::<Result<_, _>>()?,
        add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
        kwargs: kwargs(fields)?,
        ..Chat::default()
    };
    // The template writes the special tokens of a chat; and it is the plan's, never the client's.
    fields.refuse("add_special_tokens", |add| add == false)?;
    fields.refuse("continue_final_message", |proceed| proceed == false)?;
    fields.refuse("echo", |echo| echo == false)?;
    fields.refuse("chat_template", |_| false)?;
    Ok(chat)
}

/// Further variables of the template. What this server sets itself is not among them.
fn kwargs(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let kwargs = fields.object("chat_template_kwargs")?.unwrap_or_default();
    for name in ["messages", "tools", "documents", "add_generation_prompt", "chat_template"] {
        if kwargs.contains_key(name) {
            let message =
                format!("`chat_template_kwargs` has {name:?}, which is not a variable that a request sets there");
            return Err(ApiError::field("chat_template_kwargs", "invalid_value", message));
        }
    }
    Ok(kwargs)
}

fn message(item: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(item, path)?;
    let role = fields.string("role")?;
    let role = role.ok_or_else(|| {
        let message = format!("`{path}.role` is missing; one of {ROLES:?} is wanted");
        ApiError::field(format!("{path}.role"), "missing_required_parameter", message)
    })?;
    if !ROLES.contains(&role.as_str()) {
        return Err(out_of_range(&format!("{path}.role"), &role.into(), &format!("one of {ROLES:?}")));
    }
    let mut message = Map::new();
    let content = fields.take("content").map(|content| text(content, &format!("{path}.content"))).transpose()?;
    let name = fields.string("name")?;
    if role == "assistant" {
        // What an earlier answer had beside its content comes back with it.
        for field in ["reasoning_content", "reasoning"] {
            if let Some(reasoning) = fields.string(field)? {
                message.insert(field.into(), reasoning.into());
            }
        }
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        fields.refuse("tool_calls", empty)?;
        fields.ignore(&["annotations"]);
    }
    for field in ["refusal", "audio", "function_call"] {
        fields.refuse(field, |_| false)?;
    }
    let content = content.ok_or_else(|| {
        let message = format!("`{path}.content` is missing; a string or an array of text parts is wanted");
        ApiError::field(format!("{path}.content"), "missing_required_parameter", message)
    })?;
    fields.done()?;
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    message.extend(name.map(|name| ("name".to_owned(), json!(name))));
    Ok(message.into())
}

/// A message's content. Templates of these families take text: parts are joined by line breaks, as vLLM joins them.
fn text(content: Value, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, &other, "a string or an array of text parts")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let mut fields = Fields::of(part, &path)?;
        let kind = fields.take("type").unwrap_or_default();
        if kind != "text" {
            return Err(out_of_range(&format!("{path}.type"), &kind, "\"text\", the only kind that this model reads,"));
        }
        let text = fields.string("text")?;
        texts.push(text.ok_or_else(|| wrong(&format!("{path}.text"), &Value::Null, "a string"))?);
        fields.done()?;
    }
    Ok(texts.join("\n"))
}
