//! `tsruntime replay`: a recorded run, once more.

use std::io::Write;

use serde_json::json;

use crate::cli::ReplayArgs;
use crate::engine;
use crate::error::{Exit, Failure, say};
use crate::plan::Plan;
use crate::ranks;

pub fn replay(arguments: &ReplayArgs) -> Result<(), Failure> {
    let load = arguments.options();
    let plan = Plan::open(&arguments.plan, load.always_verify)?;
    let options = ranks::started(&arguments.plan, &plan, &load)?;
    let (report, result) = engine::replay(&plan, &options, &arguments.trace);
    let difference = result.as_ref().err().filter(|failure| failure.exit == Exit::Differs);
    if result.is_ok() || difference.is_some() {
        let mut out = std::io::stdout().lock();
        if arguments.json {
            let answer = json!({
                "steps": report.num_steps,
                "requests": report.num_requests,
                "output_tokens": report.num_output_tokens,
                "bytes_cut_off": report.num_bytes_cut_off,
                "difference": difference.map(|failure| &failure.message),
            });
            writeln!(out, "{answer}")?;
        } else if result.is_ok() {
            let (steps, requests, tokens) = (report.num_steps, report.num_requests, report.num_output_tokens);
            writeln!(out, "as recorded: {steps} steps, {requests} requests, {tokens} output tokens")?;
        }
    }
    if report.num_bytes_cut_off > 0 {
        let bytes = report.num_bytes_cut_off;
        say(format!("the trace's last {bytes} bytes are a record that was not written whole, and are left out"));
    }
    result
}
