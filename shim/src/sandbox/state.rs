//! States of processes, and which operation is allowed in which: pure, no input or output.
//!
//! ```text
//!   Creating ──▶ Created ──▶ Starting ──▶ Running ⇄ Paused
//!                   │            │           │
//!                   └────────────┴───────────┴──▶ Stopped ──▶ (deleted)
//! ```
//!
//! An exit that the guest reports before `Start` has been answered is kept back until then, so that
//! containerd sees `start` before `exit`.

use std::time::SystemTime;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Being built in the guest.
    Creating,
    /// Built, waiting for Start.
    Created,
    /// Start was asked for and not yet answered.
    Starting,
    /// It runs.
    Running,
    /// Its container is frozen.
    Paused,
    /// It has ended.
    Stopped,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// What containerd may ask of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Run a created process.
    Start,
    /// Send a signal.
    Kill,
    /// Add a process to the container.
    Exec,
    /// Freeze the container.
    Pause,
    /// Thaw the container.
    Resume,
    /// Change limits.
    Update,
    /// Change the terminal's size.
    Resize,
    /// Forget a process.
    Delete,
}

/// Why an operation is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// runc's words, which containerd and kubelet look for.
    #[error("process already finished")]
    Finished,
    /// The operation does not fit the state.
    #[error("cannot {operation:?} a process that is {status:?}")]
    Precondition {
        /// What was asked.
        operation: Operation,
        /// In which state.
        status: Status,
    },
}

/// Decides whether `operation` is allowed on a process in `status`: as runc's shim answers.
///
/// # Errors
/// [`Refusal`] says why not.
pub fn check(status: Status, operation: Operation) -> Result<(), Refusal> {
    use Operation as O;
    use Status as S;
    let precondition = Err(Refusal::Precondition { operation, status });
    match (operation, status) {
        (O::Kill | O::Resize, S::Stopped) => Err(Refusal::Finished),
        (O::Start, S::Created)
        | (O::Delete, S::Created | S::Stopped)
        | (O::Exec, S::Running)
        | (O::Pause, S::Running)
        | (O::Resume, S::Paused)
        | (O::Update, S::Created | S::Running | S::Paused)
        | (O::Resize, S::Created | S::Starting | S::Running | S::Paused)
        | (O::Kill, S::Created | S::Starting | S::Running | S::Paused) => Ok(()),
        _ => precondition,
    }
}

/// One process: its state and its end.
#[derive(Clone, Debug)]
pub struct Process {
    status: Status,
    pid: u32,
    exit: Option<Exit>,
}

impl Process {
    /// A process that is being built.
    #[must_use]
    pub fn new() -> Self {
        Self { status: Status::Creating, pid: 0, exit: None }
    }

    /// Where it is.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// Its number; 0 while there is none.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, once [`Status::Stopped`].
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.exit.filter(|_| self.status == Status::Stopped)
    }

    /// The guest has built it.
    pub fn created(&mut self, pid: u32) {
        if self.status == Status::Creating {
            self.status = Status::Created;
            self.pid = pid;
        }
    }

    /// Start is being asked for.
    ///
    /// # Errors
    /// It is not [`Status::Created`].
    pub fn starting(&mut self) -> Result<(), Refusal> {
        check(self.status, Operation::Start)?;
        self.status = Status::Starting;
        Ok(())
    }

    /// Start was answered; an exit that came first takes effect now and is returned.
    pub fn started(&mut self, pid: u32) -> Option<Exit> {
        if self.status != Status::Starting {
            return None;
        }
        self.pid = pid;
        self.status = if self.exit.is_some() { Status::Stopped } else { Status::Running };
        self.exit
    }

    /// It has ended. `true` if that takes effect at once, `false` if it is known already or waits
    /// for [`Self::started`].
    pub fn exited(&mut self, exit: Exit) -> bool {
        if self.exit.is_some() {
            return false;
        }
        self.exit = Some(exit);
        if self.status == Status::Starting {
            return false;
        }
        self.status = Status::Stopped;
        true
    }

    /// Ends the process whatever it was about: its guest is gone. `true` if it had not ended.
    pub fn lost(&mut self, exit: Exit) -> bool {
        let ended = self.status == Status::Stopped;
        self.status = Status::Stopped;
        self.exit.get_or_insert(exit);
        !ended
    }

    /// Freezes or thaws.
    pub fn freeze(&mut self, frozen: bool) {
        match (self.status, frozen) {
            (Status::Running, true) => self.status = Status::Paused,
            (Status::Paused, false) => self.status = Status::Running,
            _ => {}
        }
    }
}

impl Default for Process {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 3, at: SystemTime::UNIX_EPOCH };

    #[test]
    fn an_exit_before_the_answer_to_start_waits_for_it() {
        let mut process = Process::new();
        process.created(7);
        process.starting().unwrap();
        assert!(!process.exited(EXIT));
        assert_eq!(process.exit(), None);
        assert_eq!(process.started(7), Some(EXIT));
        assert_eq!((process.status(), process.exit()), (Status::Stopped, Some(EXIT)));
    }

    #[test]
    fn only_the_first_exit_counts() {
        let mut process = Process::new();
        process.created(7);
        process.starting().unwrap();
        assert_eq!(process.started(7), None);
        assert!(process.exited(EXIT));
        assert!(!process.exited(Exit { status: 9, ..EXIT }));
        assert!(!process.lost(Exit { status: 9, ..EXIT }));
        assert_eq!(process.exit(), Some(EXIT));
    }

    #[test]
    fn a_lost_guest_ends_every_state() {
        let mut process = Process::new();
        assert!(process.lost(EXIT));
        assert_eq!(process.exit(), Some(EXIT));
        process.created(9);
        assert_eq!(process.status(), Status::Stopped);
    }

    #[test]
    fn a_finished_process_answers_as_runc_does() {
        let words = check(Status::Stopped, Operation::Kill).unwrap_err().to_string();
        assert_eq!(words, "process already finished");
        assert!(check(Status::Running, Operation::Delete).is_err());
        assert!(check(Status::Stopped, Operation::Exec).is_err());
        assert!(check(Status::Created, Operation::Exec).is_err());
        assert!(check(Status::Running, Operation::Start).is_err());
        assert!(check(Status::Created, Operation::Delete).is_ok());
    }
}
