//! Mount options as the specification writes them, sorted by who understands them.

use super::sys::MountAttr;

const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME_MASK: u64 = 0x70;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;
const PRIVATE: u64 = 1 << 18;
const SLAVE: u64 = 1 << 19;
const SHARED: u64 = 1 << 20;
const UNBINDABLE: u64 = 1 << 17;

/// Parsed options of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Bind instead of a new file system.
    pub(crate) bind: bool,
    /// With everything mounted below.
    pub(crate) recursive: bool,
    /// For the mount itself.
    pub(crate) attributes: MountAttr,
    /// For the mount and all below it.
    pub(crate) recursive_attributes: MountAttr,
    /// `MS_SHARED` and its kin with whether they are recursive.
    pub(crate) propagation: Option<(u64, bool)>,
    /// For the file system: flags and `key=value`.
    pub(crate) data: Vec<String>,
}

impl Options {
    /// Whether the mount is to be read-only.
    pub(crate) fn read_only(&self) -> bool {
        self.attributes.set & RDONLY != 0
    }

    /// Takes "read-only" out, for a mount that is still to be filled.
    pub(crate) fn without_read_only(mut self) -> Options {
        self.attributes.set &= !RDONLY;
        self
    }
}

/// The attribute change that makes a mount read-only.
pub(crate) fn read_only() -> MountAttr {
    MountAttr { set: RDONLY, ..MountAttr::default() }
}

/// The attribute change for a propagation type by name.
pub(crate) fn propagation(name: &str) -> Option<(u64, bool)> {
    let (recursive, plain) = match name.strip_prefix('r') {
        Some(plain) => (true, plain),
        None => (false, name),
    };
    let kind = match plain {
        "private" => PRIVATE,
        "slave" => SLAVE,
        "shared" => SHARED,
        "unbindable" => UNBINDABLE,
        _ => return None,
    };
    Some((kind, recursive))
}

/// Attributes that an option sets and clears.
fn attribute(name: &str) -> Option<(u64, u64)> {
    Some(match name {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" => (0, NODEV),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        "noatime" => (NOATIME, ATIME_MASK),
        "strictatime" => (STRICTATIME, ATIME_MASK),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, ATIME_MASK),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        "nosymfollow" => (NOSYMFOLLOW, 0),
        "symfollow" => (0, NOSYMFOLLOW),
        _ => return None,
    })
}

fn change(attributes: &mut MountAttr, (set, clear): (u64, u64)) {
    attributes.set = (attributes.set & !clear) | set;
    attributes.clear = (attributes.clear & !set) | clear;
    if clear & ATIME_MASK != 0 {
        // The kernel wants the whole field cleared whenever it is set.
        attributes.clear |= ATIME_MASK;
    }
}

/// Sorts the options of one mount.
pub(crate) fn parse(options: &[String]) -> Result<Options, String> {
    let mut parsed = Options::default();
    for option in options {
        if let Some(pair) = attribute(option) {
            change(&mut parsed.attributes, pair);
        } else if let Some(kind) = propagation(option) {
            parsed.propagation = Some(kind);
        } else if let Some(pair) = option.strip_prefix('r').and_then(attribute) {
            change(&mut parsed.recursive_attributes, pair);
        } else {
            match option.as_str() {
                "bind" => parsed.bind = true,
                "rbind" => (parsed.bind, parsed.recursive) = (true, true),
                "defaults" | "async" | "nomand" | "nolazytime" | "noiversion" | "remount" => {}
                "idmap" | "ridmap" => {
                    return Err("ID-mapped mounts are not available in a VM pod".into());
                }
                "tmpcopyup" => {
                    return Err("option tmpcopyup is not available in a VM pod".into());
                }
                _ => parsed.data.push(option.clone()),
            }
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(options: &str) -> Options {
        parse(&options.split(',').map(String::from).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn options_are_sorted() {
        let tmpfs = of("nosuid,strictatime,mode=755,size=65536k,noexec,exec");
        assert_eq!(tmpfs.attributes.set, NOSUID | STRICTATIME);
        assert_eq!(tmpfs.attributes.clear, ATIME_MASK | NOEXEC);
        assert_eq!(tmpfs.data, ["mode=755", "size=65536k"]);
        let bind = of("rbind,rprivate,ro,rro");
        assert!(bind.bind && bind.recursive && bind.read_only());
        assert_eq!(bind.propagation, Some((PRIVATE, true)));
        assert_eq!(bind.recursive_attributes, read_only());
        assert_eq!(bind.without_read_only().attributes.set, 0);
        assert_eq!(of("ro,rw").attributes, MountAttr { clear: RDONLY, ..MountAttr::default() });
        assert_eq!(of("relatime").attributes.set, 0);
        assert_eq!(of("slave").propagation, Some((SLAVE, false)));
        assert!(parse(&["idmap".into()]).is_err());
    }
}
