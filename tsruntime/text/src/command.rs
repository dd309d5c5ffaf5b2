//! The commands around text, of `tsruntime text` and of `tstext`: for the compiler's comparison with the references, and for people.

use std::ffi::OsString;
use std::io::{self, BufRead, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::compile::compile;
use crate::decode::{DecodeOptions, Detokenizer};
use crate::error::TextError;
use crate::sandbox::serve_sandbox;
use crate::template::{Chat, TemplateError};
use crate::text::Text;
use crate::tokenizer::EncodeOptions;

const USAGE: &str = "\
compile CHECKPOINT_DIR -o DIR   compile tokenizer and chat template into DIR/tokenizer and DIR/template
encode DIR                      {\"text\": ..., \"add_special_tokens\": false, \"split_special_tokens\": false}  ->  {\"ids\": [...]}
decode DIR                      {\"ids\": [...], \"skip_special_tokens\": false, \"continues\": false, \"pieces\": false}
                                ->  {\"text\": ...}, and with pieces each id's text and bytes
render DIR                      {\"messages\": [...], \"tools\": ..., \"documents\": ..., \"add_generation_prompt\": false, \"kwargs\": {},
                                \"ids\": false, \"sanitize\": false}  ->  {\"text\": ...} or, if asked for, {\"ids\": [...]}
encode, decode and render read a JSON object a line and write one a line; what fails gives {\"error\": {\"kind\": ..., \"message\": ...}}";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EncodeRequest {
    text: String,
    #[serde(default)]
    add_special_tokens: bool,
    #[serde(default)]
    split_special_tokens: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DecodeRequest {
    ids: Vec<u32>,
    #[serde(default)]
    skip_special_tokens: bool,
    #[serde(default)]
    continues: bool,
    #[serde(default)]
    pieces: bool,
}

// What it does not name itself is the chat's, which says which of its fields are unknown.
#[derive(Deserialize)]
struct RenderRequest {
    #[serde(default)]
    ids: bool,
    #[serde(default)]
    sanitize: bool,
    #[serde(flatten)]
    chat: serde_json::Map<String, Value>,
}

/// Runs `arguments`, without the program's name. `prefix`: what came before them on the command line (`text`), which a child process is given too.
pub fn command(arguments: &[OsString], prefix: &[&str]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(|argument| argument.to_str().unwrap_or("")).collect();
    let worker = || ["/proc/self/exe"].iter().chain(prefix).chain(&["worker"]).map(OsString::from).collect::<Vec<_>>();
    let result = match words[..] {
        ["compile", _, "-o", _] => compile_into(Path::new(&arguments[1]), Path::new(&arguments[3])),
        ["encode", _] => open(&arguments[1], worker()).and_then(|text| serve_lines(|line| encode(&text, line))),
        ["decode", _] => open(&arguments[1], worker()).and_then(|text| serve_lines(|line| decode(&text, line))),
        ["render", _] => open(&arguments[1], worker()).and_then(|text| serve_lines(|line| render(&text, line))),
        ["worker"] => return serve_sandbox(),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn file(path: PathBuf) -> impl FnOnce(io::Error) -> TextError {
    move |source| TextError::File { path, source }
}

fn compile_into(checkpoint: &Path, out: &Path) -> Result<(), TextError> {
    let compiled = compile(checkpoint)?;
    std::fs::create_dir_all(out).map_err(file(out.to_owned()))?;
    for (name, bytes) in [("tokenizer", compiled.tokenizer), ("template", compiled.template)] {
        // Whole or not at all.
        let (path, partial) = (out.join(name), out.join(format!("{name}.partial")));
        std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, &path)).map_err(file(path))?;
    }
    Ok(())
}

fn open(dir: &OsString, worker: Vec<OsString>) -> Result<Text, TextError> {
    let read = |name: &str| {
        let path = Path::new(dir).join(name);
        std::fs::read(&path).map_err(file(path))
    };
    Text::open(read("tokenizer")?.into(), &read("template")?, worker)
}

/// Answers each line of standard input.
fn serve_lines(answer: impl Fn(&str) -> Result<Value, Value>) -> Result<(), TextError> {
    let io_error = |source| TextError::File { path: "standard input or output".into(), source };
    let mut out = BufWriter::new(io::stdout().lock());
    for line in io::stdin().lock().split(b'\n') {
        let line = line.map_err(io_error)?;
        let reply = match std::str::from_utf8(&line) {
            Ok(line) => answer(line),
            Err(error) => Err(request(error)),
        };
        let reply = reply.unwrap_or_else(|error| json!({ "error": error }));
        writeln!(out, "{reply}").map_err(io_error)?;
    }
    out.flush().map_err(io_error)
}

fn request(error: impl std::fmt::Display) -> Value {
    json!({ "kind": "request", "message": error.to_string() })
}

fn encode(text: &Text, line: &str) -> Result<Value, Value> {
    let EncodeRequest { text: source, add_special_tokens, split_special_tokens } =
        serde_json::from_str(line).map_err(request)?;
    let options = EncodeOptions { add_special_tokens, split_special_tokens, ..EncodeOptions::default() };
    Ok(json!({ "ids": text.tokenizer().encode(&source, &options) }))
}

fn decode(text: &Text, line: &str) -> Result<Value, Value> {
    let DecodeRequest { ids, skip_special_tokens, continues, pieces } = serde_json::from_str(line).map_err(request)?;
    let (tokenizer, options) = (text.tokenizer(), DecodeOptions { skip_special_tokens, continues });
    if !pieces {
        return Ok(json!({ "text": tokenizer.decode(&ids, options) }));
    }
    let mut detokenizer = Detokenizer::new(&Arc::clone(tokenizer), options);
    let mut texts: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    texts.push(detokenizer.finish());
    let bytes: Vec<Vec<u8>> = ids.iter().map(|&id| tokenizer.token_bytes(id)).collect();
    Ok(json!({ "text": texts.concat(), "pieces": texts, "bytes": bytes }))
}

fn render(text: &Text, line: &str) -> Result<Value, Value> {
    let RenderRequest { ids, sanitize, chat } = serde_json::from_str(line).map_err(request)?;
    let chat: Chat = serde_json::from_value(chat.into()).map_err(request)?;
    let failed = |error: TemplateError| {
        let mut kind = serde_json::to_value(&error).unwrap_or_default();
        json!({ "kind": kind["kind"].take(), "message": error.to_string() })
    };
    if ids || sanitize {
        return Ok(json!({ "ids": text.render_ids(&chat, sanitize).map_err(failed)? }));
    }
    Ok(json!({ "text": text.render(&chat).map_err(failed)? }))
}
