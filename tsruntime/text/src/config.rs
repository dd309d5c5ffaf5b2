//! What a compiled tokenizer does around its tables: a small JSON section of the blob.

use serde::{Deserialize, Serialize};

/// The word separator of SentencePiece vocabularies.
pub(crate) const META: char = '▁';

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Pieces are UTF-8 bytes (GPT-2, Llama 3, Qwen); else they are characters, with `▁` for a space (SentencePiece).
    pub byte_level: bool,
    pub normalizer: Vec<Normalize>,
    pub prefix: Prefix,
    pub splits: Vec<Split>,
    /// No token has `▁` after anything but `▁`: then a text may be cut before each such `▁`, and no merge can cross the cut.
    pub words_are_independent: bool,
    pub ignore_merges: bool,
    pub byte_fallback: bool,
    pub fuse_unk: bool,
    pub unk_id: Option<u32>,
    pub added: Vec<Added>,
    /// What the post-processor puts before and after a text.
    pub before: Vec<u32>,
    pub after: Vec<u32>,
    pub decoder: Decoder,
    pub special: SpecialIds,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Normalize {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
    Prepend(String),
    Replace(String, String),
}

/// How a chunk of text begins before it is split.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Prefix {
    None,
    /// ByteLevel's `add_prefix_space`: a space, unless one is there.
    Space,
    /// Metaspace: every space becomes `▁`, and one goes in front of the chunk (of the text's first chunk only).
    Meta,
    MetaFirst,
    MetaNever,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Split {
    /// Matches of a pattern, and what lies between them.
    Isolated(String),
    /// Matches of a pattern; what lies between them is dropped.
    Matches(String),
    /// Before each `▁`.
    Meta,
}

/// A token that is matched in the text before any splitting.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Added {
    pub id: u32,
    pub content: String,
    /// Matched in normalized text, as this; else in the raw text, as `content`.
    pub normalized: Option<String>,
    pub special: bool,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Decoder {
    Bytes,
    Pieces {
        /// Replacements in each token, in order.
        replace: Vec<(String, String)>,
        byte_fallback: bool,
        /// How many of which character are cut from the front of a text.
        strip: Option<(char, usize)>,
    },
}

/// Ids with a role, from the checkpoint's configuration files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub pad: Option<u32>,
    /// A generated token of these ends the sequence: generation_config.json's `eos_token_id`, else config.json's, and the tokenizer's own `eos_token`.
    pub eos: Vec<u32>,
}
