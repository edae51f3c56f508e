//! States of processes, and which operation is allowed in which: pure, no input or output.
//!
//! ```text
//!   Creating ──▶ Created ⇄ Starting ──▶ Running ⇄ Paused
//!                   │                      │
//!                   └──────────────────────┴──▶ Stopped ──▶ (deleted)
//! ```
//!
//! While the guest is asked to create or start a process no end of it takes effect, be it an exit or
//! the guest's own: it is kept back until the answer, so that containerd sees `create`, `start` and
//! `exit` in this order.

use std::time::SystemTime;

use tokio::sync::watch;

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

/// One process: its state and its end. A change returns the exit that takes effect with it.
#[derive(Debug)]
pub struct Process {
    status: Status,
    pid: u32,
    /// The first end that was heard of, in effect or kept back.
    exit: Option<Exit>,
    /// The end in effect.
    ended: watch::Sender<Option<Exit>>,
    /// Whether the guest has told of an end, be it in effect or not.
    told: bool,
}

impl Process {
    /// A process that is being built.
    #[must_use]
    pub fn new() -> Self {
        let ended = watch::Sender::new(None);
        Self { status: Status::Creating, pid: 0, exit: None, ended, told: false }
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
        *self.ended.borrow()
    }

    /// To wait for its end; fails when the process is forgotten without one.
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<Option<Exit>> {
        self.ended.subscribe()
    }

    /// The guest has built it.
    pub fn created(&mut self, pid: u32) -> Option<Exit> {
        self.pid = pid;
        self.settle(Status::Created)
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

    /// The guest has started it.
    pub fn started(&mut self, pid: u32) -> Option<Exit> {
        self.pid = pid;
        self.settle(Status::Running)
    }

    /// The guest has not started it: it is what it was before.
    pub fn not_started(&mut self) -> Option<Exit> {
        self.settle(Status::Created)
    }

    /// Its command cannot be executed: it ends as `exit` says, whatever the guest tells of the end of
    /// the process that was to execute it.
    pub fn not_executed(&mut self, exit: Exit) {
        self.exit = Some(exit);
        self.settle(Status::Stopped);
    }

    /// It has ended, by itself or with its guest; only the first end counts.
    pub fn exited(&mut self, exit: Exit) -> Option<Exit> {
        if self.exit.is_some() {
            return None;
        }
        self.exit = Some(exit);
        match self.status {
            Status::Creating | Status::Starting => None,
            _ => self.settle(Status::Stopped),
        }
    }

    /// The guest tells of its end; whether that is the first time.
    pub fn hears_end(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }

    /// Goes on to `next`, or ends if an end was kept back.
    fn settle(&mut self, next: Status) -> Option<Exit> {
        self.status = if self.exit.is_some() { Status::Stopped } else { next };
        self.ended.send_replace(self.exit);
        self.exit
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

    fn starting() -> Process {
        let mut process = Process::new();
        assert_eq!(process.created(7), None);
        process.starting().unwrap();
        process
    }

    #[test]
    fn an_end_before_the_guests_answer_waits_for_it() {
        let mut process = starting();
        assert_eq!(process.exited(EXIT), None);
        assert_eq!((process.status(), process.exit()), (Status::Starting, None));
        assert_eq!(process.started(7), Some(EXIT));
        assert_eq!((process.status(), process.exit()), (Status::Stopped, Some(EXIT)));

        let mut process = Process::new();
        assert_eq!(process.exited(EXIT), None);
        assert_eq!(process.created(7), Some(EXIT));
        assert_eq!(process.status(), Status::Stopped);
    }

    #[test]
    fn only_the_first_exit_counts() {
        let mut process = starting();
        assert_eq!(process.started(7), None);
        assert_eq!(process.exited(EXIT), Some(EXIT));
        assert_eq!(process.exited(Exit { status: 9, ..EXIT }), None);
        assert_eq!(process.exit(), Some(EXIT));
    }

    #[test]
    fn a_process_that_was_not_started_ends_as_a_created_one() {
        let mut process = starting();
        assert_eq!(process.not_started(), None);
        assert_eq!(process.status(), Status::Created);
        assert_eq!(process.exited(EXIT), Some(EXIT));

        let mut process = starting();
        assert_eq!(process.exited(EXIT), None);
        assert_eq!(process.not_started(), Some(EXIT));
    }

    #[test]
    fn what_cannot_be_executed_has_one_end_whatever_the_guest_tells_of_its_process() {
        let mut process = starting();
        process.not_executed(EXIT);
        assert_eq!((process.status(), process.exit()), (Status::Stopped, Some(EXIT)));
        assert_eq!(process.exited(Exit { status: 1, ..EXIT }), None);

        let mut process = starting();
        assert_eq!(process.exited(Exit { status: 1, ..EXIT }), None);
        process.not_executed(EXIT);
        assert_eq!(process.exit(), Some(EXIT));
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
