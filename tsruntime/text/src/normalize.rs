//! Normalizers. Unicode forms come from the crate that Hugging Face's tokenizers use, for the same Unicode version.

use std::borrow::Cow;

use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::config::{META, Normalize, Prefix};

fn step<'a>(step: &Normalize, text: Cow<'a, str>) -> Cow<'a, str> {
    let form =
        |normalized: &mut dyn Iterator<Item = (char, isize)>| normalized.map(|(char, _)| char).collect::<String>();
    match step {
        // ASCII is the same in every form.
        Normalize::Nfc | Normalize::Nfd | Normalize::Nfkc | Normalize::Nfkd if text.is_ascii() => text,
        Normalize::Nfc if is_nfc_quick(text.chars()) == IsNormalized::Yes => text,
        Normalize::Nfc => form(&mut text.nfc()).into(),
        Normalize::Nfd => form(&mut text.nfd()).into(),
        Normalize::Nfkc => form(&mut text.nfkc()).into(),
        Normalize::Nfkd => form(&mut text.nfkd()).into(),
        Normalize::Prepend(prefix) if !text.is_empty() => format!("{prefix}{text}").into(),
        Normalize::Prepend(_) => text,
        Normalize::Replace(from, to) if text.contains(from.as_str()) => text.replace(from.as_str(), to).into(),
        Normalize::Replace(..) => text,
    }
}

pub(crate) fn normalize<'a>(steps: &[Normalize], text: &'a str) -> Cow<'a, str> {
    steps.iter().fold(Cow::Borrowed(text), |text, each| step(each, text))
}

/// Puts in front of a chunk what its pre-tokenizer puts there. `first`: the chunk begins the text.
pub(crate) fn prefix<'a>(prefix: &Prefix, chunk: &'a str, first: bool) -> Cow<'a, str> {
    let meta = |wanted: bool| {
        let text = step(&Normalize::Replace(" ".into(), META.into()), chunk.into());
        if wanted && !text.starts_with(META) { format!("{META}{text}").into() } else { text }
    };
    match prefix {
        Prefix::None => chunk.into(),
        Prefix::Space if chunk.starts_with(' ') => chunk.into(),
        Prefix::Space => format!(" {chunk}").into(),
        Prefix::Meta => meta(true),
        Prefix::MetaFirst => meta(first),
        Prefix::MetaNever => meta(false),
    }
}
