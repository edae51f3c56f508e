//! What `joey-snapshotter` is made of: images as block data, layers stored once per node.
//!
//! A layer comes in by [`service::apply`]: [`tar`] → [`layer`] (one pass, no file system). A container
//! gets a disk: layers merged by [`tree`], described by [`erofs`], protected by [`verity`], put
//! together by [`disk`]. [`store`] keeps it all, [`service`] speaks to containerd.

pub mod config;
pub mod disk;
pub mod erofs;
pub mod filter;
pub mod layer;
pub mod memory;
pub mod metrics;
pub mod service;
pub mod store;
pub mod tar;
pub mod tree;
pub mod verity;

#[cfg(test)]
mod tests;
