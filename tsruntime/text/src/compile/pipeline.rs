//! Everything of a tokenizer.json but the model: normalizer, pre-tokenizer, post-processor, decoder, added tokens.

use serde_json::Value;

use super::template::Files;
use super::{bad, model};
use crate::config::{Added, Config, Decoder, META, Normalize, Prefix, Split};
use crate::error::TextError;
use crate::normalize::normalize;
use crate::split::Splitter;
use crate::tables::{Parts, write};

/// The pattern of ByteLevel with `use_regex`: GPT-2's.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

pub(super) fn compile(tokenizer: &Value, files: &Files) -> Result<Vec<u8>, TextError> {
    let model = model::read(&tokenizer["model"])?;
    let mut normalizer = Vec::new();
    for step in steps(&tokenizer["normalizer"], "normalizers") {
        normalizer.push(read_normalizer(step)?);
    }
    let (byte_level, prefix, splits) = read_pre_tokenizer(&tokenizer["pre_tokenizer"])?;
    let decoder = read_decoder(&tokenizer["decoder"])?;
    if byte_level != (decoder == Decoder::Bytes) {
        return Err(refuse(
            "decoder",
            &tokenizer["decoder"],
            if byte_level { "ByteLevel, as the pre-tokenizer is" } else { "one of pieces, as the pre-tokenizer's" },
        ));
    }
    let (before, after) = read_post_processor(&tokenizer["post_processor"])?;
    let added = read_added(tokenizer, files, &model, &normalizer)?;
    let ids = model.ids.values().copied().chain(added.iter().map(|token| token.id));
    let mut tokens = vec![Vec::new(); ids.max().map_or(0, |id| id as usize + 1)];
    let bytes = |content: &str| if byte_level { byte_level_bytes(content) } else { None };
    let mut named = Vec::with_capacity(model.ids.len());
    for (token, &id) in &model.ids {
        let decoded = bytes(token);
        // An entry that is not spelled in the byte alphabet never equals a word of it.
        if !token.is_empty() && (decoded.is_some() || !byte_level) {
            named.push(id);
        }
        tokens[id as usize] = decoded.unwrap_or_else(|| token.clone().into_bytes());
    }
    for token in &added {
        tokens[token.id as usize] = bytes(&token.content).unwrap_or_else(|| token.content.clone().into_bytes());
    }
    named.sort_unstable();
    let find = |token: &str| {
        added
            .iter()
            .find(|added| added.content == token)
            .map(|added| added.id)
            .or_else(|| model.ids.get(token).copied())
    };
    let config = Config {
        byte_level,
        normalizer,
        prefix,
        splits,
        words_are_independent: !byte_level && model.words_are_independent,
        ignore_merges: model.ignore_merges,
        byte_fallback: model.byte_fallback,
        fuse_unk: model.fuse_unk,
        unk_id: model.unk_id,
        special: files.special_ids(&find, tokens.len())?,
        added,
        before,
        after,
        decoder,
    };
    let config = serde_json::to_vec(&config).expect("a plain structure");
    write(&Parts { config: &config, tokens: &tokens, named: &named, merges: &model.merges })
}

fn refuse(part: &str, found: &Value, known: &str) -> TextError {
    let mut found = found.to_string();
    if found.len() > 300 {
        found.truncate((0..=300).rev().find(|&at| found.is_char_boundary(at)).unwrap_or(0));
        found += "...";
    }
    bad(format!("tokenizer.json: {part} {found} is not supported; known is {known}"))
}

fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or("")
}

/// The steps of a component: none if it is null, the members of a Sequence, or itself.
fn steps<'a>(component: &'a Value, members: &str) -> Vec<&'a Value> {
    match component {
        Value::Null => Vec::new(),
        _ if kind(component) == "Sequence" => {
            component[members].as_array().into_iter().flatten().flat_map(|step| steps(step, members)).collect()
        }
        _ => vec![component],
    }
}

fn read_normalizer(step: &Value) -> Result<Normalize, TextError> {
    let text = |name: &str| step[name].as_str().map(str::to_owned);
    let normalize = match kind(step) {
        "NFC" => Some(Normalize::Nfc),
        "NFD" => Some(Normalize::Nfd),
        "NFKC" => Some(Normalize::Nfkc),
        "NFKD" => Some(Normalize::Nfkd),
        "Prepend" => text("prepend").map(Normalize::Prepend),
        "Replace" => step["pattern"]["String"]
            .as_str()
            .filter(|from| !from.is_empty())
            .zip(text("content"))
            .map(|(from, to)| Normalize::Replace(from.to_owned(), to)),
        _ => None,
    };
    normalize.ok_or_else(|| {
        refuse("normalizer", step, "NFC, NFD, NFKC, NFKD, Prepend, Replace of a string, and sequences of them")
    })
}

