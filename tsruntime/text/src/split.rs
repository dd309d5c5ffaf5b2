//! Cutting a chunk of text into words, as the `Split` steps of a pre-tokenizer do.

use regex_automata::meta::{BuildError, Regex};
use regex_automata::{Anchored, Input};
use regex_syntax::hir::Hir;

use crate::config::{META, Split};

/// The one look-around that published patterns use: white space, but for its last character where a word follows.
const LOOKAHEAD: &str = r"\s+(?!\S)";
/// Of the patterns that replace it, this one matches a character too many.
const LOOKAHEAD_PATTERN: usize = 2;

pub(crate) enum Splitter {
    Pattern { regex: Regex, keep_gaps: bool },
    Meta,
}

/// Why a pattern cannot be used.
#[derive(Debug)]
pub(crate) struct PatternError(pub String);

impl From<BuildError> for PatternError {
    fn from(error: BuildError) -> Self {
        // The cause names the place in the pattern.
        let cause = error.syntax_error().map(ToString::to_string);
        PatternError(cause.unwrap_or_else(|| error.to_string()))
    }
}

/// The alternatives of `pattern` around its look-ahead, as patterns without one: at any position, what
/// `\s+(?!\S)` matches is white space up to the end, or else all but the last of at least two such characters.
fn without_lookahead(pattern: &str) -> Vec<String> {
    let Some((before, after)) = pattern.split_once(LOOKAHEAD) else {
        return vec![pattern.to_owned()];
    };
    // Only as an alternative of its own, at the top level.
    let (Some(before), Some(after)) = (before.strip_suffix('|'), after.strip_prefix('|')) else {
        return vec![pattern.to_owned()];
    };
    vec![before.to_owned(), r"\s+\z".to_owned(), r"\s+\s".to_owned(), after.to_owned()]
}

/// What Rust's tables and Oniguruma's do not agree on; they do on `\s`, `\d`, and on the general categories and scripts.
const DIFFERENT: [&str; 3] = [r"\w", r"\W", "[:"];

/// A pattern that can match nothing, or that looks around, would not be found as Oniguruma finds it.
fn check(hir: &Hir, pattern: &str) -> Result<(), PatternError> {
    if let Some(class) = DIFFERENT.iter().find(|class| pattern.contains(*class)) {
        return Err(PatternError(format!("{pattern:?} uses {class}, which is another set of characters in Oniguruma")));
    }
    if hir.properties().minimum_len().is_none_or(|length| length == 0) {
        return Err(PatternError(format!("{pattern:?} can match nothing")));
    }
    if !hir.properties().look_set().is_empty() {
        return Err(PatternError(format!("{pattern:?} has an anchor or a word boundary")));
    }
    Ok(())
}

impl Splitter {
    pub fn new(split: &Split) -> Result<Splitter, PatternError> {
        let (pattern, keep_gaps) = match split {
            Split::Isolated(pattern) => (pattern, true),
            Split::Matches(pattern) => (pattern, false),
            Split::Meta => return Ok(Splitter::Meta),
        };
        let patterns = without_lookahead(pattern);
        for (i, part) in patterns.iter().enumerate() {
            let hir = regex_syntax::parse(part).map_err(|error| PatternError(error.to_string()))?;
            if i == 0 || i > LOOKAHEAD_PATTERN {
                check(&hir, part)?;
            }
        }
        Ok(Splitter::Pattern { regex: Regex::new_many(&patterns)?, keep_gaps })
    }

    /// Calls `word` with the words of `chunk`, in order.
    pub fn each<'a>(&self, chunk: &'a str, word: &mut impl FnMut(&'a str)) {
        match self {
            Splitter::Meta => each_meta(chunk, |_| true, word),
            Splitter::Pattern { regex, keep_gaps } => {
                let mut at = 0;
                while at < chunk.len() {
                    // Published patterns leave no gaps: try here first, which needs no search backwards.
                    let here = regex.search_half(&Input::new(chunk).range(at..).anchored(Anchored::Yes));
                    let (start, mut end, pattern) = match here {
                        Some(half) => (at, half.offset(), half.pattern()),
                        None => match regex.search(&Input::new(chunk).range(at..)) {
                            Some(found) => (found.start(), found.end(), found.pattern()),
                            None => (chunk.len(), chunk.len(), regex_automata::PatternID::ZERO),
                        },
                    };
                    if pattern.as_usize() == LOOKAHEAD_PATTERN {
                        end -= chunk[start..end].chars().next_back().map_or(0, char::len_utf8);
                    }
                    if *keep_gaps && at < start {
                        word(&chunk[at..start]);
                    }
                    if start < end {
                        word(&chunk[start..end]);
                    }
                    at = end;
                }
            }
        }
    }
}

/// Cuts before each `▁` that is not the first character, and of which `cut` approves, given what lies before it.
pub(crate) fn each_meta<'a>(chunk: &'a str, cut: impl Fn(&str) -> bool, word: &mut impl FnMut(&'a str)) {
    let mut buffer = [0; 4];
    let mut start = 0;
    for at in memchr::memmem::find_iter(chunk.as_bytes(), META.encode_utf8(&mut buffer).as_bytes()) {
        if at > start && cut(&chunk[start..at]) {
            word(&chunk[start..at]);
            start = at;
        }
    }
    if start < chunk.len() {
        word(&chunk[start..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    fn words(split: &Split, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        Splitter::new(split).unwrap().each(text, &mut |word| words.push(word.to_owned()));
        words
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_word() {
        let split = Split::Isolated(QWEN.into());
        assert_eq!(words(&split, "a   b"), ["a", "  ", " b"]);
        assert_eq!(
            words(&split, "a b \t\n x1\u{3000}\u{3000}2  "),
            ["a", " b", " \t\n", " x", "1", "\u{3000}", "\u{3000}", "2", "  "]
        );
        assert_eq!(words(&split, "it's  \r\n"), ["it", "'s", "  \r\n"]);
        assert_eq!(words(&split, "   "), ["   "]);
        assert!(words(&split, "").is_empty());
    }

    #[test]
    fn gaps_are_kept_or_dropped() {
        assert_eq!(words(&Split::Isolated(r"\d".into()), "ab12c"), ["ab", "1", "2", "c"]);
        assert_eq!(words(&Split::Matches(r"[a-z]+".into()), "ab12c"), ["ab", "c"]);
        assert_eq!(words(&Split::Meta, "a▁b▁▁c▁"), ["a", "▁b", "▁", "▁c", "▁"]);
    }

    #[test]
    fn patterns_that_oniguruma_would_read_otherwise_are_refused() {
        for pattern in
            [r"a*", r"^a", r"a$", r"\ba", r"a(?=b)", r"(?<!a)b", r"(a", r"x|\s+(?!\S)", r"\w+", r"[[:alpha:]]"]
        {
            assert!(Splitter::new(&Split::Isolated(pattern.into())).is_err(), "{pattern}");
        }
    }
}
