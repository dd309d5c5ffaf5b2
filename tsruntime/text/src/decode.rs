//! Token ids to text, all at once or as they are generated.

use std::sync::Arc;

use crate::config::Decoder;
use crate::tokenizer::Tokenizer;

/// How ids are decoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Leave special tokens out.
    pub skip_special_tokens: bool,
    /// The ids continue a text: the space that a SentencePiece decoder cuts from the front of a text is kept.
    pub continues: bool,
}

/// Turns a stream of ids into text. The pieces it returns, put together, are what Hugging Face's `decode` gives for all
/// ids; none of them ends within a character. Bytes that are not UTF-8 come out as U+FFFD, as there.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    options: DecodeOptions,
    /// Bytes that are not text yet: an unfinished character, or a run of byte-fallback tokens that may still prove malformed.
    held: Vec<u8>,
    /// Characters that may still be cut from the front.
    strip: usize,
}

/// What a token stands for in the text.
enum Piece<'t> {
    /// A part of a UTF-8 stream.
    Bytes(&'t [u8]),
    /// One byte of a fallback run.
    Fallback(u8),
    Text(String),
}

impl Tokenizer {
    fn piece(&self, id: u32) -> Option<Piece<'_>> {
        let token = self.tables.token(id)?;
        let Decoder::Pieces { replace, byte_fallback, .. } = &self.config.decoder else {
            return Some(Piece::Bytes(token));
        };
        // Pieces are written from strings, so they are UTF-8; a corrupt blob gets U+FFFD.
        let text = replace
            .iter()
            .fold(String::from_utf8_lossy(token).into_owned(), |text, (from, to)| text.replace(from.as_str(), to));
        let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if *byte_fallback => Some(Piece::Fallback(byte)),
            _ => Some(Piece::Text(text)),
        }
    }

    /// The bytes that token `id` adds to a text: for `logprobs`. Empty if there is no such token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.piece(id) {
            None => Vec::new(),
            Some(Piece::Bytes(bytes)) => bytes.to_vec(),
            Some(Piece::Fallback(byte)) => vec![byte],
            Some(Piece::Text(text)) => text.into_bytes(),
        }
    }

    /// The text of `ids`.
    pub fn decode(self: &Arc<Self>, ids: &[u32], options: DecodeOptions) -> String {
        let mut detokenizer = Detokenizer::new(self, options);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text += &detokenizer.finish();
        text
    }
}

impl Detokenizer {
    pub fn new(tokenizer: &Arc<Tokenizer>, options: DecodeOptions) -> Detokenizer {
        let strip = match &tokenizer.config.decoder {
            Decoder::Pieces { strip: Some((_, count)), .. } if !options.continues => *count,
            _ => 0,
        };
        Detokenizer { tokenizer: tokenizer.clone(), options, held: Vec::new(), strip }
    }

    /// The text that `id` completes: empty while a character is unfinished. An id without a token adds nothing.
    pub fn push(&mut self, id: u32) -> String {
        let tokenizer = self.tokenizer.clone();
        if self.options.skip_special_tokens && tokenizer.is_special(id) {
            return String::new();
        }
        match tokenizer.piece(id) {
            None => String::new(),
            Some(Piece::Bytes(bytes)) => {
                self.held.extend_from_slice(bytes);
                self.complete()
            }
            Some(Piece::Fallback(byte)) => {
                self.held.push(byte);
                String::new()
            }
            Some(Piece::Text(text)) => {
                let run = self.run();
                self.cut(run + &text)
            }
        }
    }

    /// What was held back. Call it once, at the end of the ids.
    pub fn finish(&mut self) -> String {
        match &self.tokenizer.config.decoder {
            Decoder::Bytes => String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned(),
            Decoder::Pieces { .. } => {
                let run = self.run();
                self.cut(run)
            }
        }
    }

    /// All whole characters of the held bytes. What cannot become one, whatever follows, is U+FFFD.
    fn complete(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        loop {
            match std::str::from_utf8(&self.held[done..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    done = self.held.len();
                }
                Err(error) => {
                    let valid = &self.held[done..done + error.valid_up_to()];
                    text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
                    done += error.valid_up_to();
                    if let Some(length) = error.error_len() {
                        text.push(char::REPLACEMENT_CHARACTER);
                        done += length;
                        continue;
                    }
                }
            }
            self.held.drain(..done);
            return text;
        }
    }

    /// The text of a finished run of byte-fallback tokens: if it is malformed anywhere, every byte is U+FFFD.
    fn run(&mut self) -> String {
        let bytes = std::mem::take(&mut self.held);
        String::from_utf8(bytes).unwrap_or_else(|error| "\u{fffd}".repeat(error.as_bytes().len()))
    }

    fn cut(&mut self, mut text: String) -> String {
        if let Decoder::Pieces { strip: Some((char, _)), .. } = self.tokenizer.config.decoder {
            while self.strip > 0 && text.starts_with(char) {
                text.remove(0);
                self.strip -= 1;
            }
            if !text.is_empty() {
                self.strip = 0;
            }
        }
        text
    }
}