/// Whether words are bytes, how a chunk begins, and how it is split.
fn read_pre_tokenizer(component: &Value) -> Result<(bool, Prefix, Vec<Split>), TextError> {
    let (mut byte_level, mut prefix, mut splits) = (false, Prefix::None, Vec::new());
    for (i, step) in steps(component, "pretokenizers").into_iter().enumerate() {
        let known =
            "Split by a pattern (isolated, or removed and inverted), Digits, ByteLevel (last) and Metaspace (alone)";
        let unknown = || refuse("pre-tokenizer", step, known);
        if byte_level || prefix != Prefix::None {
            return Err(unknown());
        }
        let behavior = step["behavior"].as_str().unwrap_or("").to_lowercase();
        match kind(step) {
            "Split" => {
                let literal = step["pattern"]["String"].as_str().map(regex_syntax::escape);
                let pattern = step["pattern"]["Regex"].as_str().map(str::to_owned).or(literal).ok_or_else(unknown)?;
                let split = match (behavior.as_str(), step["invert"].as_bool().unwrap_or(false)) {
                    ("isolated", _) => Split::Isolated(pattern),
                    ("removed", true) => Split::Matches(pattern),
                    _ => return Err(unknown()),
                };
                Splitter::new(&split).map_err(|error| {
                    refuse(
                        "pre-tokenizer",
                        step,
                        &format!("a pattern without look-around but for \\s+(?!\\S): {}", error.0),
                    )
                })?;
                splits.push(split);
            }
            "Digits" => splits.push(Split::Isolated(
                if step["individual_digits"].as_bool().unwrap_or(false) { r"\p{N}" } else { r"\p{N}+" }.into(),
            )),
            "ByteLevel" => {
                byte_level = true;
                if step["add_prefix_space"].as_bool().unwrap_or(true) {
                    // It goes in front of every word that earlier steps have made.
                    if i > 0 {
                        return Err(unknown());
                    }
                    prefix = Prefix::Space;
                }
                if step["use_regex"].as_bool().unwrap_or(true) {
                    splits.push(Split::Isolated(GPT2.into()));
                }
            }
            "Metaspace" if i == 0 && step["replacement"].as_str() == Some(META.encode_utf8(&mut [0; 4])) => {
                let always = if step["add_prefix_space"].as_bool().unwrap_or(true) { "always" } else { "never" };
                prefix = match step["prepend_scheme"].as_str().unwrap_or(always) {
                    "always" => Prefix::Meta,
                    "first" => Prefix::MetaFirst,
                    "never" => Prefix::MetaNever,
                    _ => return Err(unknown()),
                };
                if step["split"].as_bool().unwrap_or(true) {
                    splits.push(Split::Meta);
                }
            }
            _ => return Err(unknown()),
        }
    }
    Ok((byte_level, prefix, splits))
}

fn read_decoder(component: &Value) -> Result<Decoder, TextError> {
    let unknown = || {
        refuse(
            "decoder",
            component,
            "ByteLevel, and the sequence Replace of strings, ByteFallback, Fuse, Strip of the front",
        )
    };
    let steps = steps(component, "decoders");
    if let [step] = steps[..]
        && kind(step) == "ByteLevel"
    {
        return Ok(Decoder::Bytes);
    }
    let (mut replace, mut byte_fallback, mut fused, mut strip) = (Vec::new(), false, false, None);
    for step in steps {
        match kind(step) {
            "Replace" if !byte_fallback && !fused => {
                let from = step["pattern"]["String"].as_str().filter(|from| !from.is_empty());
                let (from, to) = from.zip(step["content"].as_str()).ok_or_else(unknown)?;
                replace.push((from.to_owned(), to.to_owned()));
            }
            "ByteFallback" if !byte_fallback && !fused => byte_fallback = true,
            "Fuse" if !fused => fused = true,
            "Strip" if fused && strip.is_none() && step["stop"].as_u64() == Some(0) => {
                let mut content = step["content"].as_str().unwrap_or("").chars();
                let char = content.next().filter(|_| content.next().is_none()).ok_or_else(unknown)?;
                strip = Some((char, step["start"].as_u64().unwrap_or(0) as usize));
            }
            _ => return Err(unknown()),
        }
    }
    if !fused {
        return Err(unknown());
    }
    Ok(Decoder::Pieces { replace, byte_fallback, strip })
}

