//! `tsruntime`: the front of the engine. Everything between a client and token ids.

mod cli;
mod commands;
mod engine;
mod error;
#[expect(non_camel_case_types, reason = "the names of csrc/engine.h")]
mod ffi;
mod fields;
mod generation;
mod json;
mod metrics;
mod model;
mod output;
mod request;
mod server;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use cli::{Cli, Command, Load};
use error::{Failure, say};

fn main() -> ExitCode {
    let started = Instant::now();
    let result = match Cli::parse().command {
        Command::Run(arguments) => commands::run(arguments, started),
        Command::Generate(arguments) => commands::generate(&arguments, started),
        Command::Bench { load: Some(Load::Agent(arguments)), .. } => commands::agent(&arguments),
        Command::Bench { plan, .. } => commands::bench(&plan.expect("clap demands a plan, or a load"), started),
        Command::Text { arguments } => return tsruntime_text::command(&arguments, &["text"]),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { exit, message }) => {
            say(message);
            ExitCode::from(exit as u8)
        }
    }
}
