//! What `joey-snapshotter` is made of: images as block data, layers stored once per node.
//!
//! A layer comes in by [`service::apply`], a container gets a disk; both are made by `joey-image`. [`store`]
//! keeps them, [`service`] speaks to containerd.

pub mod config;
pub mod filter;
pub mod memory;
pub mod metrics;
pub mod service;
pub mod store;

#[cfg(test)]
mod tests;
