//! Seeing: who on this node spoke with whom, and what was not let through.
//!
//! ```text
//! ring of events ─┐
//! flow tables ────┼─▶ book ─▶ records ─▶ socket ─▶ joey flows
//! denials ────────┘    ▲
//! pods, names, identities ─▶ names
//! counters, totals ─▶ metrics ─▶ Prometheus
//! ```
//!
//! All of it reads what the packet programs write; none of it decides about a packet. The daemon may be killed
//! at any time: a new one reads the tables and goes on. `docs/flows.md` says what is lost then.

pub mod addresses;
pub mod book;
pub mod daemon;
pub mod metrics;
pub mod names;
pub mod places;
pub mod record;
pub mod server;
pub mod tables;

#[cfg(test)]
mod tests;
