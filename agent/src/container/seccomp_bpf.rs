//! A small assembler of classic BPF for seccomp: from ranges of call numbers to a program.
//!
//! Calls are found by binary search, not one after the other: when a filter is loaded the kernel
//! runs it once for every call number to find those it may always allow, so a list of four hundred
//! comparisons would cost each container start a million steps of an emulated processor.
//!
//! Blocks are emitted last first and put in order at the end, so that a jump's target is already
//! there and its distance known; a distance over 255 goes through an unconditional jump.

use super::sys::BpfInstruction;

const LD_W_ABS: u16 = 0x20;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGT_K: u16 = 0x25;
const JMP_JGE_K: u16 = 0x35;
const ALU_AND_K: u16 = 0x54;
const RET_K: u16 = 0x06;
/// Most instructions that the kernel takes.
pub(crate) const PROGRAM_MAX: usize = 4096;
/// Offset of the call's number in `struct seccomp_data`; the architecture follows, then the
/// instruction pointer and six arguments.
pub(crate) const NUMBER: u32 = 0;
pub(crate) const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Compare {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// `argument & mask == value`.
    Masked(u64),
}

/// One comparison of a 64-bit argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Condition {
    pub(crate) argument: u8,
    pub(crate) compare: Compare,
    pub(crate) value: u64,
}

/// A place in a program, counted from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Label(usize);

/// A program under construction, last instruction first.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    reversed: Vec<BpfInstruction>,
}

impl Assembler {
    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Label {
        self.reversed.push(BpfInstruction { code, jt, jf, k });
        Label(self.reversed.len())
    }

    /// How far the next instruction pushed would have to jump.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - label.0
    }

    /// A place near enough for a conditional jump that leads to `label`.
    fn near(&mut self, label: Label, slack: usize) -> Label {
        if self.distance(label) + slack <= usize::from(u8::MAX) { label } else { self.jump(label) }
    }

    fn jump(&mut self, label: Label) -> Label {
        let distance = self.distance(label) as u32;
        self.push(JMP_JA, 0, 0, distance)
    }

    fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) -> Label {
        let yes = self.near(yes, 1);
        let no = self.near(no, 0);
        let (jt, jf) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(code, jt, jf, k)
    }

    /// Ends the filter with `action`.
    pub(crate) fn ret(&mut self, action: u32) -> Label {
        self.push(RET_K, 0, 0, action)
    }

    /// Loads a word of `struct seccomp_data`; goes on with what was emitted last.
    pub(crate) fn load(&mut self, offset: u32, next: Label) -> Label {
        if self.distance(next) != 0 {
            self.jump(next);
        }
        self.push(LD_W_ABS, 0, 0, offset)
    }

    /// To `yes` if the accumulator is `k`.
    pub(crate) fn equal(&mut self, k: u32, yes: Label, no: Label) -> Label {
        self.branch(JMP_JEQ_K, k, yes, no)
    }

    /// To `yes` if the accumulator is at least `k`.
    pub(crate) fn at_least(&mut self, k: u32, yes: Label, no: Label) -> Label {
        self.branch(JMP_JGE_K, k, yes, no)
    }

    /// To `yes` if the argument is as the condition says.
    pub(crate) fn condition(&mut self, condition: Condition, yes: Label, no: Label) -> Label {
        let low = ARGUMENTS + 8 * u32::from(condition.argument);
        let (value_low, value_high) = (condition.value as u32, (condition.value >> 32) as u32);
        let (yes, no, order) = match condition.compare {
            Compare::Equal | Compare::Masked(_) => (yes, no, None),
            Compare::NotEqual => (no, yes, None),
            Compare::Greater => (yes, no, Some(JMP_JGT_K)),
            Compare::GreaterOrEqual => (yes, no, Some(JMP_JGE_K)),
            Compare::Less => (no, yes, Some(JMP_JGE_K)),
            Compare::LessOrEqual => (no, yes, Some(JMP_JGT_K)),
        };
        let mask = match condition.compare {
            Compare::Masked(mask) => Some(mask),
            _ => None,
        };
        let last = self.branch(order.unwrap_or(JMP_JEQ_K), value_low, yes, no);
        let last = self.masked_load(low, mask.map(|mask| mask as u32), last);
        let high = self.branch(JMP_JEQ_K, value_high, last, no);
        // In an order, a high half that differs already decides.
        let high = match order {
            Some(_) => self.branch(JMP_JGT_K, value_high, yes, high),
            None => high,
        };
        self.masked_load(low + 4, mask.map(|mask| (mask >> 32) as u32), high)
    }

    fn masked_load(&mut self, offset: u32, mask: Option<u32>, next: Label) -> Label {
        let next = match mask {
            Some(mask) => {
                if self.distance(next) != 0 {
                    self.jump(next);
                }
                self.push(ALU_AND_K, 0, 0, mask)
            }
            None => next,
        };
        self.load(offset, next)
    }

    /// Binary search over `starts`: sorted first numbers of ranges, with the place for each.
    /// The first range begins at 0; the accumulator holds the number.
    pub(crate) fn search(&mut self, starts: &[(u32, Label)]) -> Label {
        let (left, right) = starts.split_at(starts.len() / 2);
        match (left, right) {
            (_, []) => self.ret(0),
            ([], [(_, only)]) => *only,
            (_, [(pivot, _), ..]) => {
                let high = self.search(right);
                let low = self.search(left);
                self.at_least(*pivot, high, low)
            }
        }
    }

    /// The finished program, which begins with what was emitted last.
    pub(crate) fn finish(mut self) -> Vec<BpfInstruction> {
        self.reversed.reverse();
        self.reversed
    }
}

/// Runs a program on one call, as the kernel would.
#[cfg(test)]
pub(crate) fn run(program: &[BpfInstruction], architecture: u32, number: u32, a: [u64; 6]) -> u32 {
    let mut data = vec![number, architecture, 0, 0];
    data.extend(a.iter().flat_map(|argument| [*argument as u32, (*argument >> 32) as u32]));
    let (mut at, mut acc) = (0, 0);
    loop {
        let BpfInstruction { code, jt, jf, k } = program[at];
        let choose = |yes: bool| usize::from(if yes { jt } else { jf });
        at += 1 + match code {
            LD_W_ABS => {
                acc = data[k as usize / 4];
                0
            }
            ALU_AND_K => {
                acc &= k;
                0
            }
            JMP_JA => k as usize,
            JMP_JEQ_K => choose(acc == k),
            JMP_JGT_K => choose(acc > k),
            JMP_JGE_K => choose(acc >= k),
            RET_K => return k,
            other => panic!("instruction {other:#x}"),
        };
    }
}
