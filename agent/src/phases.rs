//! How long the steps of a call took, for the sandbox's timeline on the host.

use std::time::Duration;

use joey_protocol::api;

use crate::sys;

/// Steps that follow one another.
#[derive(Debug)]
pub(crate) struct Phases {
    last: Duration,
    taken: Vec<api::Phase>,
}

impl Phases {
    /// The first step begins.
    pub(crate) fn begin() -> Self {
        Self { last: sys::monotonic(), taken: Vec::new() }
    }

    /// The step of this name ends, and the next one begins.
    pub(crate) fn done(&mut self, name: &str) {
        let now = sys::monotonic();
        self.taken.push(phase(name, now.saturating_sub(self.last)));
        self.last = now;
    }

    /// Steps that were measured elsewhere end now, and the next one begins.
    pub(crate) fn add(&mut self, steps: &[(&str, Duration)]) {
        self.taken.extend(steps.iter().map(|(name, took)| phase(name, *took)));
        self.last = sys::monotonic();
    }

    /// All of them, as the protocol carries them.
    pub(crate) fn end(self) -> Vec<api::Phase> {
        self.taken
    }
}

fn phase(name: &str, took: Duration) -> api::Phase {
    api::Phase {
        name: name.to_owned(),
        nanoseconds: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
        ..Default::default()
    }
}
