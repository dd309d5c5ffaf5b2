//! The BPE model of a tokenizer.json: vocabulary and merges.

use std::collections::HashMap;

use serde_json::Value;

use super::bad;
use crate::config::META;
use crate::error::TextError;

/// Ids beyond this are a mistake: the table of offsets is as long as the largest.
const IDS_MAX: u64 = 1 << 24;

pub(super) struct Model {
    pub ids: HashMap<String, u32>,
    /// (left, right, rank, product)
    pub merges: Vec<[u32; 4]>,
    pub ignore_merges: bool,
    pub byte_fallback: bool,
    pub fuse_unk: bool,
    pub unk_id: Option<u32>,
    pub words_are_independent: bool,
}

fn flag(model: &Value, name: &str) -> bool {
    model[name].as_bool().unwrap_or(false)
}

pub(super) fn read(model: &Value) -> Result<Model, TextError> {
    let kind = model["type"].as_str().unwrap_or(if model["merges"].is_array() { "BPE" } else { "of unknown kind" });
    if kind != "BPE" {
        return Err(bad(format!(
            "tokenizer.json: the model is {kind}; known is BPE (byte-level, as Qwen's and Llama 3's, or with byte fallback, as Llama 2's and Mistral's)"
        )));
    }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[name].as_str().is_some_and(|affix| !affix.is_empty()) {
            return Err(bad(format!("tokenizer.json: BPE with {name} {} is not supported", model[name])));
        }
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
        return Err(bad(format!("tokenizer.json: BPE with dropout {} encodes at random", model["dropout"])));
    }
    let vocab = model["vocab"].as_object().ok_or_else(|| bad("tokenizer.json: model.vocab, an object, is missing"))?;
    let mut ids = HashMap::with_capacity(vocab.len());
    let mut seen: HashMap<u32, &str> = HashMap::with_capacity(vocab.len());
    for (token, id) in vocab {
        let id =
            id.as_u64().filter(|&id| id < IDS_MAX).ok_or_else(|| {
                bad(format!("tokenizer.json: token {token:?} has id {id}; an id is 0 to {}", IDS_MAX - 1))
            })? as u32;
        if let Some(other) = seen.insert(id, token) {
            return Err(bad(format!("tokenizer.json: tokens {other:?} and {token:?} both have id {id}")));
        }
        ids.insert(token.clone(), id);
    }
    let unk_id = match model["unk_token"].as_str() {
        None => None,
        Some(token) => Some(
            *ids.get(token)
                .ok_or_else(|| bad(format!("tokenizer.json: unk_token {token:?} is not in the vocabulary")))?,
        ),
    };
    let (merges, words_are_independent) = read_merges(model, &ids)?;
    let ignore_merges = flag(model, "ignore_merges");
    Ok(Model {
        words_are_independent: words_are_independent
            && !ignore_merges
            && ids.contains_key(META.encode_utf8(&mut [0; 4])),
        merges,
        ignore_merges,
        byte_fallback: flag(model, "byte_fallback"),
        fuse_unk: flag(model, "fuse_unk"),
        unk_id,
        ids,
    })
}

/// The merges, sorted by pair, and whether none of them joins anything to a `▁` after it.
fn read_merges(model: &Value, ids: &HashMap<String, u32>) -> Result<(Vec<[u32; 4]>, bool), TextError> {
    let list = model["merges"].as_array().ok_or_else(|| bad("tokenizer.json: model.merges, a list, is missing"))?;
    let mut merges = HashMap::with_capacity(list.len());
    let mut independent = true;
    for (rank, entry) in list.iter().enumerate() {
        let pair = match entry {
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let (left, right) =
            pair.ok_or_else(|| bad(format!("tokenizer.json: merge {rank} is {entry}; a pair of tokens is wanted")))?;
        let id = |token: &str| {
            ids.get(token).copied().ok_or_else(|| {
                bad(format!(
                    "tokenizer.json: merge {rank}, {left:?} with {right:?}: {token:?} is not in the vocabulary"
                ))
            })
        };
        independent &= !right.starts_with(META) || left.ends_with(META);
        // A pair that is listed twice keeps its later rank.
        merges.insert((id(left)?, id(right)?), (rank as u32, id(&format!("{left}{right}"))?));
    }
    let mut merges: Vec<[u32; 4]> =
        merges.into_iter().map(|((left, right), (rank, product))| [left, right, rank, product]).collect();
    merges.sort_unstable();
    Ok((merges, independent))
}
