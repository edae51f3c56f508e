//! Joey's shim: everything behind `containerd-shim-joey-v2` and the operator's tool `joey`.
//!
//! `docs/architecture.md` draws how the modules hang together.

pub mod api;
pub mod bootstrap;
pub mod config;
pub mod failpoint;
pub mod flows;
pub mod guest;
pub mod host;
pub mod log;
pub mod mesh;
pub mod net_limits;
pub mod policy;
pub mod rootfs;
pub mod sandbox;
pub mod serve;
pub mod services;
pub mod share;
pub mod sizing;
pub mod standby;
pub mod stdio;
pub mod sys;
pub mod vmm;
pub mod volumes;