/// Ids before and after a single text.
fn read_post_processor(component: &Value) -> Result<(Vec<u32>, Vec<u32>), TextError> {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for step in steps(component, "processors") {
        let unknown =
            || refuse("post-processor", step, "ByteLevel, TemplateProcessing with one sequence, and sequences of them");
        match kind(step) {
            "ByteLevel" => {}
            "TemplateProcessing" => {
                let mut seen = false;
                let (mut front, mut back) = (Vec::new(), Vec::new());
                for item in step["single"].as_array().ok_or_else(unknown)? {
                    if let Some(token) = item["SpecialToken"]["id"].as_str() {
                        let ids = step["special_tokens"][token]["ids"].as_array().ok_or_else(unknown)?;
                        let ids =
                            ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(unknown));
                        if seen { &mut back } else { &mut front }.extend(ids.collect::<Result<Vec<u32>, _>>()?);
                    } else if item["Sequence"]["id"].as_str() == Some("A") && !seen {
                        seen = true;
                    } else {
                        return Err(unknown());
                    }
                }
                if !seen {
                    return Err(unknown());
                }
                before = [front, before].concat();
                after = [after, back].concat();
            }
            _ => return Err(unknown()),
        }
    }
    Ok((before, after))
}

/// The added tokens, with ids given as `Tokenizer.add_tokens` gives them: the vocabulary's, else the next free one. Those that only
/// tokenizer_config.json lists are added afterwards, as transformers does.
fn read_added(
    tokenizer: &Value,
    files: &Files,
    model: &model::Model,
    normalizer: &[Normalize],
) -> Result<Vec<Added>, TextError> {
    let mut added: Vec<Added> = Vec::new();
    let vocab = model.ids.len() as u32;
    let mut next = vocab;
    for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        add(&mut added, &mut next, token, model, normalizer)?;
    }
    next = added.iter().map(|token| token.id).max().filter(|&id| id >= vocab).map_or(vocab, |id| id + 1);
    for token in files.added_tokens() {
        if added.iter().all(|other| token["content"] != *other.content) {
            add(&mut added, &mut next, &token, model, normalizer)?;
        }
    }
    Ok(added)
}

fn add(
    added: &mut Vec<Added>,
    next: &mut u32,
    token: &Value,
    model: &model::Model,
    normalizer: &[Normalize],
) -> Result<(), TextError> {
    let content =
        token["content"].as_str().ok_or_else(|| bad(format!("tokenizer.json: added token {token} has no content")))?;
    if content.is_empty() {
        return Ok(());
    }
    let same = added.iter().position(|other| other.content == content);
    let known = same.map(|at| added[at].id).or_else(|| model.ids.get(content).copied());
    let id = known.unwrap_or(*next);
    *next += u32::from(known.is_none());
    if token["id"] != id {
        return Err(bad(format!(
            "tokenizer.json: added token {content:?} says id {}, but Hugging Face tokenizers gives it {id}",
            token["id"]
        )));
    }
    let flag = |name: &str| token[name].as_bool().unwrap_or(false);
    let entry = Added {
        id,
        content: content.to_owned(),
        normalized: token["normalized"].as_bool().unwrap_or(true).then(|| normalize(normalizer, content).into_owned()),
        special: flag("special"),
        single_word: flag("single_word"),
        lstrip: flag("lstrip"),
        rstrip: flag("rstrip"),
    };
    match same {
        Some(at) => added[at] = entry,
        None => added.push(entry),
    }
    Ok(())
}

/// What a token spelled in the byte alphabet stands for; None if it is not spelled in it.
fn byte_level_bytes(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes are U+0100 and up, in order.
fn byte_of(char: char) -> Option<u8> {
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = char as u32;
    match code {
        0x100..=0x143 => (0..=255u8).filter(|&byte| !printable(u32::from(byte))).nth(code as usize - 0x100),
        _ if printable(code) => Some(code as u8),
        _ => None,
    }
}
