//! The policy as data, beside direct interpretations of what the documents say (`direct`, over random worlds in
//! `random`), at scale (`scale`), and on the kernel's maps (`maps`).

use std::collections::HashMap;
use std::net::IpAddr;

use joey_ebpf::policy::model::Tables;

use super::apply::numbers_from;
use super::compile::{Compiled, Input, compile};
use super::document::Documents;
use super::entry::{Entry, Namespace};
use super::error::PolicyError;
use super::feed::Feed;

mod direct;
mod documents;
mod feed;
mod maps;
mod random;
mod refused;
mod scale;
mod services;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn documents(text: &str) -> Documents {
    let mut documents = Documents::default();
    documents.read("test.yaml", text).unwrap();
    documents
}

/// Compiles, with the numbers of names.
fn compiled(
    documents: &Documents,
    namespaces: &[Namespace],
    entries: &[Entry],
) -> Result<(Compiled, HashMap<String, u32>), PolicyError> {
    let checked = documents.check()?;
    let mut names = HashMap::new();
    let mut number = numbers_from(HashMap::new());
    let mut given = |name: &str| {
        let number = number(name)?;
        names.insert(name.to_owned(), number);
        Ok(number)
    };
    let input = Input { documents: &checked, namespaces, entries };
    let compiled = compile(input, &mut given)?;
    for entry in entries {
        given(entry.tenant())?;
        given(&entry.namespace)?;
    }
    Ok((compiled, names))
}

fn tables(compiled: &Compiled) -> Tables {
    Tables {
        locals: HashMap::new(),
        identities: compiled.identities.iter().copied().collect(),
        spaces: compiled.spaces.iter().copied().collect(),
        rules: compiled.rules.iter().copied().collect(),
    }
}

fn fed(text: &str) -> (Vec<Entry>, Vec<Namespace>) {
    let mut feed = Feed::default();
    feed.read("feed", text).unwrap();
    feed.finish(&super::tenant::default_annotations()).unwrap()
}

/// Random numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
