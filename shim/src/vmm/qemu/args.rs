//! QEMU's command line, pure: what the machine looks like. Raise [`LAYOUT`] with every change, so that
//! templates of the old machine are not restored into the new one.

use std::path::Path;

use joey_protocol::limits::{DISK_SLOTS, MAX_POD_DISK};
use serde_json::json;

/// Version of the machine's layout; part of a template's key.
pub const LAYOUT: u32 = 6;
/// The last slots can be written, the others only read: a guest learns that once, when it boots.
pub const WRITABLE_SLOTS: u32 = 4;
/// Size of an empty slot: no disk is larger, so that one is never cut off by a guest that has not heard of
/// it yet.
const EMPTY_BYTES: u64 = MAX_POD_DISK;
/// MAC the template boots with; each sandbox sets its own.
const TEMPLATE_MAC: &str = "02:00:00:00:00:01";
/// Descriptors as the VMM's process finds them.
pub(crate) mod fd {
    /// Control socket.
    pub(crate) const QMP: i32 = 3;
    /// The channel to the agent.
    pub(crate) const CHANNEL: i32 = 4;
    /// The guest's serial console.
    pub(crate) const CONSOLE: i32 = 5;
    /// The network.
    pub(crate) const TAP: i32 = 6;
    /// Device state to restore, or the checkpoint that is executed.
    pub(crate) const STATE: i32 = 7;
}

/// How the machine comes to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Boots, with private memory.
    Cold,
    /// Boots, its memory a shared file that becomes the template's.
    Build,
    /// Continues from a template.
    Clone,
}

/// Whether `slot` takes a disk that can be written.
pub fn slot_is_writable(slot: u32) -> bool {
    (DISK_SLOTS - WRITABLE_SLOTS..DISK_SLOTS).contains(&slot)
}

/// What the command line depends on.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    /// How it starts.
    pub mode: Mode,
    /// KVM, or software emulation.
    pub kvm: bool,
    /// Speed of the time-stamp counter, where the guest is told.
    pub tsc_khz: Option<u64>,
    /// Processors.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Kernel as QEMU sees the path.
    pub kernel: &'a Path,
    /// Initramfs; none for a clone.
    pub initrd: Option<&'a Path>,
    /// The template's memory, unless cold.
    pub memory: Option<&'a Path>,
}

