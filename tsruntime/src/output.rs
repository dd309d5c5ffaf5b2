//! From a request's tokens to its text: detokenizing, stop strings, logprobs, finish reasons.

use std::sync::Arc;

use tsruntime_text::{DecodeOptions, Detokenizer, StopMatcher, Tokenizer};

use crate::engine::{Finish, Miss, Token};
use crate::request::Params;

/// Why an output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop token or a stop string.
    Stop,
    Length,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// What is new since the last delta of the same output.
#[derive(Debug, Default, PartialEq)]
pub struct Delta {
    pub text: String,
    /// The tokens behind `text`, if logprobs were asked for. One whose text is held back comes with the text.
    pub tokens: Vec<Token>,
    pub finish: Option<FinishReason>,
}

impl Delta {
    /// Whether a client would learn anything from it.
    pub fn tells(&self) -> bool {
        !self.text.is_empty() || !self.tokens.is_empty() || self.finish.is_some()
    }

    /// Adds what came after.
    pub fn extend(&mut self, next: Delta) {
        self.text += &next.text;
        self.tokens.extend(next.tokens);
        self.finish = next.finish;
    }
}

/// One sequence's output as it grows.
pub struct Output {
    /// None without a tokenizer: then there is no text.
    detokenizer: Option<Detokenizer>,
    stop: StopMatcher,
    /// Tokens that end the output and are not part of its text; ascending.
    stop_tokens: Arc<[i32]>,
    include_stop: bool,
    keep_tokens: bool,
    held: Vec<Token>,
    pub num_tokens: u32,
    pub num_cached: u32,
    pub num_restored: u32,
    pub miss: Option<Miss>,
    pub finish: Option<FinishReason>,
}

impl Output {
    pub fn new(tokenizer: Option<&Arc<Tokenizer>>, params: &Params, stop_tokens: Arc<[i32]>) -> Output {
        // The output continues the prompt: the space before its first word stays.
        let options = DecodeOptions { skip_special_tokens: params.skip_special_tokens, continues: true };
        Output {
            detokenizer: tokenizer.map(|tokenizer| Detokenizer::new(tokenizer, options)),
            stop: StopMatcher::new(params.stop.iter().cloned()),
            stop_tokens,
            include_stop: params.include_stop,
            keep_tokens: params.logprobs.is_some(),
            held: Vec::new(),
            num_tokens: 0,
            num_cached: 0,
            num_restored: 0,
            miss: None,
            finish: None,
        }
    }

    /// The next token. If its text completes a stop string, the output ends with it.
    pub fn token(&mut self, token: Token) -> Delta {
        if self.num_tokens == 0 {
            self.num_cached = token.num_cached;
            self.num_restored = token.num_restored;
            self.miss = token.miss;
        }
        self.num_tokens += 1;
        if self.stop_tokens.binary_search(&token.id.cast_signed()).is_ok() {
            // The engine ends the output here. The token counts, and is not shown.
            return Delta::default();
        }
        let piece = self.detokenizer.as_mut().map_or(String::new(), |detokenizer| detokenizer.push(token.id));
        if self.keep_tokens {
            self.held.push(token);
        }
        self.show(&piece)
    }

    /// The engine's last word; None if it gave up, with the reason in `finish`.
    pub fn finished(&mut self, finish: &Finish) -> Option<Delta> {
        let reason = match finish {
            Finish::Stop => FinishReason::Stop,
            Finish::Length => FinishReason::Length,
            Finish::Cancelled | Finish::TimedOut(_) | Finish::Error(_) => return None,
        };
        let piece = self.detokenizer.as_mut().map_or(String::new(), Detokenizer::finish);
        let mut delta = self.show(&piece);
        if delta.finish.is_none() {
            delta.text += &self.stop.finish();
            delta.finish = Some(reason);
        }
        delta.tokens.append(&mut self.held);
        self.finish = delta.finish;
        Some(delta)
    }

    fn show(&mut self, piece: &str) -> Delta {
        let mut emitted = self.stop.push(piece);
        if let Some(stop) = &emitted.stop {
            self.finish = Some(FinishReason::Stop);
            if self.include_stop {
                emitted.text += stop;
            }
        }
        let waits = emitted.text.is_empty() && self.finish.is_none() && self.detokenizer.is_some();
        let tokens = if waits { Vec::new() } else { std::mem::take(&mut self.held) };
        Delta { text: emitted.text, tokens, finish: self.finish }
    }
}

#[cfg(test)]
mod tests;
