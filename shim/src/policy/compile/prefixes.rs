//! The addresses that anything is said of, cut into prefixes in each of which the same holds everywhere.
//!
//! A longest-prefix match gives one value, so a prefix within another has to say again what holds of the
//! outer one. Every prefix that is written anywhere, excepted ones among them, is a cut; sorted, the outer
//! ones come first.

use std::collections::BTreeMap;
use std::rc::Rc;

use joey_ebpf::policy::abi::Prefix;

use super::super::cidr;

/// Family, bits of the address, length.
type Key = (bool, u128, u8);

#[derive(Debug, Default)]
struct Cut {
    begin: Vec<u32>,
    end: Vec<u32>,
}

/// A prefix in which the same holds everywhere but in prefixes within.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) prefix: Prefix,
    /// What holds there, sorted.
    pub(super) holds: Rc<[u32]>,
    /// What of it was said of this very prefix.
    pub(super) begins: Vec<u32>,
    /// The index of the next outer one.
    pub(super) outer: Option<usize>,
}

/// The cuts. What may hold of addresses is a number.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    cuts: BTreeMap<Key, (Option<Prefix>, Cut)>,
}

impl Cuts {
    fn at(&mut self, prefix: Prefix) -> &mut Cut {
        let key = (prefix.address.is_ipv6(), cidr::word(prefix.address), prefix.bits);
        let (at, cut) = self.cuts.entry(key).or_default();
        *at = Some(prefix);
        cut
    }

    /// From here on `what` holds.
    pub(super) fn begin(&mut self, prefix: Prefix, what: u32) {
        self.at(prefix).begin.push(what);
    }

    /// From here on it does not, whatever was said of outer prefixes.
    pub(super) fn end(&mut self, prefix: Prefix, what: u32) {
        self.at(prefix).end.push(what);
    }

    /// Cuts where nothing begins or ends.
    pub(super) fn cut(&mut self, prefix: Prefix) {
        self.at(prefix);
    }

    /// All prefixes, sorted, outer ones first.
    pub(super) fn resolve(self) -> Vec<Piece> {
        let mut all: Vec<Piece> = Vec::with_capacity(self.cuts.len());
        let mut outer: Vec<usize> = Vec::new();
        let nothing: Rc<[u32]> = Rc::from([]);
        for (prefix, cut) in self.cuts.into_values() {
            let Some(prefix) = prefix else { continue };
            while outer.last().is_some_and(|at| !cidr::covers(all[*at].prefix, prefix)) {
                outer.pop();
            }
            let inherited = outer.last().map_or(&nothing, |at| &all[*at].holds);
            let holds = if cut.begin.is_empty() && cut.end.is_empty() {
                Rc::clone(inherited)
            } else {
                let mut holds = inherited.to_vec();
                holds.extend(&cut.begin);
                holds.retain(|what| !cut.end.contains(what));
                holds.sort_unstable();
                holds.dedup();
                holds.into()
            };
            all.push(Piece { prefix, holds, begins: cut.begin, outer: outer.last().copied() });
            outer.push(all.len() - 1);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        cidr::parse(text).unwrap()
    }

    #[test]
    fn inner_prefixes_say_again_what_holds() {
        let mut cuts = Cuts::default();
        cuts.begin(prefix("0.0.0.0/0"), 1);
        cuts.end(prefix("10.0.0.0/8"), 1);
        cuts.begin(prefix("10.1.0.0/16"), 2);
        cuts.begin(prefix("10.1.0.0/24"), 3);
        cuts.end(prefix("10.1.0.0/25"), 2);
        cuts.cut(prefix("10.1.0.1"));
        cuts.cut(prefix("9.9.9.9"));
        cuts.begin(prefix("::/0"), 4);
        let found: Vec<_> =
            cuts.resolve().into_iter().map(|it| (it.prefix, it.holds.to_vec())).collect();
        let expected: [(&str, &[u32]); 8] = [
            ("0.0.0.0/0", &[1]),
            ("9.9.9.9", &[1]),
            ("10.0.0.0/8", &[]),
            ("10.1.0.0/16", &[2]),
            ("10.1.0.0/24", &[2, 3]),
            ("10.1.0.0/25", &[3]),
            ("10.1.0.1", &[3]),
            ("::/0", &[4]),
        ];
        let expected: Vec<_> = expected.map(|(at, holds)| (prefix(at), holds.to_vec())).into();
        assert_eq!(found, expected);
    }
}
