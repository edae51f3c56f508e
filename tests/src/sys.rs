//! All unsafe code of the harness: entering namespaces on the way to exec.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// Makes `command`'s process join the given namespaces, in order, before it executes.
pub fn join_before_exec(command: &mut Command, namespaces: Vec<(File, CloneFlags)>) {
    let join = move || {
        for (file, kind) in &namespaces {
            setns(file, *kind)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only calls setns(2) on descriptors that it owns; it
    // neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(join);
    }
}
