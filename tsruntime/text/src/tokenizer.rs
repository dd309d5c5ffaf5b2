//! Text to token ids.

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;

use crate::added::{Matcher, Segment};
use crate::bpe::Merger;
use crate::config::{Config, META, SpecialIds};
use crate::error::TextError;
use crate::normalize::{normalize, prefix};
use crate::split::{Splitter, each_meta};
use crate::tables::Tables;

/// Longer words are seldom seen twice.
const CACHED_WORD_MAX: usize = 64;
/// A shorter chunk repeats too few words to be worth a table.
const CACHED_CHUNK_MIN: usize = 256;

/// How a text is encoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add what the checkpoint's post-processor adds, such as a beginning-of-sequence token. Not for rendered chats: templates write their own.
    pub add_special_tokens: bool,
    /// Special tokens spelled out in the text are plain text (`split_special_tokens` of transformers).
    pub split_special_tokens: bool,
    /// Byte ranges, in order, in which every added token is plain text: what a user wrote into a chat.
    pub plain: Vec<Range<usize>>,
}

impl EncodeOptions {
    /// Whether a plain range lies across any of the bytes start..end; an empty range lies across what is on both of its sides.
    fn is_plain(&self, start: usize, end: usize) -> bool {
        // Ranges are in order: the first that ends after the start decides.
        let next = self.plain.partition_point(|range| range.end <= start);
        self.plain.get(next).is_some_and(|range| range.start < end)
    }
}

/// A checkpoint's tokenizer, read in place from its compiled form. Equal to Hugging Face tokenizers', token for token.
pub struct Tokenizer {
    pub(crate) tables: Tables,
    pub(crate) config: Config,
    splitters: Vec<Splitter>,
    raw: Matcher,
    normalized: Matcher,
    /// For pieces of bytes, and for byte fallback; `u32::MAX` where there is none.
    byte_ids: [u32; 256],
    /// For pieces of characters: most of them are ASCII.
    ascii_ids: [Option<u32>; 128],
    special: Vec<u32>,
}

/// What encoding one text needs.
struct Encoder<'t> {
    tokenizer: &'t Tokenizer,
    merger: Merger,
    ids: Vec<u32>,
}

impl Tokenizer {
    /// Opens the `tokenizer` blob of [`crate::CompiledText`]. Everything in it is checked first.
    pub fn open(blob: Bytes) -> Result<Tokenizer, TextError> {
        let (tables, config) = Tables::open(blob.clone())?;
        let config: Config = serde_json::from_slice(&blob[config])
            .map_err(|error| TextError::Corrupt(format!("its configuration: {error}")))?;
        let vocab = tables.vocab_size();
        let special = &config.special;
        let ids = config.added.iter().map(|token| token.id).chain(config.unk_id).chain(special.bos).chain(special.pad);
        let ids = ids.chain([&config.before, &config.after, &special.eos].into_iter().flatten().copied());
        for id in ids {
            if id as usize >= vocab {
                return Err(TextError::Corrupt(format!("token {id} of {vocab} in its configuration")));
            }
        }
        let splitters = config.splits.iter().map(Splitter::new).collect::<Result<_, _>>();
        let splitters = splitters.map_err(|error| TextError::Corrupt(error.0))?;
        let byte_ids = std::array::from_fn(|byte| {
            let found = if config.byte_level {
                tables.find(&[byte as u8])
            } else {
                tables.find(format!("<0x{byte:02X}>").as_bytes())
            };
            found.unwrap_or(u32::MAX)
        });
        let ascii_ids = std::array::from_fn(|char| tables.find(&[char as u8]));
        let mut special: Vec<u32> = config.added.iter().filter(|token| token.special).map(|token| token.id).collect();
        special.sort_unstable();
        let (raw, normalized) = (Matcher::new(&config.added, false)?, Matcher::new(&config.added, true)?);
        Ok(Tokenizer { tables, config, splitters, raw, normalized, byte_ids, ascii_ids, special })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str, options: &EncodeOptions) -> Vec<u32> {
        let mut encoder =
            Encoder { tokenizer: self, merger: Merger::default(), ids: Vec::with_capacity(text.len() / 3) };
        if options.add_special_tokens {
            encoder.ids.extend(&self.config.before);
        }
        let plain = |start: usize, end: usize, special: bool| {
            special && options.split_special_tokens || options.is_plain(start, end)
        };
        for segment in self.raw.segments(text, &plain) {
            match segment {
                Segment::Token(id) => encoder.ids.push(id),
                Segment::Text(part, at) => encoder.part(part, at, options),
            }
        }
        if options.add_special_tokens {
            encoder.ids.extend(&self.config.after);
        }
        encoder.ids
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.tables.vocab_size()
    }

