//! The chat template of a checkpoint, and the roles of its special tokens.

use std::path::Path;

use serde_json::{Map, Value};

use super::{bad, read, read_json};
use crate::config::SpecialIds;
use crate::error::TextError;
use crate::template::{SPECIAL_TOKENS, Templates};

/// The checkpoint's files beside tokenizer.json.
pub(super) struct Files {
    tokenizer_config: Value,
    special_tokens_map: Value,
    generation_config: Value,
    config: Value,
    /// By name; "default" unless the checkpoint names them.
    templates: Vec<(String, String)>,
}

impl Files {
    pub fn read(dir: &Path) -> Result<Files, TextError> {
        let json = |name: &str| Ok::<Value, TextError>(read_json(&dir.join(name))?.unwrap_or(Value::Null));
        let mut files = Files {
            tokenizer_config: json("tokenizer_config.json")?,
            special_tokens_map: json("special_tokens_map.json")?,
            generation_config: json("generation_config.json")?,
            config: json("config.json")?,
            templates: Vec::new(),
        };
        files.templates = files.read_templates(dir)?;
        Ok(files)
    }

    /// Files of their own come first, as in transformers; then tokenizer_config.json, then chat_template.json.
    fn read_templates(&self, dir: &Path) -> Result<Vec<(String, String)>, TextError> {
        let mut templates = Vec::new();
        templates.extend(read(&dir.join("chat_template.jinja"))?.map(|source| ("default".to_owned(), source)));
        let more = dir.join("additional_chat_templates");
        if let Ok(entries) = std::fs::read_dir(&more) {
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if let Some(name) = name.strip_suffix(".jinja") {
                    let source =
                        read(&entry.path())?.ok_or_else(|| bad(format!("{}: it went away", entry.path().display())))?;
                    templates.push((name.to_owned(), source));
                }
            }
        }
        if templates.is_empty() {
            templates = named_templates("tokenizer_config.json", &self.tokenizer_config["chat_template"])?;
        }
        if templates.is_empty() {
            let file = read_json(&dir.join("chat_template.json"))?.unwrap_or(Value::Null);
            templates = named_templates("chat_template.json", &file["chat_template"])?;
        }
        templates.sort();
        Ok(templates)
    }

    /// The content of a named special token, such as `eos_token`: a string, or an object with it.
    fn token(&self, name: &str) -> Option<&str> {
        [&self.tokenizer_config, &self.special_tokens_map]
            .into_iter()
            .find_map(|file| file[name].as_str().or_else(|| file[name]["content"].as_str()))
    }

    /// The tokens of tokenizer_config.json's `added_tokens_decoder`, by id, in the shape of tokenizer.json's.
    pub fn added_tokens(&self) -> Vec<Value> {
        let entries = self.tokenizer_config["added_tokens_decoder"].as_object();
        let mut tokens: Vec<(u64, Value)> =
            entries.into_iter().flatten().filter_map(|(id, token)| Some((id.parse().ok()?, token.clone()))).collect();
        tokens.sort_by_key(|(id, _)| *id);
        let with_id = |(id, mut token): (u64, Value)| {
            if let Some(token) = token.as_object_mut() {
                token.insert("id".into(), id.into());
            }
            token
        };
        tokens.into_iter().map(with_id).collect()
    }

    /// Ids with a role; `find` looks a token up, `vocab` is one more than the largest id.
    pub fn special_ids(&self, find: &dyn Fn(&str) -> Option<u32>, vocab: usize) -> Result<SpecialIds, TextError> {
        let id = |role: &str| self.token(role).and_then(find);
        let mut eos = Vec::new();
        for (name, file) in [("generation_config.json", &self.generation_config), ("config.json", &self.config)] {
            let ids = &file["eos_token_id"];
            let list = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
            for id in list.iter().filter(|id| !id.is_null()) {
                let id = id.as_u64().filter(|&id| id <= u64::from(u32::MAX)).ok_or_else(|| {
                    bad(format!("{name}: eos_token_id is {ids}; a token id or a list of them is wanted"))
                })?;
                // An id of the padding rows beyond the vocabulary can be generated, and has no text.
                if (id as usize) < vocab {
                    eos.push(id as u32);
                }
            }
            if !eos.is_empty() {
                break;
            }
        }
        eos.extend(id("eos_token"));
        eos.sort_unstable();
        eos.dedup();
        Ok(SpecialIds { bos: id("bos_token"), pad: id("pad_token"), eos })
    }
}

/// A template, or a list of named ones.
fn named_templates(file: &str, value: &Value) -> Result<Vec<(String, String)>, TextError> {
    let wanted = || bad(format!("{file}: chat_template is neither a string nor a list of {{name, template}}"));
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![("default".to_owned(), source.clone())]),
        Value::Array(list) => {
            let named = list.iter().map(|entry| entry["name"].as_str().zip(entry["template"].as_str()));
            named
                .map(|pair| pair.map(|(name, source)| (name.to_owned(), source.to_owned())).ok_or_else(wanted))
                .collect()
        }
        Value::Object(map) => map
            .iter()
            .map(|(name, source)| Ok((name.clone(), source.as_str().ok_or_else(wanted)?.to_owned())))
            .collect(),
        _ => Err(wanted()),
    }
}

/// The template blob; empty if there is no template. Templates that do not parse are refused.
pub(super) fn compile(files: &Files) -> Result<Vec<u8>, TextError> {
    if files.templates.is_empty() {
        return Ok(Vec::new());
    }
    let tokens = SPECIAL_TOKENS.into_iter().filter_map(|name| Some((name.to_owned(), Value::from(files.token(name)?))));
    let templates = Templates {
        templates: files.templates.iter().cloned().collect(),
        tokens: tokens.collect::<Map<String, Value>>(),
    };
    templates.check().map_err(|(name, error)| bad(format!("chat template {name:?}: {error}")))?;
    Ok(templates.to_bytes())
}
