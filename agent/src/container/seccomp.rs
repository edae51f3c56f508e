//! Seccomp: from the specification's rules to a filter of the kernel.
//!
//! Meaning, as with libseccomp: the first rule without conditions decides a call; else the first
//! rule whose conditions hold; else the default action. Conditions of one rule on different
//! arguments must all hold; when one argument is named twice, each condition is a rule of its own.
//! Names that this kernel's architectures lack are skipped. Calls newer than any the profile names
//! give ENOSYS instead of a refusal, so that a C library falls back to an older call.

use std::collections::{BTreeMap, HashMap};

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompFilterFlag as Flag, LinuxSeccompOperator as Operator,
};

use super::seccomp_bpf::{ARCHITECTURE, Assembler, Compare, Condition, Label, NUMBER, PROGRAM_MAX};
use super::sys::{self, BpfInstruction};
use super::syscalls::{Row, TABLE};
use super::{Error, Kind};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const FLAG_TSYNC: u32 = 1;
const FLAG_LOG: u32 = 2;
const FLAG_SPEC_ALLOW: u32 = 4;

/// A filter ready to load.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    program: Vec<BpfInstruction>,
    flags: u32,
}

/// What happens to one call: the action when no condition holds, and conditional ones in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Decision {
    always: Option<u32>,
    conditional: Vec<(Vec<Condition>, u32)>,
}

fn action(action: Action, errno: Option<u32>) -> Result<u32, Error> {
    if action == Action::ScmpActNotify {
        return Err(Error::new(
            Kind::Unsupported,
            "seccomp: SCMP_ACT_NOTIFY needs a listener on the host, which a VM pod cannot reach",
        ));
    }
    if errno.is_some_and(|errno| errno > 0xffff) {
        return Err(Error::new(Kind::Invalid, format!("seccomp: errnoRet {errno:?} is too large")));
    }
    Ok(action.as_u32(errno))
}

fn condition(argument: &LinuxSeccompArg) -> Result<Condition, Error> {
    let index = argument.index();
    if index > 5 {
        let text = format!("seccomp: a system call has six arguments, there is no index {index}");
        return Err(Error::new(Kind::Invalid, text));
    }
    let (compare, value) = match argument.op() {
        Operator::ScmpCmpNe => (Compare::NotEqual, argument.value()),
        Operator::ScmpCmpLt => (Compare::Less, argument.value()),
        Operator::ScmpCmpLe => (Compare::LessOrEqual, argument.value()),
        Operator::ScmpCmpEq => (Compare::Equal, argument.value()),
        Operator::ScmpCmpGe => (Compare::GreaterOrEqual, argument.value()),
        Operator::ScmpCmpGt => (Compare::Greater, argument.value()),
        Operator::ScmpCmpMaskedEq => {
            (Compare::Masked(argument.value()), argument.value_two().unwrap_or(0))
        }
    };
    Ok(Condition { argument: index as u8, compare, value })
}

/// The rule's alternatives: each a set of conditions that must all hold.
fn alternatives(arguments: &[LinuxSeccompArg]) -> Result<Vec<Vec<Condition>>, Error> {
    let conditions = arguments.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let mut seen = [0u8; 6];
    conditions.iter().for_each(|one| seen[usize::from(one.argument)] += 1);
    if seen.iter().any(|count| *count > 1) {
        return Ok(conditions.into_iter().map(|one| vec![one]).collect());
    }
    Ok(vec![conditions])
}

/// Decisions by call name, and the default action.
fn decisions(spec: &LinuxSeccomp) -> Result<(HashMap<&str, Decision>, u32), Error> {
    let default = action(spec.default_action(), spec.default_errno_ret())?;
    let mut calls: HashMap<&str, Decision> = HashMap::new();
    for rule in spec.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        let arguments = rule.args().as_deref().unwrap_or(&[]);
        let alternatives = alternatives(arguments)?;
        for name in rule.names() {
            let decision = calls.entry(name).or_default();
            if arguments.is_empty() {
                decision.always.get_or_insert(action);
            } else {
                let rules = alternatives.iter().map(|conditions| (conditions.clone(), action));
                decision.conditional.extend(rules);
            }
        }
    }
    Ok((calls, default))
}

/// Emits the code for one ABI: decision by number, numbers from `bit` up.
fn emit_abi(
    assembler: &mut Assembler,
    calls: &HashMap<&str, Decision>,
    default: u32,
    number_of: fn(&Row) -> i16,
    bit: u32,
) -> Label {
    let by_number: BTreeMap<u32, &Decision> = TABLE
        .iter()
        .filter(|row| number_of(row) >= 0)
        .filter_map(|row| Some((bit | number_of(row) as u32, calls.get(row.0)?)))
        .collect();
    let mut leaves: HashMap<Decision, Label> = HashMap::new();
    let mut leaf = |assembler: &mut Assembler, decision: &Decision| match leaves.get(decision) {
        Some(label) => *label,
        None => {
            let label = emit_decision(assembler, decision, default);
            leaves.insert(decision.clone(), label);
            label
        }
    };
    let otherwise = leaf(assembler, &Decision::default());
    let mut starts = vec![(0, otherwise)];
    let mut next_free = 0;
    for (number, decision) in by_number {
        let label = leaf(assembler, decision);
        if number != next_free {
            add_range(&mut starts, next_free, otherwise);
        }
        add_range(&mut starts, number, label);
        next_free = number + 1;
    }
    let beyond = if is_allowing(default) { default } else { RET_ENOSYS };
    let beyond = leaf(assembler, &Decision { always: Some(beyond), conditional: Vec::new() });
    add_range(&mut starts, next_free, if next_free == 0 { otherwise } else { beyond });
    assembler.search(&starts)
}

