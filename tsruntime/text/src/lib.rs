//! Text on its way to and from a model: tokenizer, chat template, streamed text. No engine, no HTTP.
//!
//! A checkpoint's text files are compiled once ([`compile()`]) into two blobs of bytes, which a plan carries; [`Text::open`] reads them in place.
//!
//! | module | what it is |
//! |---|---|
//! | `compile` | tokenizer.json and chat template to blobs; names what it cannot compile |
//! | `tables`, `bpe`, `split`, `added`, `normalize` | what `tokenizer` encodes with |
//! | `decode`, `stop` | ids to text as they come; stop strings in that text |
//! | `template`, `python`, `sandbox` | chats to prompts, with a budget |
//! | `command` | `tsruntime text`: the same as commands that read and write a JSON object a line |
//!
//! # Why a tokenizer of our own
//!
//! The promise is threefold: token ids equal to Hugging Face tokenizers', a vocabulary of 150,000 ready within 100 ms of process start, and 50,000
//! tokens encoded in 30 ms. Each library keeps two thirds of it. Measured on a 2-core EPYC, one thread, 200 KB of Python's sources (47,514 tokens of
//! Qwen, 58,727 of Mistral v1); "differs" counts texts of 11,775 source files and 10,000 random strings:
//!
//! | | open, Qwen | encode, Qwen | encode, Mistral | differs: Qwen, Llama 3, Mistral | |
//! |---|---|---|---|---|---|
//! | tokenizers 1.0.0-rc.3 | 544 ms | 2.5 ms | 20 ms | | builds its hash tables at every start; a pre-release |
//! | fastokens 0.3.5 | 1,216 ms | 10 ms | 6 ms | 0, 0, 0 | reads JSON at every start; no Metaspace |
//! | kitoken 0.11.1 | 35 ms | 15 ms | 44 ms | 0, 0, 4,536 | takes merges in the order of ids; no `lstrip`, `single_word` |
//! | tokie 0.1.4 | 25 ms | 4 ms | 30 ms | 182, 683, 0 | alpha; indexes with what its file says |
//! | this crate | 6 ms | 7 ms | 11 ms | 0, 0, 0 | |
//!
//! So the merge loop and its tables are ours (`bpe`, `tables`: 300 lines), borrowed from the plan's bytes with nothing to build. The rest is made of
//! libraries: regex-automata splits (its Unicode tables are those of Oniguruma as Hugging Face ships it, compared over every code point; patterns where
//! they are not, `\w` for one, are refused), aho-corasick finds added tokens, and unicode-normalization-alignments, Hugging Face's own, normalizes.
//!
//! # Templates are programs
//!
//! A chat template comes from a checkpoint, and can be written to burn a server down. minijinja counts instructions, but one instruction may double a
//! string, compare nested lists for an hour, or overflow the stack when a value is dropped. So templates run in a child process with hard limits
//! ([`Sandbox`]); the server itself never parses one.

mod added;
mod bpe;
mod command;
mod compile;
mod config;
mod decode;
mod error;
mod normalize;
mod python;
mod sandbox;
mod split;
mod stop;
mod tables;
mod template;
mod text;
mod tokenizer;

pub use command::command;
pub use compile::{CompiledText, compile};
pub use config::SpecialIds;
pub use decode::{DecodeOptions, Detokenizer};
pub use error::TextError;
pub use sandbox::{Sandbox, serve_sandbox};
pub use stop::{Emitted, StopMatcher};
pub use template::{Chat, Renderer, TemplateError, Templates};
pub use text::Text;
pub use tokenizer::{EncodeOptions, Tokenizer};
