use serde_json::json;

use super::*;
use crate::request::{Limits, completion};

/// A byte-level vocabulary of single bytes: "é" is two tokens.
fn tokenizer() -> Arc<Tokenizer> {
    static NUM: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let name = format!("tsruntime-{}-{}", std::process::id(), NUM.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir(&folder).unwrap();
    // GPT-2 writes a byte that is no printable character as one from U+0100 on.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let hidden: Vec<u32> = (0..256).filter(|&byte| !printable(byte)).collect();
    let char = |byte: u32| match hidden.iter().position(|&other| other == byte) {
        Some(place) => char::from_u32(256 + place as u32).unwrap(),
        None => char::from_u32(byte).unwrap(),
    };
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..256).map(|byte| (char(byte).to_string(), byte.into())).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });
    std::fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
    let compiled = tsruntime_text::compile(&folder).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    Arc::new(Tokenizer::open(compiled.tokenizer.into()).unwrap())
}

fn output(fields: serde_json::Value, stop_tokens: &[i32]) -> Output {
    let mut body = fields;
    body["prompt"] = "a".into();
    let limits = Limits { vocab_size: 256, context: 100, sequences: 1 };
    let params = completion(body, &limits).unwrap().params;
    Output::new(Some(&tokenizer()), &params, stop_tokens.into())
}

fn token(id: u8) -> Token {
    Token { id: id.into(), logprob: -1.0, top: Box::default(), num_cached: 3, num_restored: 0, miss: None }
}

/// Texts of the deltas, one a token and one for the end.
fn texts(output: &mut Output, text: &str, finish: &Finish) -> Vec<String> {
    let mut texts: Vec<String> = text.bytes().map(|byte| output.token(token(byte)).text).collect();
    texts.extend(output.finished(finish).map(|delta| delta.text));
    texts
}

#[test]
fn characters_come_whole() {
    let mut all = output(json!({}), &[]);
    assert_eq!(texts(&mut all, "aé😀", &Finish::Length), ["a", "", "é", "", "", "", "😀", ""]);
    assert_eq!((all.num_tokens, all.num_cached, all.finish), (7, 3, Some(FinishReason::Length)));
    let mut cut = output(json!({}), &[]);
    cut.token(token(0xC3));
    assert_eq!(cut.finished(&Finish::Length).unwrap().text, "\u{fffd}");
}

#[test]
fn a_stop_token_counts_and_is_not_shown() {
    let mut all = output(json!({}), &[i32::from(b'b'), i32::from(b'x')]);
    assert_eq!(texts(&mut all, "ab", &Finish::Stop), ["a", "", ""]);
    assert_eq!((all.num_tokens, all.finish), (2, Some(FinishReason::Stop)));
}

#[test]
fn a_stop_string_ends_the_output_across_tokens() {
    let mut all = output(json!({"stop": "cd"}), &[]);
    assert_eq!(all.token(token(b'b')).text, "b");
    assert_eq!(all.token(token(b'c')), Delta::default());
    let last = all.token(token(b'd'));
    assert_eq!((last.text.as_str(), last.finish), ("", Some(FinishReason::Stop)));
    let mut kept = output(json!({"stop": "cd", "include_stop_str_in_output": true}), &[]);
    kept.token(token(b'c'));
    assert_eq!(kept.token(token(b'd')).text, "cd");
    let mut held = output(json!({"stop": "cd"}), &[]);
    assert_eq!(texts(&mut held, "bc", &Finish::Length), ["b", "", "c"], "what proved to be no stop string is shown");
}

#[test]
fn logprobs_come_with_their_text() {
    let mut all = output(json!({"stop": "cd", "logprobs": 0}), &[]);
    let counts: Vec<usize> = "acéc".bytes().map(|byte| all.token(token(byte)).tokens.len()).collect();
    assert_eq!(counts, [1, 0, 0, 3, 0], "c may become a stop string until é is whole");
    let last = all.finished(&Finish::Length).unwrap();
    assert_eq!((last.text.as_str(), last.tokens.len()), ("c", 1));
}

#[test]
fn nothing_is_shown_of_what_failed() {
    let mut all = output(json!({}), &[]);
    assert_eq!(all.finished(&Finish::Error("no".into())), None);
    assert_eq!(all.finished(&Finish::Cancelled), None);
}

#[test]
fn without_a_tokenizer_there_are_tokens_only() {
    let limits = Limits { vocab_size: 256, context: 100, sequences: 1 };
    let params = completion(json!({"prompt": [1], "logprobs": 0}), &limits).unwrap().params;
    let mut all = Output::new(None, &params, Arc::default());
    let delta = all.token(token(7));
    assert_eq!((delta.text.as_str(), delta.tokens.len()), ("", 1));
}
