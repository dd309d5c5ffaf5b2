//! A plan of several ranks: this process's place among them, and the processes of the others.
//!
//! Under torchrun, mpirun or Slurm each process is one rank and finds its place in the environment. Otherwise the process that a user
//! starts is rank 0 and starts the others, which die with it. Rank 0 alone serves; the others compute their part of its steps. Ranks of
//! one host share memory; if a launcher says that it has put some on another, MPI is between them.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

use crate::engine::{self, Engine};
use crate::error::{Exit, Failure, say};
use crate::model::LoadOptions;
use crate::plan::Plan;

/// What a launcher calls a process's rank, the ranks' number, and how many of them it has put on this host; and what tells one run of
/// its on a host from another.
struct Launcher {
    rank: &'static str,
    size: &'static str,
    here: &'static str,
    run: &'static [&'static str],
}

const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        rank: "RANK",
        size: "WORLD_SIZE",
        here: "LOCAL_WORLD_SIZE",
        run: &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"],
    },
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        here: "OMPI_COMM_WORLD_LOCAL_SIZE",
        run: &["PMIX_NAMESPACE"],
    },
    Launcher { rank: "PMI_RANK", size: "PMI_SIZE", here: "MPI_LOCALNRANKS", run: &[] },
    Launcher { rank: "SLURM_PROCID", size: "SLURM_NTASKS", here: SLURM_TASKS, run: &["SLURM_JOB_ID", "SLURM_STEP_ID"] },
];

/// Slurm's own, also where its tasks speak PMI: the tasks of each node, such as "2(x3),1".
const SLURM_TASKS: &str = "SLURM_STEP_TASKS_PER_NODE";

/// For the other ranks to hear of the end, when all has gone well.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// For a child that died to be reaped.
const REAP_TIMEOUT: Duration = Duration::from_secs(1);

/// A process's place, as its launcher says.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    rank: i32,
    num_ranks: i32,
    /// How many of them run on this host, if the launcher says so.
    here: Option<i32>,
    /// The variable that says how many.
    size_name: &'static str,
    rendezvous: String,
}

/// The place that the environment names; None where no launcher is.
fn place(var: impl Fn(&str) -> Option<String>) -> Result<Option<Place>, Failure> {
    let number = |name: &str, text: String| {
        text.parse::<i32>().map_err(|_| Failure::new(Exit::Usage, format!("{name} is {text:?}, wanted a number")))
    };
    for Launcher { rank: rank_name, size: size_name, here, run } in LAUNCHERS {
        let (Some(rank), Some(size)) = (var(rank_name), var(size_name)) else { continue };
        let (rank, num_ranks) = (number(rank_name, rank)?, number(size_name, size)?);
        if rank < 0 || rank >= num_ranks {
            let message = format!("{rank_name} is {rank}, and {size_name} is {num_ranks}: wanted a rank below it");
            return Err(Failure::new(Exit::Usage, message));
        }
        // Slurm's nodes may differ; the most is told.
        let most = |text: String| text.split(',').filter_map(|part| part.split('(').next()?.parse().ok()).max();
        let here = var(here).or_else(|| var(SLURM_TASKS)).and_then(most);
        // Where the launcher names no run, its own process does: it is the parent of all ranks of this host.
        let run: Vec<String> = run.iter().filter_map(|name| var(name)).collect();
        let run = if run.is_empty() { format!("parent {}", parent_id()) } else { run.join(" ") };
        return Ok(Some(Place { rank, num_ranks, here, size_name, rendezvous: format!("{rank_name} {run}") }));
    }
    Ok(None)
}

fn place_here() -> Result<Option<Place>, Failure> {
    place(|name| env::var(name).ok().filter(|value| !value.is_empty()))
}

/// If a launcher made this process a rank but 0 of the plan: computes until rank 0 ends. None: this process serves.
pub fn follow_launched(path: &Path, options: &LoadOptions) -> Option<Result<(), Failure>> {
    match place_here() {
        Ok(Some(Place { rank: 1.., .. })) => follow_place(path, options).transpose(),
        Ok(_) => None,
        // Only a plan of several ranks asks.
        Err(_) => None,
    }
}

