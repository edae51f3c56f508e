//! The side that containerd sees: services, events, error codes.

pub mod convert;
pub mod errors;
pub mod events;
pub mod metrics;
pub mod pod_config;
pub mod publisher;
pub mod sandbox;
pub mod task;
