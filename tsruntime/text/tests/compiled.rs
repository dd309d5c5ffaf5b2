//! Compiled text: the same files give the same bytes, corrupt bytes give an error, and unknown kinds are refused by name.

// A list of one range is what is meant.
#![allow(clippy::single_range_in_vec_init)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tsruntime_text::{DecodeOptions, EncodeOptions, Templates, Text, Tokenizer, compile};

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = std::env::temp_dir().join(format!("tsruntime-text-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn write(&self, name: &str, content: &Value) -> &Folder {
        std::fs::write(self.0.join(name), content.to_string()).unwrap();
        self
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tokenizer() -> Value {
    json!({
        "added_tokens": [
            { "id": 7, "content": "<end>", "special": true, "normalized": false },
            { "id": 8, "content": "<tool>", "special": false, "normalized": true },
        ],
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel" },
        "model": {
            "type": "BPE",
            "vocab": { "a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "Ã": 5, "©": 6 },
            "merges": [["a", "b"], "Ġ ab"],
        },
    })
}

fn compiled(name: &str, tokenizer: &Value) -> Result<tsruntime_text::CompiledText, String> {
    let folder = Folder::new(name);
    folder.write("tokenizer.json", tokenizer);
    compile(&folder.0).map_err(|error| error.to_string())
}

fn open(name: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::open(compiled(name, &tokenizer()).unwrap().tokenizer.into()).unwrap())
}

#[test]
fn ids_and_text() {
    let tokenizer = open("ids");
    let encode = |text: &str, options: &EncodeOptions| tokenizer.encode(text, options);
    let options = EncodeOptions::default();
    assert_eq!(encode("ab abé<end>a<tool>", &options), [3, 4, 5, 6, 7, 0, 8]);
    assert!(encode("<end>", &EncodeOptions { split_special_tokens: true, ..options.clone() }).is_empty());
    assert_eq!(encode("<end>a<end>", &EncodeOptions { plain: vec![6..11, 11..11], ..options.clone() }), [7, 0]);
    // A range that ends or begins within a token keeps it plain; an empty one does so only inside.
    assert!(encode("<end>", &EncodeOptions { plain: vec![2..2], ..options.clone() }).is_empty());
    assert_eq!(encode("<end>", &EncodeOptions { plain: vec![0..0, 5..5], ..options }), [7]);
    assert_eq!(tokenizer.decode(&[4, 5, 6, 7, 99], DecodeOptions::default()), " abé<end>");
    assert_eq!(tokenizer.decode(&[5, 0, 5], DecodeOptions::default()), "\u{fffd}a\u{fffd}");
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_bytes_max()), (9, 6));
    assert_eq!(
        (tokenizer.token_to_id("<end>"), tokenizer.token_to_id(" ab"), tokenizer.token_to_id("c")),
        (Some(7), Some(4), None)
    );
}

#[test]
fn the_same_files_give_the_same_bytes() {
    assert_eq!(compiled("once", &tokenizer()).unwrap(), compiled("twice", &tokenizer()).unwrap());
}

