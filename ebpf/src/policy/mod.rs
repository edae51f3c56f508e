//! The policy at a VM's own wire: who may reach whom, decided on each packet that enters the pod's tap or
//! its interface.
//!
//! [`model`] is the specification: the rules in Rust, which decide about a frame as the programs in
//! `bpf/policy.bpf.c` do; the crate's tests hold the two together. [`abi`] is the layout of the maps, in
//! this one place, and [`attach`] binds a device to its pod. The `loader` module (feature `loader`) loads the
//! programs, [`maps`] reads and writes what they decide by.

pub mod abi;
pub mod attach;
#[cfg(feature = "loader")]
pub mod events;
#[cfg(feature = "loader")]
pub mod loader;
pub mod maps;
pub mod model;
#[cfg(test)]
#[cfg(feature = "loader")]
mod tests;

include!(concat!(env!("OUT_DIR"), "/reasons.rs"));

impl Reason {
    /// The reason with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get((number as usize).checked_sub(1)?).copied()
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.words())
    }
}
