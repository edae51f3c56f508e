//! What can go wrong with a virtual machine, in words for the node's operator.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How a VMM that ended by itself is told of.
pub(crate) const EXITED: &str = "exit status";

/// A failed operation on a virtual machine, a template or the VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// There is no QEMU at the configured place.
    #[error(
        "QEMU not found at {0}: install qemu-system-x86 (8.2 or later) or set `qemu` in the configuration"
    )]
    QemuMissing(PathBuf),
    /// QEMU is there but cannot do what Joey needs.
    #[error("{path} is QEMU {found}; Joey needs {needed} or later")]
    QemuTooOld {
        /// Where it is.
        path: PathBuf,
        /// Its version.
        found: String,
        /// The oldest that serves.
        needed: &'static str,
    },
    /// `--version` answered something else.
    #[error("{path} --version did not answer as QEMU does: {answer:?}")]
    QemuUnknown {
        /// Where it is.
        path: PathBuf,
        /// Start of what it said.
        answer: String,
    },
    /// The guest image lacks a file.
    #[error(
        "guest image file {path}: {source}; build it with `cargo xtask guest` or reinstall the package"
    )]
    Guest {
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The VMM's process could not be set up.
    #[error("sandbox {id}: starting the VMM: {step}: {source}")]
    Spawn {
        /// Which sandbox.
        id: String,
        /// Which step of it.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// QEMU ended before it was told to.
    #[error("sandbox {id}: QEMU ended ({status}); its last words: {stderr}")]
    Ended {
        /// Which sandbox.
        id: String,
        /// How.
        status: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// Something took longer than it may.
    #[error("sandbox {id}: {what} took longer than {limit:?}")]
    Deadline {
        /// Which sandbox.
        id: String,
        /// What did.
        what: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// QEMU's control socket.
    #[error(transparent)]
    Qmp(#[from] super::qemu::qmp::QmpError),
    /// Templates.
    #[error(transparent)]
    Template(#[from] super::template::TemplateError),
    /// A disk slot that the machine does not have, or of the other kind.
    #[error("disk slot {slot}: {reason}")]
    Slot {
        /// Which slot.
        slot: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// The channel was taken already.
    #[error("sandbox {0}: the channel to the guest was taken before")]
    ChannelTaken(String),
    /// A file or descriptor of ours.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl VmmError {
    /// Whether it is for the template that a clone did not come up: QEMU itself refused it, which a VMM that
    /// was killed, or was given no time or memory, does not say.
    pub(crate) fn is_templates_fault(&self) -> bool {
        match self {
            Self::Ended { status, .. } => status.starts_with(EXITED),
            Self::Template(error) => error.is_damage(),
            _ => false,
        }
    }

    /// Names what was tried when the kernel refused.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
