//! How long each step of a start took, measured where it happened.
//!
//! Kept in memory and written to `timeline.json` in the run directory when a container's first byte
//! has come and when asked; `joey inspect` and `cargo xtask demo` draw it.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// File name in the sandbox's run directory.
pub const FILE: &str = "timeline.json";
/// Steps kept: a pod whose containers restart for ever must not grow its shim.
const MAX_STEPS: usize = 256;

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// For which container; empty for the sandbox.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// Where it ran: `host`, `vmm` (a part of a step on the host) or `guest`.
    pub side: String,
    /// Milliseconds after the shim's start at which it began.
    pub start_ms: f64,
    /// Milliseconds it took.
    pub took_ms: f64,
}

/// What a clone's first answer cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstAnswer {
    /// Milliseconds from the beginning of the clone to the agent's reply, which gave it its identity.
    pub took_ms: f64,
    /// Milliseconds of processor time that all threads of the VMM had used by then.
    pub vmm_cpu_ms: f64,
}

/// A start, step by step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Steps {
    /// Nanoseconds after the epoch at which the shim started.
    pub started_at_ns: u64,
    /// None until it came, and of machines that were not cloned for this sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_answer: Option<FirstAnswer>,
    /// The steps, in the order in which they ended.
    pub steps: Vec<Step>,
}

impl Steps {
    /// Reads what a shim has written.
    ///
    /// # Errors
    /// The file is missing or not a timeline.
    pub fn read(directory: &Path) -> std::io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(directory.join(FILE))?)?)
    }
}

/// The clock that all steps of one shim are measured by.
#[derive(Debug)]
pub struct Timeline {
    origin: Instant,
    steps: Mutex<Steps>,
}

impl Timeline {
    /// Starts the clock; `since` is how long ago the shim's process started.
    #[must_use]
    pub fn start(since: Duration) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = now.saturating_sub(since);
        Self {
            origin: Instant::now().checked_sub(since).unwrap_or_else(Instant::now),
            steps: Mutex::new(Steps {
                started_at_ns: u64::try_from(started.as_nanos()).unwrap_or(0),
                ..Steps::default()
            }),
        }
    }

    /// Notes a step on the host that began at `start` and ends now.
    pub fn host(&self, name: &str, container: &str, start: Instant) {
        self.push(name, container, "host", start, start.elapsed());
    }

    /// Notes a part of a step on the host, which began at `start`.
    pub fn part(&self, name: &str, start: Instant, took: Duration) {
        self.push(name, "", "host", start, took);
    }

    /// Notes the shim's own start: from the process's to now.
    pub fn shim(&self) {
        self.push("shim", "", "host", self.origin, self.origin.elapsed());
    }

    /// Notes that something happened just now.
    pub fn mark(&self, name: &str, container: &str) {
        self.push(name, container, "host", Instant::now(), Duration::ZERO);
    }

    /// Notes the start of the machine, which began at `start`, after its parts.
    pub fn machine(&self, name: &str, start: Instant, parts: &[(&str, Duration)]) {
        let mut from = start;
        for (part, took) in parts {
            self.push(part, "", "vmm", from, *took);
            from += *took;
        }
        self.host(name, "", start);
    }

    /// Notes a call to the guest that began at `start` and ends now, in two steps: `answer`, until the
    /// guest began with it, and `name`, for which the guest needed `inside`.
    pub fn call(&self, answer: &str, name: &str, start: Instant, inside: Duration) {
        let before = start.elapsed().saturating_sub(inside);
        self.push(answer, "", "host", start, before);
        self.push(name, "", "host", start + before, inside);
    }

    /// Notes that the agent has answered for the first time, from a machine whose VMM is `vmm`.
    pub fn answered(&self, vmm: Pid) {
        let used = clock_getcpuclockid(vmm).and_then(clock_gettime);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let clone = steps.steps.iter().find(|step| step.name == "clone").map(|step| step.start_ms);
        if let (Some(clone), Ok(used)) = (clone, used) {
            steps.first_answer = Some(FirstAnswer {
                took_ms: self.origin.elapsed().as_secs_f64() * 1e3 - clone,
                vmm_cpu_ms: Duration::from(used).as_secs_f64() * 1e3,
            });
        }
    }

    /// Notes steps that the guest measured, laid end to end so that the last ends now.
    pub fn guest<'a>(
        &self,
        container: &str,
        steps: impl DoubleEndedIterator<Item = (&'a str, Duration)>,
    ) {
        let mut end = Instant::now();
        let mut laid = Vec::new();
        for (name, took) in steps.rev() {
            let start = end.checked_sub(took).unwrap_or(end);
            laid.push((name, start, took));
            end = start;
        }
        for (name, start, took) in laid.into_iter().rev() {
            self.push(name, container, "guest", start, took);
        }
    }

    fn push(&self, name: &str, container: &str, side: &str, start: Instant, took: Duration) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.steps.len() < MAX_STEPS {
            steps.steps.push(Step {
                name: name.to_owned(),
                container: container.to_owned(),
                side: side.to_owned(),
                start_ms: start.saturating_duration_since(self.origin).as_secs_f64() * 1e3,
                took_ms: took.as_secs_f64() * 1e3,
            });
        }
    }

    /// Writes the steps so far. A failure is logged: nothing depends on them.
    pub fn write(&self, directory: &Path) {
        let text = {
            let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
            serde_json::to_vec(&*steps).unwrap_or_default()
        };
        let beside = directory.join(".timeline.json");
        let written = std::fs::write(&beside, text)
            .and_then(|()| std::fs::rename(&beside, directory.join(FILE)));
        if let Err(error) = written {
            tracing::debug!(%error, "timeline not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_the_guest_end_where_the_call_ended() {
        let dir = tempfile::tempdir().unwrap();
        let timeline = Timeline::start(Duration::from_millis(50));
        timeline.host("clone", "", Instant::now());
        let steps = [("clock", Duration::from_millis(1)), ("network", Duration::from_millis(2))];
        timeline.guest("", steps.into_iter());
        timeline.write(dir.path());
        let read = Steps::read(dir.path()).unwrap();
        let names: Vec<_> = read.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, ["clone", "clock", "network"]);
        let [_, clock, network] = read.steps.as_slice() else { panic!("{read:?}") };
        assert!((clock.start_ms + clock.took_ms - network.start_ms).abs() < 0.01, "{read:?}");
        assert!(clock.start_ms > 40.0, "{read:?}");
    }
}
