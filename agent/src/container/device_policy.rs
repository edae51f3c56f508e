//! Which device nodes a container may open or make: a small eBPF program on its cgroup.
//!
//! The rules are tried last first, so that the last one that fits decides, as in the
//! specification; what every container gets is always allowed, anything else is denied.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::sys::{self, EbpfInstruction};
use super::{Cgroup, Error, Kind};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// Always allowed: null, zero, full, random, urandom, tty, console, ptmx and terminals.
const DEFAULT: [(u32, Option<u32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    fn covers(&self, other: &Rule) -> bool {
        let any_or_same = |mine: Option<u32>, other: Option<u32>| mine.is_none() || mine == other;
        any_or_same(self.kind, other.kind)
            && any_or_same(self.major, other.major)
            && any_or_same(self.minor, other.minor)
            && self.access & other.access == other.access
    }

    fn is_for_everything(&self) -> bool {
        (self.kind, self.major, self.minor, self.access) == (None, None, None, ALL)
    }
}

fn rule(rule: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let access = rule.access().as_deref().unwrap_or("rwm");
    let mut bits = 0;
    for letter in access.chars() {
        bits |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => {
                let text = format!("device rule: {access:?} is not made of r, w and m");
                return Err(Error::new(Kind::Invalid, text));
            }
        };
    }
    let kind = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHAR),
        _ => None,
    };
    let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
    let (major, minor) = (number(rule.major()), number(rule.minor()));
    Ok(Rule { allow: rule.allow(), kind, major, minor, access: bits })
}

/// Rules in the order of trying; `None` when everything is allowed anyway.
fn rules(resources: &LinuxResources) -> Result<Option<Vec<Rule>>, Error> {
    let default = DEFAULT.iter().map(|&(major, minor)| Rule {
        allow: true,
        kind: Some(CHAR),
        major: Some(major),
        minor,
        access: ALL,
    });
    // Making a node gives no access by itself, and unpacking an archive may need it.
    let make = [BLOCK, CHAR].map(|kind| Rule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        access: MKNOD,
    });
    let listed = resources.devices().iter().flatten().map(rule).collect::<Result<Vec<_>, _>>()?;
    let mut tried: Vec<Rule> = default.chain(make).collect();
    for rule in listed.into_iter().rev() {
        // What is allowed already: with it gone, most containers have the very same program.
        if rule.allow && tried.iter().any(|known| known.allow && known.covers(&rule)) {
            continue;
        }
        tried.push(rule);
        if rule.is_for_everything() {
            if rule.allow && tried.iter().all(|rule| rule.allow) {
                return Ok(None);
            }
            break;
        }
    }
    Ok(Some(tried))
}

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: u32) -> EbpfInstruction {
    u64::from(code)
        | u64::from(to) << 8
        | u64::from(from) << 12
        | u64::from(offset as u16) << 16
        | u64::from(value) << 32
}

const LOAD_W: u8 = 0x61;
const MOV_K: u8 = 0xb7;
const MOV_X: u8 = 0xbf;
const AND_K: u8 = 0x57;
const RSH_K: u8 = 0x77;
const JEQ_K: u8 = 0x15;
const JNE_K: u8 = 0x55;
const JNE_X: u8 = 0x5d;
const EXIT: u8 = 0x95;

/// Registers: 2 type, 3 access, 4 major, 5 minor, 1 scratch once the context is read.
fn program(rules: &[Rule]) -> Vec<EbpfInstruction> {
    let mut program = vec![
        instruction(LOAD_W, 2, 1, 0, 0),
        instruction(MOV_X, 3, 2, 0, 0),
        instruction(AND_K, 2, 0, 0, 0xffff),
        instruction(RSH_K, 3, 0, 0, 16),
        instruction(LOAD_W, 4, 1, 4, 0),
        instruction(LOAD_W, 5, 1, 8, 0),
    ];
    for rule in rules {
        block(&mut program, rule);
        if rule.is_for_everything() {
            return program;
        }
    }
    program.extend([instruction(MOV_K, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    program
}

/// One rule: tests that jump over its verdict when they fail, then the verdict.
fn block(program: &mut Vec<EbpfInstruction>, rule: &Rule) {
    let mut tests: Vec<(u8, u8, u8, u32)> = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push((JNE_K, 2, 0, kind));
    }
    if rule.access != ALL {
        tests.push((MOV_X, 1, 3, 0));
        tests.push((AND_K, 1, 0, rule.access));
        // Allowed only if all that is asked for is; denied if any of it is.
        tests.push(if rule.allow { (JNE_X, 1, 3, 0) } else { (JEQ_K, 1, 0, 0) });
    }
    tests.extend(rule.major.map(|major| (JNE_K, 4, 0, major)));
    tests.extend(rule.minor.map(|minor| (JNE_K, 5, 0, minor)));
    let length = tests.len();
    for (at, (code, to, from, value)) in tests.into_iter().enumerate() {
        let jumps = matches!(code, JNE_K | JNE_X | JEQ_K);
        let offset = if jumps { (length - at + 1) as i16 } else { 0 };
        program.push(instruction(code, to, from, offset, value));
    }
    program.push(instruction(MOV_K, 0, 0, 0, u32::from(rule.allow)));
    program.push(instruction(EXIT, 0, 0, 0, 0));
}

/// Puts the policy on a cgroup that has none yet.
pub(crate) fn attach(cgroup: BorrowedFd<'_>, resources: &LinuxResources) -> Result<(), Error> {
    let Some(rules) = rules(resources)? else {
        return Ok(());
    };
    load(program(&rules), |loaded| {
        sys::attach_device_program(cgroup, loaded)
            .map_err(|error| Error::failed(format!("attaching the device policy: {error}")))
    })
}

/// Loads the program that most containers get and puts it on a cgroup of its own, below `root`: the
/// first program on any cgroup makes the kernel patch its code.
pub(crate) fn prepare(root: &Path) -> Result<(), Error> {
    let mut usual = LinuxResources::default();
    usual.set_devices(Some(Vec::new()));
    attach(Cgroup::create(root, "prepared")?.fd(), &usual)
}

/// The program that was loaded last, with its text: most containers have the same rules, and the
/// kernel's check of a program is a long way.
static LOADED: Mutex<Option<(Vec<EbpfInstruction>, OwnedFd)>> = Mutex::new(None);

fn load(
    program: Vec<EbpfInstruction>,
    then: impl FnOnce(BorrowedFd<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut last = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, loaded)) = &*last
        && *known == program
    {
        return then(loaded.as_fd());
    }
    let loaded = sys::load_device_program(&program)
        .map_err(|error| Error::failed(format!("loading the device policy: {error}")))?;
    then(last.insert((program, loaded)).1.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Option<Vec<Rule>> {
        rules(&serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn last_rule_is_tried_first() {
        let rules = parsed(
            r#"{"devices":[{"allow":true,"type":"b","major":8,"access":"rwm"},
            {"allow":false,"access":"rwm"},
            {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]}"#,
        )
        .unwrap();
        assert_eq!(rules.len(), DEFAULT.len() + 4);
        assert_eq!(rules[DEFAULT.len() + 2].minor, Some(229));
        assert!(rules.last().unwrap().is_for_everything());
    }

    #[test]
    fn a_privileged_container_needs_no_program() {
        assert_eq!(parsed(r#"{"devices":[{"allow":false},{"allow":true,"access":"rwm"}]}"#), None);
        assert_eq!(parsed("{}").unwrap().len(), DEFAULT.len() + 2);
    }
}