#[test]
fn corrupt_bytes_are_an_error_or_harmless() {
    let blob = compiled("corrupt", &tokenizer()).unwrap().tokenizer;
    for cut in 0..blob.len() {
        assert!(Tokenizer::open(blob[..cut].to_vec().into()).is_err(), "cut at {cut}");
    }
    for at in 0..blob.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = blob.clone();
            bytes[at] ^= flip;
            // A plan's hashes find the rest; here it must only not panic, hang, or ask for memory without end.
            if let Ok(tokenizer) = Tokenizer::open(bytes.into()) {
                let tokenizer = Arc::new(tokenizer);
                let ids = tokenizer.encode(
                    "ab abé<end>a<tool> b",
                    &EncodeOptions { add_special_tokens: true, ..EncodeOptions::default() },
                );
                tokenizer.decode(&ids, DecodeOptions::default());
                (0..300).for_each(|id| drop(tokenizer.token_bytes(id)));
            }
        }
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let cases = [
        ("/model/type", json!("Unigram"), "the model is Unigram; known is BPE"),
        ("/model/type", json!("WordPiece"), "the model is WordPiece"),
        ("/model/vocab/ab", json!(1), "both have id 1"),
        ("/model/vocab/ab", json!(1u64 << 40), "has id 1099511627776"),
        ("/model/vocab/ab", json!(-1), "has id -1"),
        ("/model/merges/0", json!(["a", "z"]), "\"z\" is not in the vocabulary"),
        ("/model/merges/0", json!("ab"), "a pair of tokens is wanted"),
        ("/normalizer", json!({ "type": "Precompiled" }), "normalizer {\"type\":\"Precompiled\"} is not supported"),
        ("/pre_tokenizer", json!({ "type": "BertPreTokenizer" }), "pre-tokenizer {\"type\":\"BertPreTokenizer\"}"),
        (
            "/pre_tokenizer",
            json!({ "type": "Split", "pattern": { "Regex": "(?<=a)b" }, "behavior": "Isolated" }),
            "without look-around",
        ),
        ("/decoder", json!({ "type": "WordPiece" }), "decoder {\"type\":\"WordPiece\"}"),
        ("/decoder", Value::Null, "decoder null"),
        ("/post_processor", json!({ "type": "BertProcessing" }), "post-processor {\"type\":\"BertProcessing\"}"),
        ("/added_tokens/0/id", json!(70), "says id 70, but Hugging Face tokenizers gives it 7"),
    ];
    for (pointer, value, message) in cases {
        let mut tokenizer = tokenizer();
        *tokenizer.pointer_mut(pointer).unwrap() = value;
        let error = compiled("refused", &tokenizer).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let error = compile(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/tokenizer.json: no such file"), "{error}");
}

#[test]
fn roles_and_templates_come_from_the_checkpoint() {
    let folder = Folder::new("roles");
    folder.write("tokenizer.json", &tokenizer());
    folder.write("config.json", &json!({ "eos_token_id": 1 }));
    folder.write("generation_config.json", &json!({ "eos_token_id": [6, 3] }));
    let named = json!([{ "name": "default", "template": "d" }, { "name": "tool_use", "template": "t" }]);
    let token = json!({ "content": "<late>", "special": true, "normalized": false });
    let config = json!({ "eos_token": { "content": "<end>" }, "bos_token": "a", "chat_template": named, "added_tokens_decoder": { "9": token } });
    folder.write("tokenizer_config.json", &config);
    let compiled = compile(&folder.0).unwrap();
    let text = Text::open(compiled.tokenizer.into(), &compiled.template, Vec::new()).unwrap();
    let special = text.tokenizer().special_ids();
    assert_eq!((special.bos, special.pad, &special.eos[..]), (Some(0), None, &[3, 6, 7][..]));
    assert_eq!(text.tokenizer().encode("<late>", &EncodeOptions::default()), [9]);
    assert!(text.chat().is_ok());
    assert!(Templates::open(b"{}").is_err());
    // A file of its own replaces what the configuration says; without any template the blob is empty.
    std::fs::write(folder.0.join("chat_template.jinja"), "{{ 1 +").unwrap();
    let error = compile(&folder.0).unwrap_err().to_string();
    assert!(error.contains("chat template \"default\"") && error.contains("default:1"), "{error}");
    std::fs::remove_file(folder.0.join("chat_template.jinja")).unwrap();
    folder.write("tokenizer_config.json", &json!({}));
    let compiled = compile(&folder.0).unwrap();
    assert!(compiled.template.is_empty());
    let text = Text::open(compiled.tokenizer.into(), &compiled.template, Vec::new()).unwrap();
    assert!(text.chat().err().unwrap().to_string().contains("no chat template"));
}
