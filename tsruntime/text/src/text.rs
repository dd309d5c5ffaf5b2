//! A plan's text as its front uses it: tokenizer and chat template together.

use std::ffi::OsString;
use std::ops::Range;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use bytes::Bytes;
use serde_json::Value;

use crate::error::TextError;
use crate::sandbox::Sandbox;
use crate::template::{Chat, TemplateError, Templates};
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Around control tokens in what users wrote, while a template renders it: private-use characters.
const OPEN: char = '\u{f8f0}';
const CLOSE: char = '\u{f8f1}';

/// Tokenizer and chat template of one plan. Cheap to share: put it in an `Arc`.
pub struct Text {
    tokenizer: Arc<Tokenizer>,
    chat: Option<Sandbox>,
    /// Tokens that a template uses to tell its messages apart.
    control: AhoCorasick,
}

impl Text {
    /// Opens the two blobs of a plan. `worker` is the command that runs [`crate::serve_sandbox`]: this executable, with the subcommand for it.
    pub fn open(tokenizer: Bytes, template: &[u8], worker: Vec<OsString>) -> Result<Text, TextError> {
        let tokenizer = Arc::new(Tokenizer::open(tokenizer)?);
        let templates = Templates::open(template)?;
        let written = |token: &str| {
            !token.trim().is_empty()
                && templates.iter().flat_map(|all| all.templates.values()).any(|source| source.contains(token))
        };
        let control: Vec<&str> = tokenizer
            .added_tokens()
            .filter(|(token, special)| *special || written(token))
            .map(|(token, _)| token)
            .collect();
        let control = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(control);
        let control = control.map_err(|error| TextError::Corrupt(error.to_string()))?;
        Ok(Text { chat: templates.map(|templates| Sandbox::new(&templates, worker)), control, tokenizer })
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// What renders chats; [`TemplateError::None`] if the checkpoint had no chat template.
    pub fn chat(&self) -> Result<&Sandbox, TemplateError> {
        self.chat.as_ref().ok_or(TemplateError::None)
    }

    /// The prompt of a chat, as text: equal to transformers' `apply_chat_template(..., tokenize=False)`.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        self.chat()?.render(chat)
    }

    /// The prompt of a chat, as ids: equal to transformers' `apply_chat_template`. With `sanitize`, control tokens that users, tools or documents
    /// spell out (`<|im_end|>`) are plain text, so that nobody can speak for another: `sanitize_control_tokens` of transformers.
    pub fn render_ids(&self, chat: &Chat, sanitize: bool) -> Result<Vec<u32>, TemplateError> {
        if !sanitize {
            return Ok(self.tokenizer.encode(&self.render(chat)?, &EncodeOptions::default()));
        }
        let (text, plain) = unmark(&self.render(&self.marked(chat))?, &self.control);
        Ok(self.tokenizer.encode(&text, &EncodeOptions { plain, ..EncodeOptions::default() }))
    }

    fn marked(&self, chat: &Chat) -> Chat {
        let mut chat = chat.clone();
        let lists = [Some(&mut chat.messages), chat.tools.as_mut(), chat.documents.as_mut()];
        lists.into_iter().flatten().flatten().chain(chat.kwargs.values_mut()).for_each(|value| self.mark(value));
        chat
    }

    /// Marks the control tokens in every string of `value`; keys are the caller's own.
    fn mark(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                // Marks that are there already are somebody's attempt to forge them.
                let clean = text.replace([OPEN, CLOSE], "");
                let mut marked = String::with_capacity(clean.len());
                self.control.replace_all_with(&clean, &mut marked, |_, token, out| {
                    out.extend([OPEN.encode_utf8(&mut [0; 4]), token, CLOSE.encode_utf8(&mut [0; 4])]);
                    true
                });
                *text = marked;
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark(item)),
            Value::Object(fields) => fields.values_mut().for_each(|field| self.mark(field)),
            _ => {}
        }
    }
}

/// Takes the marks out: the text, and the byte ranges that stay plain, in order. A mark that has lost its partner, because the template cut
/// the string, leaves an empty range: no token may lie across it.
fn unmark(marked: &str, control: &AhoCorasick) -> (String, Vec<Range<usize>>) {
    let mut text = String::with_capacity(marked.len());
    let mut plain = Vec::new();
    let mut open: Option<usize> = None;
    for char in marked.chars() {
        let at = text.len();
        match char {
            OPEN => plain.extend(open.replace(at).map(|start| start..start)),
            CLOSE => {
                let start = open.take();
                let whole =
                    |start: &usize| control.find(&text[*start..]).is_some_and(|found| found.range() == (0..at - start));
                match start.filter(whole) {
                    Some(start) => plain.push(start..at),
                    None => plain.extend(start.into_iter().chain([at]).map(|at| at..at)),
                }
            }
            _ => text.push(char),
        }
    }
    plain.extend(open.map(|start| start..start));
    (text, plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_tokens_between_marks_are_plain() {
        let control = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(["<|a|>"]).unwrap();
        let unmark = |marked: &str| unmark(&marked.replace('[', "\u{f8f0}").replace(']', "\u{f8f1}"), &control);
        assert_eq!(unmark("<|a|>é[<|a|>]<|a|>[<|a|>]").1, [7..12, 17..22]);
        // A template that cut the strings: nothing may join across any of the marks.
        assert_eq!(unmark("[<|a] b [c"), ("<|a b c".into(), vec![0..0, 3..3, 6..6]));
        assert!(unmark("no marks").1.is_empty());
    }
}