/// QEMU's arguments, without the program.
pub fn arguments(machine: &Machine<'_>) -> Vec<String> {
    let mut args: Vec<String> = Vec::with_capacity(128);
    let mut add = |parts: &[&str]| args.extend(parts.iter().map(|part| (*part).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    add(&["-sandbox", SANDBOX]);
    add(&["-machine", MACHINE]);
    if machine.kvm {
        add(&["-accel", "kvm", "-cpu", "host"]);
    } else {
        // A cache of translated code that is too small is flushed whole, again and again: 16 MiB make
        // everything in the guest several times slower. Only what is used of it costs memory.
        // An emulated `rep movsb` goes byte by byte: without the two flags that praise it the guest's
        // kernel copies eight at a time.
        // Random numbers would come from a generator of QEMU's, which is part of a checkpoint: the same in
        // each of its clones.
        let cpu = "max,-erms,-fsrm,-rdrand,-rdseed";
        add(&["-accel", "tcg,tb-size=64,thread=multi", "-cpu", cpu]);
    }
    add(&["-smp", &machine.vcpus.to_string()]);
    add(&["-m", &format!("{}M", machine.memory_mib)]);
    add(&["-object", &memory(machine), "-object", "main-loop,id=main-loop"]);
    add(&["-chardev", &format!("socket,id=qmp,fd={}", fd::QMP)]);
    add(&["-mon", "chardev=qmp,mode=control"]);
    add(&["-chardev", &format!("socket,id=console,fd={}", fd::CONSOLE)]);
    add(&["-serial", "chardev:console"]);
    add(&["-global", "virtio-mmio.force-legacy=false"]);
    add(&["-chardev", &format!("socket,id=channel,fd={}", fd::CHANNEL)]);
    add(&["-device", "virtio-serial-device,max_ports=2"]);
    add(&["-device", "virtserialport,chardev=channel,name=joey.channel,nr=1"]);
    add(&["-netdev", &format!("tap,id=net,fd={},vhost=off", fd::TAP)]);
    add(&["-device", &format!("virtio-net-device,netdev=net,mac={TEMPLATE_MAC},{PLAIN_NIC}")]);
    for slot in 0..DISK_SLOTS {
        // A node of its own: one within another goes when the other gets another file.
        add(&["-blockdev", &empty(slot).to_string(), "-blockdev", &empty_slot(slot).to_string()]);
        // A guest is told of an error: a machine that stops instead would wait for ever.
        let share = match slot_is_writable(slot) {
            true => ",rerror=report,werror=report",
            false => ",share-rw=on",
        };
        add(&[
            "-device",
            &format!(
                "virtio-blk-device,drive=slot{slot},id=disk{slot},queue-size=64,num-queues=1{share}"
            ),
        ]);
    }
    add(&["-kernel", &machine.kernel.display().to_string()]);
    if let Some(initrd) = machine.initrd {
        add(&["-initrd", &initrd.display().to_string()]);
    }
    let tsc = machine.tsc_khz.map(|khz| format!(" tsc_early_khz={khz}")).unwrap_or_default();
    // Translated code does not speculate: the kernel's mitigations would only cost time.
    let plain = if machine.kvm { "" } else { " mitigations=off" };
    add(&["-append", &format!("{KERNEL_COMMAND_LINE}{tsc}{plain}")]);
    if machine.mode == Mode::Clone {
        add(&["-add-fd", &format!("fd={},set=1,opaque=state", fd::STATE)]);
        add(&["-incoming", "defer"]);
    }
    args
}

/// Every frame on the wire is the pod's: no filters to set, no carrier to lose, nothing to announce.
const PLAIN_NIC: &str = "ctrl_rx=off,ctrl_rx_extra=off,ctrl_vlan=off,ctrl_mac_addr=off,\
    ctrl_guest_offloads=off,status=off,guest_announce=off";
/// A QEMU that was made to misbehave may not start programs, gain privileges or move itself.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// ACPI because Debian's kernels take no virtio-mmio devices from the command line; the option ROM
/// because it loads the kernel; the second I/O APIC for the 18 devices.
const MACHINE: &str = "microvm,acpi=on,rtc=on,pit=on,pic=on,ioapic2=on,isa-serial=on,\
    x-option-roms=on,auto-kernel-cmdline=off,memory-backend=memory";
/// `panic=-1`, `reboot=t` and QEMU's `-no-reboot`: the guest's end is QEMU's end. Entropy comes from
/// the host with each sandbox, not from the processor, which a template would have asked once.
/// Beyond that, less work for a small machine: no pressure accounting, no watchdogs, no waiting for
/// quiet ticks where few processors can be asked at once (`rcu_expedited`), no huge pages but where asked for, no security module but the one that containers may use for themselves.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 random.trust_cpu=off edd=off tsc=reliable \
     psi=0 nowatchdog rcupdate.rcu_expedited=1 transparent_hugepage=madvise init_on_alloc=0 lsm=landlock";

fn memory(machine: &Machine<'_>) -> String {
    let size = machine.memory_mib;
    match machine.memory {
        None => format!("memory-backend-ram,id=memory,size={size}M"),
        Some(path) if machine.mode == Mode::Build => {
            format!(
                "memory-backend-file,id=memory,size={size}M,share=on,mem-path={}",
                path.display()
            )
        }
        Some(path) => format!(
            "memory-backend-file,id=memory,size={size}M,share=off,readonly=on,rom=off,mem-path={}",
            path.display()
        ),
    }
}

fn empty(slot: u32) -> serde_json::Value {
    json!({
        "driver": "null-co", "node-name": format!("empty{slot}"), "size": EMPTY_BYTES,
        "read-zeroes": true, "read-only": !slot_is_writable(slot),
    })
}

fn empty_slot(slot: u32) -> serde_json::Value {
    json!({
        "driver": "raw", "node-name": format!("slot{slot}"), "read-only": !slot_is_writable(slot),
        "discard": "unmap", "file": format!("empty{slot}"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(mode: Mode, kvm: bool) -> String {
        let machine = Machine {
            mode,
            kvm,
            tsc_khz: None,
            vcpus: 2,
            memory_mib: 256,
            kernel: Path::new("/vmlinuz"),
            initrd: (mode != Mode::Clone).then_some(Path::new("/initrd")),
            memory: (mode != Mode::Cold).then_some(Path::new("/memory")),
        };
        arguments(&machine).join(" ")
    }

    #[test]
    fn a_clone_never_writes_the_template() {
        let line = line(Mode::Clone, false);
        assert!(line.contains("share=off,readonly=on,rom=off"), "{line}");
        assert!(line.contains("-incoming defer"), "{line}");
        assert!(!line.contains("-initrd"), "{line}");
    }

    #[test]
    fn every_machine_is_confined_and_ends_with_its_guest() {
        for mode in [Mode::Cold, Mode::Build, Mode::Clone] {
            for kvm in [false, true] {
                let line = line(mode, kvm);
                assert!(line.contains("-sandbox on"), "{line}");
                assert!(line.contains("-no-reboot"), "{line}");
            }
        }
    }

    #[test]
    fn slots_divide_into_read_only_and_writable() {
        let writable = (0..DISK_SLOTS).filter(|slot| slot_is_writable(*slot)).count();
        assert_eq!(writable, 4);
        assert!(!slot_is_writable(DISK_SLOTS));
    }
}
