//! `tsruntime text` without the rest of `tsruntime`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    tsruntime_text::command(&arguments, &[])
}
