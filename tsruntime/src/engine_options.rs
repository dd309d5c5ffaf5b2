//! How an engine is opened, and these options as it takes them.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr;

use crate::error::{Exit, Failure};
use crate::ffi;

/// Whether a step is scheduled while the one before it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Overlap {
    #[default]
    Off,
    On,
    Auto,
}

/// How an engine is opened; 0 and None leave the choice to it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub num_threads: i32,
    pub num_pages: i32,
    pub kv_bytes: i64,
    pub token_budget: i32,
    pub max_seqs: i32,
    pub max_queue: i32,
    pub prefix_cache: bool,
    pub max_draft: i32,
    pub patience_ms: i32,
    pub target_tpot_us: i32,
    pub overlap_schedule: Overlap,
    pub target: Option<String>,
    /// This process's, of a plan of several.
    pub rank: i32,
    pub rank_timeout_ms: i32,
    /// Where the ranks of a run meet.
    pub rendezvous: Option<String>,
    /// Of all ranks; 0 for those that this process has not started. May be empty.
    pub rank_pids: Vec<i32>,
    /// How many of the ranks run on this host; 0: all.
    pub ranks_here: i32,
    /// The library that is between ranks of several hosts.
    pub mpi_library: Option<String>,
    /// A new file that the run is recorded in.
    pub record: Option<PathBuf>,
    /// What the second tier may hold; 0: there is none.
    pub offload_bytes: i64,
    /// Where it lies, if not in memory.
    pub offload_folder: Option<String>,
}

impl Options {
    /// Calls `body` with these as the engine takes them.
    pub fn with_raw<T>(&self, body: impl FnOnce(&ffi::ts_engine_options) -> Result<T, Failure>) -> Result<T, Failure> {
        let text = |what: &str, text: &Option<String>| {
            let text = text.as_deref().map(CString::new).transpose();
            text.map_err(|_| Failure::new(Exit::Usage, format!("the {what}'s name has a NUL byte in it")))
        };
        let (target, rendezvous) = (text("target", &self.target)?, text("rendezvous", &self.rendezvous)?);
        let mpi_library = text("MPI library", &self.mpi_library)?;
        // NVIDIA's driver, where the system does not find it
        let cuda_library = text("CUDA library", &std::env::var("TSRUNTIME_LIBCUDA").ok())?;
        let record = self.record.as_deref().map(path).transpose()?;
        let offload_folder = text("folder of evicted pages", &self.offload_folder)?;
        let pointer = |text: &Option<CString>| text.as_ref().map_or(ptr::null(), |text| text.as_ptr());
        body(&ffi::ts_engine_options {
            size: size_of::<ffi::ts_engine_options>() as u32,
            event_size: size_of::<ffi::ts_event>() as u32,
            num_threads: self.num_threads,
            num_pages: self.num_pages,
            kv_bytes: self.kv_bytes,
            token_budget: self.token_budget,
            max_seqs: self.max_seqs,
            max_queue: self.max_queue,
            prefix_cache: i32::from(self.prefix_cache),
            max_draft: self.max_draft,
            patience_ms: self.patience_ms,
            target_tpot_us: self.target_tpot_us,
            overlap_schedule: match self.overlap_schedule {
                Overlap::Off => ffi::TS_OVERLAP_OFF,
                Overlap::On => ffi::TS_OVERLAP_ON,
                Overlap::Auto => ffi::TS_OVERLAP_AUTO,
            },
            target: pointer(&target),
            rank: self.rank,
            rank_timeout_ms: self.rank_timeout_ms,
            rendezvous: pointer(&rendezvous),
            rank_pids: if self.rank_pids.is_empty() { ptr::null() } else { self.rank_pids.as_ptr() },
            ranks_here: self.ranks_here,
            mpi_library: pointer(&mpi_library),
            record: pointer(&record),
            cuda_library: pointer(&cuda_library),
            offload_bytes: self.offload_bytes,
            offload_folder: pointer(&offload_folder),
        })
    }
}

pub fn path(path: &Path) -> Result<CString, Failure> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| Failure::new(Exit::Usage, "the trace's path has a NUL byte in it"))
}
