//! Finding added tokens in a text, as Hugging Face's `AddedVocabulary::find_matches` does.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::config::Added;
use crate::error::TextError;

/// A token that is matched, and how.
#[derive(Clone, Copy)]
struct Rule {
    id: u32,
    special: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
}

/// The added tokens that are matched in raw text, or those that are matched in normalized text.
pub(crate) struct Matcher {
    /// None where there are no such tokens.
    tokens: Option<AhoCorasick>,
    rules: Vec<Rule>,
}

/// A part of a text: an added token, or what lies between two.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Segment<'a> {
    Token(u32),
    /// With its place in the text, in bytes.
    Text(&'a str, usize),
}

impl Matcher {
    pub fn new(added: &[Added], normalized: bool) -> Result<Matcher, TextError> {
        let chosen: Vec<&Added> = added.iter().filter(|token| token.normalized.is_some() == normalized).collect();
        let text = |token: &Added| token.normalized.clone().unwrap_or_else(|| token.content.clone());
        let rules = chosen.iter().map(|token| Rule {
            id: token.id,
            special: token.special,
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
        });
        let build = || {
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(chosen.iter().map(|token| text(token)))
        };
        let tokens = if chosen.is_empty() {
            None
        } else {
            Some(build().map_err(|error| TextError::Corrupt(error.to_string()))?)
        };
        Ok(Matcher { tokens, rules: rules.collect() })
    }

    /// Cuts `text` at its added tokens. `plain` says of a match in bytes start..end and whether it is special if it is to stay plain text.
    pub fn segments<'a>(&self, text: &'a str, plain: &dyn Fn(usize, usize, bool) -> bool) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let mut done = 0;
        for found in self.tokens.iter().flat_map(|tokens| tokens.find_iter(text)) {
            let rule = self.rules[found.pattern().as_usize()];
            let (mut start, mut end) = (found.start(), found.end());
            if plain(start, end, rule.special) {
                continue;
            }
            let (before, after) = (&text[..start], &text[end..]);
            if rule.single_word
                && (before.chars().next_back().is_some_and(is_word) || after.chars().next().is_some_and(is_word))
            {
                continue;
            }
            if rule.lstrip {
                start = before.trim_end().len().max(done);
            }
            if rule.rstrip {
                end += after.len() - after.trim_start().len();
            }
            if done < start {
                segments.push(Segment::Text(&text[done..start], done));
            }
            segments.push(Segment::Token(rule.id));
            done = end;
        }
        if done < text.len() {
            segments.push(Segment::Text(&text[done..], done));
        }
        segments
    }
}

fn is_word(char: char) -> bool {
    regex_syntax::is_word_character(char)
}
