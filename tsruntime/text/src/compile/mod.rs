//! A checkpoint's text files to the two blobs that a plan carries.

mod model;
mod pipeline;
mod template;

use std::path::Path;

use serde_json::Value;

use crate::error::TextError;

/// The compiled text of a checkpoint. The same files give the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompiledText {
    /// What [`crate::Tokenizer::open`] reads.
    pub tokenizer: Vec<u8>,
    /// What [`crate::Templates::open`] reads; empty if the checkpoint has no chat template.
    pub template: Vec<u8>,
}

/// Compiles tokenizer.json, and the chat template, of the checkpoint in `dir`. Roles of special tokens come from
/// tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json, as far as they exist.
pub fn compile(dir: &Path) -> Result<CompiledText, TextError> {
    let path = dir.join("tokenizer.json");
    let tokenizer = read_json(&path)?.ok_or_else(|| {
        let other = ["tokenizer.model", "vocab.json", "tekken.json"].into_iter().find(|name| dir.join(name).exists());
        let found = other.map_or(String::new(), |name| {
            format!(" ({name} was found: convert it with transformers' save_pretrained)")
        });
        bad(format!("{}: no such file{found}; a checkpoint needs its tokenizer.json", path.display()))
    })?;
    let files = template::Files::read(dir)?;
    Ok(CompiledText { tokenizer: pipeline::compile(&tokenizer, &files)?, template: template::compile(&files)? })
}

fn bad(message: impl Into<String>) -> TextError {
    TextError::Checkpoint(message.into())
}

/// The contents of a text file, or None if there is none.
fn read(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::File { path: path.to_owned(), source }),
    }
}

/// A JSON object from a file, or None if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(text) = read(path)? else { return Ok(None) };
    let value: Value = serde_json::from_str(&text).map_err(|error| bad(format!("{}: {error}", path.display())))?;
    if !value.is_object() {
        return Err(bad(format!("{}: a JSON object is wanted", path.display())));
    }
    Ok(Some(value))
}
