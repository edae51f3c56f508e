//! Harness of Joey's tests: a private node, the kubelet's side of the runtime interface, images, and a
//! look at everything a pod could leave behind.
//!
//! The tests themselves are in `promises/`, one file per promise; each runs on every supported containerd
//! through the public interfaces only, the way a kubelet and an operator use Joey.

pub mod bench;
pub mod capture;
pub mod controller;
pub mod cri;
pub mod image;
pub mod lab;
pub mod loop_device;
pub mod node;
pub mod paths;
pub mod pod;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod stream;
mod sys;

pub use sys::lose_power;
