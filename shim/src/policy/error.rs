//! Why a policy is refused or cannot be applied.
//!
//! Messages hold their causes, so that they are whole wherever they are told: on a terminal, in a reply, in a log.

use std::io;
use std::path::PathBuf;

use joey_ebpf::policy::maps::MapError;

/// Why a policy is refused or cannot be applied. Whatever was in force before still is.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A file cannot be read.
    #[error("read {path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Neither YAML nor JSON.
    #[error("{origin}: {message}")]
    Syntax {
        /// File.
        origin: String,
        /// What the parser says, with the line.
        message: String,
    },
    /// A field is unknown, missing, or of another type than it must be.
    #[error("{document}: {path}: {reason}")]
    Shape {
        /// File, number in it, kind and name.
        document: String,
        /// Where in it.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A value that cannot be used.
    #[error("{document}: {path} = {value:?}: {reason}")]
    Value {
        /// File, number in it, kind and name.
        document: String,
        /// Where in it.
        path: String,
        /// What it is.
        value: String,
        /// What it must be.
        reason: String,
    },
    /// Two documents say the same thing.
    #[error("{second}: {first} is the same object; apply one of them")]
    Twice {
        /// The one before.
        first: String,
        /// The one after.
        second: String,
    },
    /// An identity that cannot be used.
    #[error("identity of {address}: {field} = {value:?}: {reason}")]
    Entry {
        /// Whose.
        address: String,
        /// Which field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it must be.
        reason: String,
    },
    /// More than there is room for.
    #[error("{what}: {count} are needed and {most} fit; most of them are of {largest}")]
    TooMany {
        /// What.
        what: &'static str,
        /// How many, as far as was counted.
        count: usize,
        /// How many fit.
        most: usize,
        /// Who contributes most.
        largest: String,
    },
    /// A map cannot be read or written.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The maps or their lock cannot be had.
    #[error("the policy below {path}: {step}: {cause}; `joey ebpf load` puts it there")]
    NotLoaded {
        /// `bpf_dir`.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        cause: io::Error,
    },
    /// The state that was written down cannot be read or written.
    #[error("{step} {path}: {cause}")]
    State {
        /// What was being done.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
}

/// What is said of one field, until it is known whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) path: String,
    pub(crate) value: String,
    pub(crate) reason: String,
}

impl Fault {
    pub(crate) fn new(
        path: impl Into<String>,
        value: impl ToString,
        reason: impl Into<String>,
    ) -> Self {
        Self { path: path.into(), value: value.to_string(), reason: reason.into() }
    }

    /// The same, of a field within `outer`.
    pub(crate) fn within(mut self, outer: &str) -> Self {
        let joint = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{outer}{joint}{}", self.path);
        self
    }

    pub(crate) fn of(self, document: &str) -> PolicyError {
        let Self { path, value, reason } = self;
        PolicyError::Value { document: document.to_owned(), path, value, reason }
    }
}
