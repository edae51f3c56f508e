//! What host and guest say to each other: calls and events, names, limits, the version check, and
//! the multiplexer that carries all of it over one byte channel.
//!
//! Neither side trusts the other more than it must: the host bounds and checks every message from
//! the guest; the agent refuses what it does not understand.

pub mod handshake;
pub mod ids;
pub mod limits;
pub mod mux;
pub mod services;

/// Generated code: not ours to lint.
#[allow(unused, missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[allow(trivial_casts, unsafe_code)]
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[rustfmt::skip]
mod generated {
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

/// Client, server trait and registration of the `Agent` service.
pub use generated::agent_ttrpc;

/// Messages and service of `proto/agent.proto`.
pub mod api {
    pub use super::generated::agent::*;
    pub use super::generated::agent_ttrpc::{Agent, AgentClient, create_agent};
}
