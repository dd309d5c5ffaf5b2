//! Text on its way to and from a model.
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
