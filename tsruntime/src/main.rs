//! `tsruntime`: the front of the engine. Everything between a client and token ids.

mod cli;
mod commands;
mod engine;
mod engine_args;
mod engine_options;
mod error;
#[expect(non_camel_case_types, reason = "the names of csrc/engine.h")]
mod ffi;
mod fields;
mod generation;
mod json;
mod metrics;
mod model;
mod output;
mod plan;
mod ranks;
mod request;
mod run;
mod server;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use cli::{Cli, Command, Load};
use error::{Failure, say};

fn main() -> ExitCode {
    let started = Instant::now();
    let result = match Cli::parse().command {
        Command::Run(arguments) => ranks::follow_launched(&arguments.plan, &arguments.engine.options())
            .unwrap_or_else(|| commands::run(arguments, started)),
        Command::Replay(arguments) => ranks::follow_launched(&arguments.plan, &arguments.options())
            .unwrap_or_else(|| commands::replay(&arguments)),
        Command::Generate(arguments) => ranks::follow_launched(&arguments.plan, &arguments.engine.options())
            .unwrap_or_else(|| commands::generate(&arguments, started)),
        Command::Rank(arguments) => ranks::follow_started(&arguments.plan, arguments.rank, &arguments.engine.options()),
        Command::Bench { load: Some(Load::Agent(arguments)), .. } => commands::agent(&arguments),
        Command::Bench { arguments, .. } => ranks::follow_launched(arguments.plan(), &arguments.engine.options())
            .unwrap_or_else(|| commands::bench(&arguments, started)),
        Command::Text { arguments } => return tsruntime_text::command(&arguments, &["text"]),
    };
    ranks::finish();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { exit, message }) => {
            say(ranks::explain(&message));
            ExitCode::from(exit as u8)
        }
    }
}
