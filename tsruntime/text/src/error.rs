use std::path::PathBuf;

/// Why a checkpoint's text files could not be compiled, or their compiled form not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// The checkpoint's fault: what was found, what was wanted.
    #[error("{0}")]
    Checkpoint(String),
    /// A compiled blob that this version cannot have written.
    #[error("the compiled text is corrupt: {0}")]
    Corrupt(String),
}