fn follow_place(path: &Path, options: &LoadOptions) -> Result<Option<()>, Failure> {
    let plan = Plan::open(path, options.always_verify)?;
    if plan.num_ranks() == 1 {
        return Ok(None);
    }
    let Some(place) = place_here()? else { return Ok(None) };
    let options = placed(&plan, place, &options.engine)?;
    engine::follow(&plan, &options).map(Some)
}

/// `tsruntime rank`, as rank 0 starts it.
pub fn follow_started(path: &Path, rank: i32, options: &LoadOptions) -> Result<(), Failure> {
    let plan = Plan::open(path, options.always_verify)?;
    engine::follow(&plan, &engine::Options { rank, ..options.engine.clone() })
}

fn placed(plan: &Plan, place: Place, options: &engine::Options) -> Result<engine::Options, Failure> {
    let Place { rank, num_ranks, here, size_name, rendezvous } = place;
    if num_ranks != plan.num_ranks() {
        let message = format!(
            "the plan is for {} ranks, but {size_name} says {num_ranks}: start as many, or build the plan for them",
            plan.num_ranks()
        );
        return Err(Failure::new(Exit::Usage, message));
    }
    let ranks_here = here.unwrap_or(num_ranks).min(num_ranks);
    if rank == 0 {
        let way = match ranks_here == num_ranks {
            true => "on this host, over shared memory".into(),
            false => format!("on several hosts, {ranks_here} of them on this one, over MPI"),
        };
        say(format!("{num_ranks} ranks {way}"));
    }
    let rendezvous = Some(options.rendezvous.clone().unwrap_or(rendezvous));
    Ok(engine::Options { rank, rendezvous, ranks_here, ..options.clone() })
}

/// The options of rank 0's engine. Unless a launcher has started the other ranks, this does.
pub fn started(path: &Path, plan: &Plan, load: &LoadOptions) -> Result<engine::Options, Failure> {
    let options = &load.engine;
    if plan.num_ranks() == 1 {
        return Ok(options.clone());
    }
    if let Some(place) = place_here()? {
        return placed(plan, place, options);
    }
    let unique = format!("{} {:x}", getpid().as_raw_nonzero(), crate::model::random_seed());
    let options = engine::Options { rendezvous: Some(options.rendezvous.clone().unwrap_or(unique)), ..options.clone() };
    let mut rank_pids = vec![0];
    for rank in 1..plan.num_ranks() {
        let pid = start(rank, arguments(path, rank, &options, load.always_verify))
            .map_err(|error| Failure::new(Exit::Failed, format!("rank {rank} cannot be started: {error}")))?;
        rank_pids.push(pid);
    }
    Ok(engine::Options { rank_pids, ..options })
}

/// The command line of another rank.
fn arguments(path: &Path, rank: i32, options: &engine::Options, always_verify: bool) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["rank".into(), path.into(), format!("--rank={rank}").into()];
    words.push(format!("--rank-timeout={}", f64::from(options.rank_timeout_ms) / 1e3).into());
    words.extend(options.rendezvous.iter().map(|name| format!("--rendezvous={name}").into()));
    words.extend((options.num_threads > 0).then(|| format!("--threads={}", options.num_threads).into()));
    words.extend(options.target.iter().map(|target| format!("--target={target}").into()));
    words.extend(always_verify.then(|| "--verify=always".into()));
    words
}

/// How the children ended that have.
static ENDED: Mutex<Vec<(u32, ExitStatus)>> = Mutex::new(Vec::new());

