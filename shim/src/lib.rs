//! Joey's shim: everything behind `containerd-shim-joey-v2` and the operator's tool `joey`.
//!
//! `docs/architecture.md` draws how the modules hang together.

pub mod bootstrap;
pub mod config;
pub mod guest;
pub mod host;
pub mod log;
pub mod stdio;
pub mod vmm;
mod sys;
