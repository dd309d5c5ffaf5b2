//! Rendering in a process of its own, which a template may exhaust without harm to the one that serves.
//!
//! A template is code from the checkpoint. An interpreter inside the server cannot bound what a single operation of it may do (a string
//! doubled forty times, a comparison of nested lists, a stack overflow while a value is dropped); the kernel can. The child is this
//! executable with another subcommand. It reads chats and writes prompts, a JSON line each; it limits its own memory and CPU time, and ends
//! with its parent's pipe. A render costs about a tenth of a millisecond more than one in the same process.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::template::{Chat, Renderer, TemplateError, Templates};

/// Memory that a rendering may write to, its own code aside.
const MEMORY_BYTES_MAX: u64 = 128 << 20;
/// CPU time of one rendering.
const TIME_MS_MAX: u64 = 500;
/// How often the time is looked at.
const WATCH_MS: u64 = 20;
/// The exit code of a child that took too long.
const TIME_EXIT: u8 = 3;
/// Idle children that are kept for the next chats.
const IDLE_MAX: usize = 2;

/// Renders chats in child processes. Shared by threads; each rendering blocks its caller.
pub struct Sandbox {
    program: Vec<OsString>,
    /// The first line that a child reads.
    templates: Vec<u8>,
    idle: Mutex<Vec<Worker>>,
}

struct Worker {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn process(error: impl std::fmt::Display) -> TemplateError {
    TemplateError::Process(error.to_string())
}

impl Sandbox {
    /// `program`: the command that runs [`serve_sandbox`], for `tsruntime` itself `/proc/self/exe text worker`.
    pub fn new(templates: &Templates, program: Vec<OsString>) -> Sandbox {
        Sandbox { program, templates: [templates.to_bytes(), b"\n".to_vec()].concat(), idle: Mutex::default() }
    }

    /// Starts a child for the first chat, which then need not wait for it.
    pub fn warm(&self) -> Result<(), TemplateError> {
        let worker = self.start()?;
        self.put(worker);
        Ok(())
    }

    /// The prompt of a chat.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        let mut request = serde_json::to_vec(chat).map_err(process)?;
        request.push(b'\n');
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut worker = match kept {
            Some(worker) => worker,
            None => self.start()?,
        };
        if worker.send(&request).is_err() {
            // It ended while it was idle, by someone else's hand.
            worker = self.start()?;
            worker.send(&request).map_err(process)?;
        }
        let mut reply = String::new();
        match worker.stdout.read_line(&mut reply) {
            Ok(_) if reply.ends_with('\n') => {
                self.put(worker);
                serde_json::from_str::<Result<String, TemplateError>>(&reply).map_err(process)?
            }
            _ => Err(worker.epitaph()),
        }
    }

    fn start(&self) -> Result<Worker, TemplateError> {
        let (name, arguments) = self.program.split_first().ok_or_else(|| process("no program to run it"))?;
        let mut command = Command::new(name);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // A group of its own: an interrupt from the terminal is the parent's to handle.
        let mut child =
            command.process_group(0).spawn().map_err(|error| process(format!("{}: {error}", name.display())))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().map(BufReader::new));
        let mut worker = Worker { child, stdin, stdout: stdout.ok_or_else(|| process("no pipe from it"))? };
        worker.send(&self.templates).map_err(process)?;
        Ok(worker)
    }

    fn put(&self, worker: Worker) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(worker);
        }
    }
}

impl Worker {
    fn send(&mut self, line: &[u8]) -> io::Result<()> {
        let stdin = self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        stdin.write_all(line)?;
        stdin.flush()
    }

    /// Why the child ended instead of answering.
    fn epitaph(mut self) -> TemplateError {
        self.stdin = None;
        let status = match self.child.wait() {
            Ok(status) => status,
            Err(error) => return process(error),
        };
        match (status.code(), status.signal()) {
            (Some(code), _) if code == i32::from(TIME_EXIT) => {
                TemplateError::Budget(format!("more than {TIME_MS_MAX} ms"))
            }
            // An allocation that fails aborts; a stack that overflows is a segmentation fault, or an abort once Rust has seen it.
            (_, Some(6)) => {
                TemplateError::Budget(format!("more than {} MiB of memory, or of stack", MEMORY_BYTES_MAX >> 20))
            }
            (_, Some(11 | 7)) => TemplateError::Budget("stack overflow".into()),
            _ => process(format!("it ended early: {status}")),
        }
    }
}

fn cpu_ms() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

fn limit(resource: Resource, most: u64) {
    // Where the limit is lower already, it stays.
    let _ = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
}

/// The child: reads templates from the first line of standard input, a chat from each further one, and answers with a line of JSON, a `Result`.
pub fn serve_sandbox() -> ExitCode {
    limit(Resource::Data, MEMORY_BYTES_MAX);
    limit(Resource::Core, 0);
    // The CPU time at which the present rendering has had its share.
    let deadline = Arc::new(AtomicU64::new(u64::MAX));
    let watched = deadline.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(WATCH_MS));
            if cpu_ms() > watched.load(Ordering::Relaxed) {
                std::process::exit(i32::from(TIME_EXIT));
            }
        }
    });
    let timed = |work: &mut dyn FnMut()| {
        deadline.store(cpu_ms() + TIME_MS_MAX, Ordering::Relaxed);
        work();
        deadline.store(u64::MAX, Ordering::Relaxed);
    };
    let mut lines = io::stdin().lock().lines();
    let Some(Ok(first)) = lines.next() else { return ExitCode::SUCCESS };
    let mut renderer = Err(TemplateError::None);
    timed(&mut || {
        renderer = Templates::open(first.as_bytes())
            .map_err(process)
            .and_then(|templates| Renderer::new(&templates.ok_or(TemplateError::None)?))
    });
    let mut out = io::stdout().lock();
    for line in lines.map_while(Result::ok) {
        let mut reply = Vec::new();
        timed(&mut || {
            let chat = serde_json::from_str::<Chat>(&line).map_err(process);
            let prompt = chat.and_then(|chat| renderer.as_ref().map_err(Clone::clone)?.render(&chat));
            reply = serde_json::to_vec(&prompt).unwrap_or_default();
        });
        reply.push(b'\n');
        if out.write_all(&reply).and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    ExitCode::SUCCESS
}