/// Starts a rank, in a group of its own so that the terminal's signals reach rank 0 alone, and waits for it on a thread whose end would
/// be the child's, too.
fn start(rank: i32, arguments: Vec<OsString>) -> io::Result<i32> {
    let (sender, receiver) = mpsc::channel();
    let parent = getpid();
    std::thread::Builder::new().name(format!("ts-rank-{rank}")).spawn(move || {
        let mut command = Command::new("/proc/self/exe");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        // Between fork and exec: two system calls.
        unsafe {
            command.pre_exec(move || {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
            });
        }
        match command.spawn() {
            Ok(mut child) => {
                let id = child.id();
                let _ = sender.send(Ok(id.cast_signed()));
                if let Ok(status) = child.wait() {
                    ENDED.lock().unwrap_or_else(PoisonError::into_inner).push((id, status));
                }
            }
            Err(error) => drop(sender.send(Err(error))),
        }
    })?;
    receiver.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
}

/// The engine's word on a rank that died, and, of one that this process had started, how.
pub fn explain(message: &str) -> String {
    let deadline = Instant::now() + REAP_TIMEOUT;
    while message.contains(") died") && Instant::now() < deadline {
        let ended = ENDED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, status)) = ended.iter().find(|(id, _)| message.contains(&format!("(process {id})"))) {
            return format!("{message}: {status}");
        }
        if ACTIVE.get().is_none_or(|(_, children)| *children == 0) {
            break;
        }
        drop(ended);
        std::thread::sleep(Duration::from_millis(5));
    }
    message.to_owned()
}

/// The engine of several ranks, and how many of them are this process's children.
static ACTIVE: OnceLock<(&'static Engine, usize)> = OnceLock::new();

/// Remembers the engine, so that [`finish`] can end it.
pub fn opened(engine: &'static Engine, options: &engine::Options) {
    let children = options.rank_pids.iter().filter(|&&pid| pid > 0).count();
    let _ = ACTIVE.set((engine, children));
}

/// Lets the other ranks end before this process does.
pub fn finish() {
    let Some((engine, _)) = ACTIVE.get() else { return };
    engine.shutdown();
    let deadline = Instant::now() + END_TIMEOUT;
    while !engine.has_ended() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Option<Place>, String> {
        let var = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        place(var).map_err(|failure| failure.message)
    }

    #[test]
    fn launchers_name_the_place() {
        assert_eq!(of(&[("PATH", "/bin"), ("RANK", "1")]), Ok(None));
        let torch = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "29500")];
        let place = of(&torch).unwrap().unwrap();
        assert_eq!((place.rank, place.num_ranks, place.size_name), (1, 2, "WORLD_SIZE"));
        assert_eq!(place.rendezvous, "RANK h 29500");
        let slurm = [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "77"), ("SLURM_STEP_ID", "0")];
        assert_eq!(of(&slurm).unwrap().unwrap().rendezvous, "SLURM_PROCID 77 0");
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "8"), ("PMIX_NAMESPACE", "n1")];
        assert_eq!(of(&open_mpi).unwrap().unwrap().num_ranks, 8);
        let mpich = of(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]).unwrap().unwrap();
        assert_eq!((mpich.rendezvous, mpich.here), (format!("PMI_RANK parent {}", parent_id()), None));
    }

    #[test]
    fn launchers_say_how_many_ranks_are_here() {
        let here = |pairs: &[(&str, &str)]| of(pairs).unwrap().unwrap().here;
        assert_eq!(here(&[("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")]), Some(4));
        assert_eq!(here(&[("PMI_RANK", "1"), ("PMI_SIZE", "4"), ("MPI_LOCALNRANKS", "2")]), Some(2));
        assert_eq!(here(&[("PMI_RANK", "1"), ("PMI_SIZE", "4"), ("SLURM_STEP_TASKS_PER_NODE", "1,3")]), Some(3));
        let slurm = [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "7"), ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1")];
        assert_eq!(here(&slurm), Some(2));
    }

    #[test]
    fn nonsense_is_refused() {
        for (rank, size, wanted) in [("x", "2", "RANK is \"x\""), ("2", "2", "RANK is 2"), ("-1", "2", "RANK is -1")] {
            let message = of(&[("RANK", rank), ("WORLD_SIZE", size)]).unwrap_err();
            assert!(message.contains(wanted), "{message}");
        }
    }
}