/// Appends a range; one that begins where the last did replaces it, equal neighbours become one.
fn add_range(starts: &mut Vec<(u32, Label)>, first: u32, label: Label) {
    if starts.last().is_some_and(|last| last.0 == first) {
        starts.pop();
    }
    if starts.last().is_none_or(|last| last.1 != label) {
        starts.push((first, label));
    }
}

/// Allow, log and trace let a call through: a profile that does so by default refuses by name.
fn is_allowing(action: u32) -> bool {
    matches!(action >> 16, 0x7fff | 0x7ffc | 0x7ff0)
}

fn emit_decision(assembler: &mut Assembler, decision: &Decision, default: u32) -> Label {
    if let Some(always) = decision.always {
        return assembler.ret(always);
    }
    let mut otherwise = assembler.ret(default);
    for (conditions, action) in decision.conditional.iter().rev() {
        let mut then = assembler.ret(*action);
        for condition in conditions.iter().rev() {
            then = assembler.condition(*condition, then, otherwise);
        }
        otherwise = then;
    }
    otherwise
}

fn flags(spec: &LinuxSeccomp) -> Result<u32, Error> {
    spec.flags().iter().flatten().try_fold(0, |flags, flag| match flag {
        Flag::SeccompFilterFlagTsync => Ok(flags | FLAG_TSYNC),
        Flag::SeccompFilterFlagLog => Ok(flags | FLAG_LOG),
        Flag::SeccompFilterFlagSpecAllow => Ok(flags | FLAG_SPEC_ALLOW),
        Flag::SeccompFilterFlagWaitKillableRecv => Err(Error::new(
            Kind::Unsupported,
            "seccomp: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs a listener on the host",
        )),
    })
}

impl Filter {
    /// Translates a profile.
    pub(crate) fn new(spec: &LinuxSeccomp) -> Result<Filter, Error> {
        let (calls, default) = decisions(spec)?;
        let listed = |arch: Arch| spec.architectures().iter().flatten().any(|one| *one == arch);
        let mut assembler = Assembler::default();
        let kill = assembler.ret(RET_KILL_PROCESS);
        let i386 = match listed(Arch::ScmpArchX86) {
            true => {
                let search = emit_abi(&mut assembler, &calls, default, |row| row.2, 0);
                Some(assembler.load(NUMBER, search))
            }
            false => None,
        };
        let x32 = match listed(Arch::ScmpArchX32) {
            true => emit_abi(&mut assembler, &calls, default, |row| row.3, X32_BIT),
            false => kill,
        };
        let native = emit_abi(&mut assembler, &calls, default, |row| row.1, 0);
        let by_bit = assembler.at_least(X32_BIT, x32, native);
        // -1 is what a tracer makes of a call it skips: no x32 call.
        let skipped = assembler.ret(default);
        let by_number = assembler.equal(u32::MAX, skipped, by_bit);
        let x86_64 = assembler.load(NUMBER, by_number);
        let other = assembler.equal(AUDIT_ARCH_I386, i386.unwrap_or(kill), kill);
        let start = assembler.equal(AUDIT_ARCH_X86_64, x86_64, other);
        assembler.load(ARCHITECTURE, start);
        let program = assembler.finish();
        if program.len() > PROGRAM_MAX {
            let text = format!(
                "seccomp: the profile needs {} instructions, the kernel takes {PROGRAM_MAX}",
                program.len()
            );
            return Err(Error::new(Kind::Unsupported, text));
        }
        Ok(Filter { program, flags: flags(spec)? })
    }

