//! Named points at which a test holds this process, to kill something just there.
//!
//! A point is armed by an empty file `<run_dir>/failpoints/<name>`. The first process that comes by takes it:
//! it renames the file to `<name>.<its pid>` and goes on once that file is gone. Only debug builds do; in a
//! release build the functions are empty.

use std::path::Path;

#[cfg(debug_assertions)]
mod armed {
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    /// How often a held process looks whether it may go on.
    pub(super) const LOOK: Duration = Duration::from_millis(2);

    /// The file that holds this process, if the point is armed.
    pub(super) fn take(run_dir: &Path, name: &str) -> Option<PathBuf> {
        let folder = run_dir.join("failpoints");
        let held = folder.join(format!("{name}.{}", std::process::id()));
        std::fs::rename(folder.join(name), &held).ok().map(|()| held)
    }
}

/// Holds the calling thread at `name` if a test asks for it.
#[cfg(debug_assertions)]
pub fn hold(run_dir: &Path, name: &str) {
    if let Some(held) = armed::take(run_dir, name) {
        while held.exists() {
            std::thread::sleep(armed::LOOK);
        }
    }
}

/// Holds the calling task at `name` if a test asks for it; the process's other tasks go on.
#[cfg(debug_assertions)]
pub async fn reach(run_dir: &Path, name: &str) {
    if let Some(held) = armed::take(run_dir, name) {
        while held.exists() {
            tokio::time::sleep(armed::LOOK).await;
        }
    }
}

/// Nothing: there are no points in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn hold(_run_dir: &Path, _name: &str) {}

/// Nothing: there are no points in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub async fn reach(_run_dir: &Path, _name: &str) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_armed_point_holds_the_first_that_comes_until_it_is_released() {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join("failpoints");
        hold(run.path(), "a.point");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a.point"), "").unwrap();
        let held = folder.join(format!("a.point.{}", std::process::id()));
        std::thread::scope(|scope| {
            let holding = scope.spawn(|| hold(run.path(), "a.point"));
            while !held.exists() {
                std::thread::sleep(armed::LOOK);
            }
            hold(run.path(), "a.point");
            assert!(!holding.is_finished());
            std::fs::remove_file(&held).unwrap();
            holding.join().unwrap();
        });
    }
}
