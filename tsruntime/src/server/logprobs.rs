//! Tokens with their probabilities, in OpenAI's two shapes.

use serde_json::{Map, Value, json};

use crate::engine::Token;
use crate::model::Model;

/// JSON has no infinity: a token that cannot be gets the number that others use for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// `choices[].logprobs.content` of a chat: an object a token.
pub fn chat(model: &Model, tokens: &[Token]) -> Value {
    let entry = |id: u32, logprob: f32| {
        let (text, bytes) = model.token_text(id);
        json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
    };
    let content = tokens.iter().map(|token| {
        let mut one = entry(token.id, token.logprob);
        one["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
        one
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// `choices[].logprobs` of a completion: a list for each property. `offset`, in characters, is where the tokens' text begins, and
/// then where it ends.
pub fn completion(model: &Model, tokens: &[Token], offset: &mut usize) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for token in tokens {
        let (text, _) = model.token_text(token.id);
        offsets.push(*offset);
        *offset += text.chars().count();
        let mut top = Map::new();
        // Two tokens may have the same text: the likelier one keeps it. The chosen token is always there.
        for &(id, logprob) in token.top.iter().chain(&[(token.id, token.logprob)]) {
            top.entry(model.token_text(id).0).or_insert_with(|| finite(logprob).into());
        }
        texts.push(text);
        logprobs.push(finite(token.logprob));
        tops.push(if token.top.is_empty() { Value::Null } else { top.into() });
    }
    json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}