    /// Bytes of the longest token. A text of more than `n` times as many bytes has more than `n` tokens, if no token swallows white space around it.
    pub fn token_bytes_max(&self) -> usize {
        (0..self.vocab_size() as u32).filter_map(|id| self.tables.token(id)).map(<[u8]>::len).max().unwrap_or(1)
    }

    /// The id of a token: an added token by its content, else a vocabulary entry by its bytes (of a byte-level tokenizer) or its piece.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let added = self.config.added.iter().find(|added| added.content == token);
        added.map(|added| added.id).or_else(|| self.tables.find(token.as_bytes()))
    }

    /// Whether `id` is a special token, which decoding leaves out when it is asked to.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// Beginning, padding and end of sequence.
    pub fn special_ids(&self) -> &SpecialIds {
        &self.config.special
    }

    /// Contents of the special tokens, and of all other added tokens.
    pub fn added_tokens(&self) -> impl Iterator<Item = (&str, bool)> {
        self.config.added.iter().map(|token| (token.content.as_str(), token.special))
    }
}

impl Encoder<'_> {
    /// A part of the raw text between two added tokens; `at` is its place.
    fn part(&mut self, part: &str, at: usize, options: &EncodeOptions) {
        let text = normalize(&self.tokenizer.config.normalizer, part);
        // Ranges speak of the raw text: where normalization moves bytes, what touches a range is plain altogether.
        let touched = options.is_plain(at, at + part.len());
        let plain = |_: usize, _: usize, special: bool| touched || special && options.split_special_tokens;
        for segment in self.tokenizer.normalized.segments(&text, &plain) {
            match segment {
                Segment::Token(id) => self.ids.push(id),
                Segment::Text(chunk, place) => self.chunk(chunk, at == 0 && place == 0),
            }
        }
    }

    fn chunk(&mut self, chunk: &str, first: bool) {
        let chunk = prefix(&self.tokenizer.config.prefix, chunk, first);
        let tokenizer = self.tokenizer;
        let mut seen: HashMap<&str, Range<usize>> = HashMap::new();
        let cached = chunk.len() >= CACHED_CHUNK_MIN;
        tokenizer.split(&tokenizer.splitters, &chunk, &mut |word| {
            if !cached || word.len() < 2 || word.len() > CACHED_WORD_MAX {
                return self.word(word);
            }
            if let Some(ids) = seen.get(word) {
                return self.ids.extend_from_within(ids.clone());
            }
            let start = self.ids.len();
            self.word(word);
            seen.insert(word, start..self.ids.len());
        });
    }

    fn word(&mut self, word: &str) {
        let Tokenizer { tables, config, .. } = self.tokenizer;
        if config.ignore_merges
            && let Some(id) = tables.find(word.as_bytes())
        {
            return self.ids.push(id);
        }
        self.symbols(word);
        self.merger.merge(tables, &mut self.ids);
    }

    /// The word's first symbols: its bytes or its characters. One that the vocabulary lacks falls back to its bytes, or to the unknown token.
    fn symbols(&mut self, word: &str) {
        let Tokenizer { tables, config, byte_ids, ascii_ids, .. } = self.tokenizer;
        let symbols = &mut self.merger.word;
        let mut unknown = None;
        let mut buffer = [0; 4];
        let mut add = |id: Option<u32>, bytes: &[u8]| {
            if let Some(id) = id {
                symbols.extend(unknown.take());
                symbols.push(id);
            } else if config.byte_fallback && bytes.iter().all(|&byte| byte_ids[usize::from(byte)] != u32::MAX) {
                symbols.extend(bytes.iter().map(|&byte| byte_ids[usize::from(byte)]));
            } else if let Some(id) = config.unk_id {
                if !config.fuse_unk {
                    symbols.extend(unknown);
                }
                unknown = Some(id);
            }
        };
        if config.byte_level {
            let id = |byte: u8| Some(byte_ids[usize::from(byte)]).filter(|&id| id != u32::MAX);
            word.bytes().for_each(|byte| add(id(byte), &[]));
        } else {
            word.chars().for_each(|char| {
                let piece = char.encode_utf8(&mut buffer).as_bytes();
                let id = ascii_ids.get(char as usize).copied().unwrap_or_else(|| tables.find(piece));
                add(id, piece);
            });
        }
        symbols.extend(unknown);
    }
}

impl Tokenizer {
    /// Calls `word` with the words of `chunk`: what merges cannot cross.
    fn split<'a>(&self, splitters: &[Splitter], chunk: &'a str, word: &mut dyn FnMut(&'a str)) {
        match splitters.split_first() {
            Some((splitter, rest)) => splitter.each(chunk, &mut |part| self.split(rest, part, word)),
            None if self.config.words_are_independent => {
                each_meta(chunk, |before| !before.ends_with(META), &mut |part| word(part))
            }
            None => word(chunk),
        }
    }
}