    /// Puts the process under the filter, for good.
    pub(crate) fn load(&self) -> Result<(), Error> {
        sys::load_seccomp(&self.program, self.flags)
            .map_err(|error| Error::failed(format!("loading the seccomp filter: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::seccomp_bpf::run;
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x0005_0001;

    fn filter(json: &str) -> Filter {
        Filter::new(&serde_json::from_str(json).unwrap()).unwrap()
    }

    fn on(filter: &Filter, number: i64, arguments: &[u64]) -> u32 {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        run(&filter.program, AUDIT_ARCH_X86_64, number as u32, all)
    }

    #[test]
    fn names_decide_and_new_calls_are_unknown() {
        let filter = filter(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"names":["read","write","mseal","no_such_call"],"action":"SCMP_ACT_ALLOW"},
            {"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
            {"names":["close"],"action":"SCMP_ACT_KILL_PROCESS"}]}"#,
        );
        assert_eq!(on(&filter, libc::SYS_read, &[]), ALLOW);
        assert_eq!(on(&filter, libc::SYS_write, &[]), ALLOW);
        assert_eq!(on(&filter, libc::SYS_open, &[]), EPERM);
        assert_eq!(on(&filter, libc::SYS_close, &[]), RET_KILL_PROCESS);
        assert_eq!(on(&filter, libc::SYS_mkdir, &[]), 0x0005_0026);
        assert_eq!(on(&filter, 463, &[]), RET_ENOSYS);
        assert_eq!(on(&filter, -1, &[]), EPERM);
        // ABIs that are not listed.
        assert_eq!(run(&filter.program, AUDIT_ARCH_I386, 3, [0; 6]), RET_KILL_PROCESS);
        assert_eq!(on(&filter, i64::from(X32_BIT), &[]), RET_KILL_PROCESS);
    }

    #[test]
    fn other_abis_have_their_own_numbers() {
        let filter = filter(
            r#"{"defaultAction":"SCMP_ACT_ERRNO",
            "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[{"names":["mkdir","ioctl"],"action":"SCMP_ACT_ALLOW"}]}"#,
        );
        assert_eq!(run(&filter.program, AUDIT_ARCH_I386, 39, [0; 6]), ALLOW);
        assert_eq!(run(&filter.program, AUDIT_ARCH_I386, 40, [0; 6]), EPERM);
        assert_eq!(on(&filter, libc::SYS_mkdir, &[]), ALLOW);
        assert_eq!(on(&filter, i64::from(X32_BIT | 514), &[]), ALLOW);
        assert_eq!(on(&filter, i64::from(X32_BIT | 16), &[]), EPERM);
        assert_eq!(run(&filter.program, 0xc000_00b7, 0, [0; 6]), RET_KILL_PROCESS);
    }

    #[test]
    fn arguments_are_compared_in_64_bits() {
        let wide = 0x1_0000_0005u64;
        // Operator, value, second value, arguments that hold, arguments that do not.
        type Case<'a> = (&'a str, u64, u64, &'a [u64], &'a [u64]);
        let cases: &[Case<'_>] = &[
            ("EQ", wide, 0, &[wide], &[5, wide + 1, 0x2_0000_0005]),
            ("NE", wide, 0, &[5, 0x2_0000_0005], &[wide]),
            ("LT", wide, 0, &[5, 0xffff_ffff, wide - 1], &[wide, wide + 1, 0x2_0000_0000]),
            ("LE", wide, 0, &[5, wide], &[wide + 1, 0x2_0000_0000]),
            ("GT", wide, 0, &[wide + 1, 0x2_0000_0000], &[wide, 0xffff_ffff]),
            ("GE", wide, 0, &[wide, 0x2_0000_0000], &[wide - 1, 6]),
            (
                "MASKED_EQ",
                0xf0_0000_00f0,
                0x10_0000_0020,
                &[0x1f_0000_002f],
                &[0x20, 0x1f_0000_0030],
            ),
        ];
        for (operator, value, second, yes, no) in cases {
            let filter = filter(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["ioctl"],
                "action":"SCMP_ACT_ALLOW","args":[{{"index":1,"value":{value},
                "valueTwo":{second},"op":"SCMP_CMP_{operator}"}}]}}]}}"#
            ));
            for argument in *yes {
                assert_eq!(on(&filter, libc::SYS_ioctl, &[0, *argument]), ALLOW, "{operator}");
            }
            for argument in *no {
                assert_eq!(on(&filter, libc::SYS_ioctl, &[0, *argument]), EPERM, "{operator}");
            }
        }
    }

    #[test]
    fn long_programs_jump_far() {
        let values: Vec<String> = (0..300)
            .map(|value| {
                format!(
                    r#"{{"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
                    {{"index":0,"value":{value},"op":"SCMP_CMP_EQ"}},
                    {{"index":2,"value":{value},"op":"SCMP_CMP_EQ"}}]}}"#
                )
            })
            .collect();
        let filter = filter(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{}]}}"#,
            values.join(",")
        ));
        assert_eq!(on(&filter, libc::SYS_socket, &[299, 0, 299]), ALLOW);
        assert_eq!(on(&filter, libc::SYS_socket, &[299, 0, 298]), EPERM);
        assert_eq!(on(&filter, libc::SYS_socket, &[300, 0, 300]), EPERM);
        assert_eq!(on(&filter, libc::SYS_read, &[]), EPERM);
    }

    #[test]
    fn what_needs_the_host_is_refused() {
        let notify = serde_json::from_str(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).unwrap();
        assert!(Filter::new(&notify).unwrap_err().to_string().contains("SCMP_ACT_NOTIFY"));
        let unknown = serde_json::from_str::<LinuxSeccomp>(r#"{"defaultAction":"SCMP_ACT_X"}"#);
        assert!(unknown.unwrap_err().to_string().contains("SCMP_ACT_X"));
    }
}
