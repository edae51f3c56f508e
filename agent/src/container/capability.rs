//! Capability sets: from names of the specification to the kernel's bits.

use std::collections::HashSet;
use std::io;

use oci_spec::runtime::{Capability, LinuxCapabilities};

use super::sys;

/// Capabilities that this kernel may know: the last one's number and one.
const COUNT: u64 = caps::Capability::CAP_CHECKPOINT_RESTORE as u64 + 1;

/// A process's capabilities, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

fn bits(set: &Option<HashSet<Capability>>) -> u64 {
    let bit = |capability: &Capability| {
        let name = format!("CAP_{capability}");
        name.parse::<caps::Capability>().map_or(0, |known| known.bitmask())
    };
    set.as_ref().map_or(0, |set| set.iter().map(bit).fold(0, |all, bit| all | bit))
}

impl Sets {
    /// The sets of a process; none at all when the specification names none.
    pub(crate) fn new(capabilities: Option<&LinuxCapabilities>) -> Sets {
        capabilities.map_or(Sets::default(), |sets| Sets {
            bounding: bits(sets.bounding()),
            effective: bits(sets.effective()),
            inheritable: bits(sets.inheritable()),
            permitted: bits(sets.permitted()),
            ambient: bits(sets.ambient()),
        })
    }

    /// Cuts the bounding set and keeps the permitted ones over the coming change of user.
    pub(crate) fn before_user(&self) -> io::Result<()> {
        for number in 0..COUNT {
            if self.bounding & (1 << number) == 0 {
                match sys::process_control(libc::PR_CAPBSET_DROP, number, 0) {
                    // A capability newer than this kernel.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                    result => result.map(drop)?,
                }
            }
        }
        sys::process_control(libc::PR_SET_KEEPCAPS, 1, 0).map(drop)
    }

    /// What the waiting process looks around with: its coming rights and the one to load a filter.
    pub(crate) fn while_waiting(&self) -> io::Result<()> {
        const SYS_ADMIN: u64 = 1 << 21;
        let permitted = self.permitted | SYS_ADMIN;
        sys::set_capabilities(self.effective | SYS_ADMIN, permitted, self.inheritable)
    }

    /// Sets all but the bounding set, which is done.
    pub(crate) fn after_user(&self) -> io::Result<()> {
        sys::process_control(libc::PR_SET_KEEPCAPS, 0, 0)?;
        sys::set_capabilities(self.effective, self.permitted, self.inheritable)?;
        for number in 0..COUNT {
            if self.ambient & (1 << number) != 0 {
                let raise = libc::PR_CAP_AMBIENT_RAISE as u64;
                sys::process_control(libc::PR_CAP_AMBIENT, raise, number)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_the_specification_has_a_bit() {
        let all = oci_spec::runtime::Capabilities::from_iter([
            Capability::Chown,
            Capability::SysAdmin,
            Capability::CheckpointRestore,
            Capability::AuditRead,
            Capability::LinuxImmutable,
        ]);
        assert_eq!(bits(&Some(all)), 1 | 1 << 21 | 1 << 40 | 1 << 37 | 1 << 9);
        assert_eq!(bits(&None), 0);
    }
}
