//! What is in force: entries are written under an epoch, which counts from one write on.

use std::io;
use std::time::Duration;

use super::super::abi::{Active, Identity, Prefix, Rule, space_key};
use super::{Lock, MapError, Maps};
use crate::sys;

/// Keys of `active`, `enum active` in `bpf/policy.h`.
const EPOCH: [u8; 4] = 0_u32.to_ne_bytes();
const GENERATION: [u8; 4] = 1_u32.to_ne_bytes();

impl Maps {
    /// What is in force.
    pub fn active(&self) -> Result<Active, MapError> {
        let word = |key| Ok(self.active.get(&key)?.map_or(0, u32::from_ne_bytes));
        Ok(Active { epoch: word(EPOCH)?, generation: word(GENERATION)? })
    }

    /// Puts an epoch in force whose entries are there, and has every flow be judged by it.
    pub fn activate(&self, _lock: &Lock, epoch: u32) -> Result<(), MapError> {
        self.active.put(&EPOCH, &epoch.to_ne_bytes())?;
        self.changed()
    }

    /// Has flows be judged anew: what was changed before counts from now on. Nobody is waited for: the moment,
    /// read after the change, is as good as a count, and two who write at once have both changed before either
    /// is seen.
    pub(super) fn changed(&self) -> Result<(), MapError> {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let time = Duration::from(time.map_err(io::Error::from).map_err(self.active.fail("date"))?);
        // Units of 64 ns: the same number comes again after 275 seconds.
        let generation = (time.as_nanos() >> 6) as u32;
        self.active.put(&GENERATION, &generation.to_ne_bytes())
    }

    /// Says, in an epoch, whose the addresses of a prefix are.
    pub fn put_identity(
        &self,
        epoch: u32,
        prefix: Prefix,
        identity: Identity,
    ) -> Result<(), MapError> {
        self.identities.put(&prefix.encode(epoch), &identity.encode())
    }

    /// Says, in an epoch, which policy pods of a namespace have whose labels are not known.
    pub fn put_space(&self, epoch: u32, space: u32, policy: u32) -> Result<(), MapError> {
        self.spaces.put(&space_key(epoch, space), &policy.to_ne_bytes())
    }

    /// Allows something in an epoch.
    pub fn put_rule(&self, epoch: u32, rule: &Rule) -> Result<(), MapError> {
        self.rules.put(&rule.encode(epoch), &1_u32.to_ne_bytes())
    }

    /// Removes all entries of other epochs than this one, once no packet is judged by them any more.
    pub fn keep_only(&self, lock: &Lock, epoch: u32) -> Result<(), MapError> {
        sys::wait_for_programs().map_err(self.active.fail("wait for who reads an old epoch"))?;
        self.forget_others(lock, epoch)
    }

    /// The same without waiting: who is judged meanwhile may see a part of an epoch.
    pub(in super::super) fn forget_others(&self, _lock: &Lock, epoch: u32) -> Result<(), MapError> {
        let is = |bytes: &[u8]| bytes == epoch.to_ne_bytes();
        for key in self.identities.keys()?.iter().filter(|key| !is(&key[4..8])) {
            self.identities.remove(key)?;
        }
        for key in self.rules.keys()?.iter().filter(|key| !is(&key[4..8])) {
            self.rules.remove(key)?;
        }
        for key in self.spaces.keys()?.iter().filter(|key| !is(&key[..4])) {
            self.spaces.remove(key)?;
        }
        Ok(())
    }
}
