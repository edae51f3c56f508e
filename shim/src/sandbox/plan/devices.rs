//! Devices of the host that a container asks for.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::{BlockDevice, Refusal, refuse};

/// Devices that every container has anyway.
const STANDARD_DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// Host devices: block devices are volumes. A privileged container, which is given all that the host has, gets
/// the guest's own instead; others are refused.
pub(super) fn of_host(spec: &mut Spec) -> Result<Vec<BlockDevice>, Refusal> {
    let Some(mut linux) = spec.linux().clone() else { return Ok(Vec::new()) };
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let may = |rule: &LinuxDeviceCgroup, what| {
        rule.allow() && rule.access().as_deref().is_none_or(|access| access.contains(what))
    };
    let privileged = rules.iter().any(|rule| {
        may(rule, 'm')
            && rule.major().is_none()
            && rule.minor().is_none()
            && rule.typ().is_none_or(|typ| typ == LinuxDeviceType::A)
    });
    let devices = linux.devices().clone().unwrap_or_default();
    let standard = |device: &&LinuxDevice| {
        device.path().to_str().is_some_and(|path| STANDARD_DEVICES.contains(&path))
    };
    let foreign: Vec<_> = devices.iter().filter(|device| !standard(device)).collect();
    if privileged && !foreign.is_empty() {
        linux.set_devices(Some(Vec::new()));
        spec.set_linux(Some(linux));
        return Ok(Vec::new());
    }
    let mut blocks: Vec<BlockDevice> = Vec::new();
    for device in foreign {
        if device.typ() != LinuxDeviceType::B {
            return Err(refuse(
                "device",
                device.path().display(),
                "character devices of the host are not available in a virtual machine",
            ));
        }
        let numbers = (device.major(), device.minor());
        let ruled = |rule: &&LinuxDeviceCgroup| {
            rule.typ() == Some(LinuxDeviceType::B)
                && rule.major().zip(rule.minor()) == Some(numbers)
        };
        let writable = rules.iter().filter(ruled).any(|rule| may(rule, 'w'));
        if blocks.iter().all(|known| known.numbers != numbers) {
            blocks.push(BlockDevice { numbers, writable });
        }
    }
    Ok(blocks)
}
