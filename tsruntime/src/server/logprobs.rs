//! Tokens with their probabilities, in OpenAI's two shapes.

use serde_json::{Map, Value, json};
use tsruntime_text::Tokenizer;

use crate::engine::Token;

/// The text of one token; a part of a character is U+FFFD.
fn text_of(tokenizer: &Tokenizer, id: u32) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(id);
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// JSON has no infinity: a token that cannot be gets the number that others use for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// `choices[].logprobs.content` of a chat: an object a token.
pub fn chat(tokenizer: &Tokenizer, tokens: &[Token]) -> Value {
    let entry = |id: u32, logprob: f32| {
        let (text, bytes) = text_of(tokenizer, id);
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
pub fn completion(tokenizer: &Tokenizer, tokens: &[Token], offset: &mut usize) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for token in tokens {
        let (text, _) = text_of(tokenizer, token.id);
        offsets.push(*offset);
        *offset += text.chars().count();
        let mut top = Map::new();
        // Two tokens may have the same text: the likelier one keeps it. The chosen token is always there.
        for &(id, logprob) in token.top.iter().chain(&[(token.id, token.logprob)]) {
            top.entry(text_of(tokenizer, id).0).or_insert_with(|| finite(logprob).into());
        }
        texts.push(text);
        logprobs.push(finite(token.logprob));
        tops.push(if token.top.is_empty() { Value::Null } else { top.into() });
    }
    json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}
