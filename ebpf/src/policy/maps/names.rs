//! The numbers of tenants and namespaces.
//!
//! A number is given to one name and never again. A name that nobody uses is forgotten once many others were numbered
//! after it, with what its pods had counted, so that namespaces which come and go do not fill the map. Who starts a
//! pod looks its numbers up without the lock, takes the pod's place, and looks again: a name is forgotten before it
//! is asked who uses it, so that one of the two sees the other.

use std::collections::{HashMap, HashSet};
use std::io;

use super::super::abi::{identity_tenant, rule_tenants, space_of};
use super::{Lock, MapError, Maps, NAME};

/// A name is kept for as long as so many others were not numbered after it; as often is looked.
pub const KEPT: u32 = 4096;
/// Keys of no name: the number that was given last, and that which had been when was looked last.
const LAST: [u8; NAME] = [0; NAME];
const LOOKED: [u8; NAME] = {
    let mut key = [0; NAME];
    key[1] = 1;
    key
};

impl Maps {
    /// The number of a tenant or namespace, if it has one. 0 for no name.
    pub fn known_number(&self, name: &str) -> Result<Option<u32>, MapError> {
        if name.is_empty() {
            return Ok(Some(0));
        }
        Ok(self.names.get(&name_key(name)?)?.map(u32::from_ne_bytes))
    }

    /// The number of a tenant or namespace, which it has from now on. 0 for no name.
    pub fn number_of(&self, _lock: &Lock, name: &str) -> Result<u32, MapError> {
        if let Some(number) = self.known_number(name)? {
            return Ok(number);
        }
        let key = name_key(name)?;
        let number = self.word(&LAST)? + 1;
        self.names.put(&LAST, &number.to_ne_bytes())?;
        self.names.put(&key, &number.to_ne_bytes())?;
        Ok(number)
    }

    fn word(&self, key: &[u8; NAME]) -> Result<u32, MapError> {
        Ok(self.names.get(key)?.map_or(0, u32::from_ne_bytes))
    }

    /// Forgets names that nobody uses, if [`KEPT`] were numbered since this was done last. Not for between
    /// numbering what a policy names and writing it down.
    pub fn spare_names(&self, lock: &Lock) -> Result<(), MapError> {
        let last = self.word(&LAST)?;
        if last - self.word(&LOOKED)?.min(last) < KEPT {
            return Ok(());
        }
        self.forget_names(lock, KEPT)?;
        self.names.put(&LOOKED, &last.to_ne_bytes())
    }

    /// Forgets names that nobody uses but the last `kept` that were numbered. Returns how many.
    pub fn forget_names(&self, _lock: &Lock, kept: u32) -> Result<usize, MapError> {
        let young = self.word(&LAST)?.saturating_sub(kept);
        let mut used = self.numbers_of_the_policy()?;
        used.extend(self.numbers_of_pods()?);
        let (mut known, mut gone) = (HashSet::from([0]), Vec::new());
        for (key, number) in self.names.entries()? {
            let number = u32::from_ne_bytes(number);
            known.insert(number);
            if key[0] != 0 && number <= young && !used.contains(&number) {
                self.names.remove(&key)?;
                gone.push((key, number));
            }
        }
        // Whoever had looked before they went has a place by now, or will look again.
        let used = self.numbers_of_pods()?;
        let (back, gone): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(|(_, number)| used.contains(number));
        for (key, number) in back {
            self.names.put(&key, &number.to_ne_bytes())?;
        }
        for (_, number) in &gone {
            known.remove(number);
        }
        for (key, _) in self.totals.entries()? {
            if !known.contains(&u32::from_ne_bytes(key)) {
                self.totals.remove(&key)?;
            }
        }
        Ok(gone.len())
    }

    fn numbers_of_pods(&self) -> Result<HashSet<u32>, MapError> {
        let pods = self.pods()?.into_values();
        Ok(pods.flat_map(|pod| [pod.tenant, pod.space]).collect())
    }

    /// Of all epochs.
    fn numbers_of_the_policy(&self) -> Result<HashSet<u32>, MapError> {
        let mut used = HashSet::new();
        for key in self.identities.keys()? {
            used.extend(self.identities.get(&key)?.map(|identity| identity_tenant(&identity)));
        }
        used.extend(self.rules.keys()?.iter().filter_map(rule_tenants).flatten());
        used.extend(self.spaces.keys()?.iter().map(space_of));
        Ok(used)
    }

    /// Names by their numbers.
    pub fn names(&self) -> Result<HashMap<u32, String>, MapError> {
        let entries = self.names.entries()?.into_iter().map(|(key, number)| {
            let end = key.iter().position(|byte| *byte == 0).unwrap_or(NAME);
            (u32::from_ne_bytes(number), String::from_utf8_lossy(&key[..end]).into_owned())
        });
        Ok(entries.filter(|(_, name)| !name.is_empty()).collect())
    }
}

/// Key of `names`.
fn name_key(name: &str) -> Result<[u8; NAME], MapError> {
    let wrong = || MapError {
        name: "names",
        step: "number a name",
        source: io::Error::other(format!("{name:?} is not a name of at most {} bytes", NAME - 1)),
    };
    // The key ends with the name's first 0.
    if name.is_empty() || name.len() >= NAME || name.contains('\0') {
        return Err(wrong());
    }
    let mut key = [0; NAME];
    key[..name.len()].copy_from_slice(name.as_bytes());
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        for name in ["", "\0", "red\0x", &"x".repeat(256)] {
            assert!(name_key(name).is_err(), "{name:?}");
        }
        assert!(name_key(&"x".repeat(255)).is_ok());
    }
}
