//! Tests with maps that are made up.

mod book;
mod metrics;
mod server;

use std::cell::RefCell;
use std::collections::HashMap;

use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::{Denied, Event, EventKind, Flow, FlowKey, Pod, PodId, Side, State};
use joey_ebpf::policy::maps::MapError;

use super::book::{Book, Clock};
use super::names::{Names, Who};
use super::tables::Tables;

const SECOND: u64 = 1_000_000_000;

#[derive(Debug, Default)]
struct Fake {
    pods: HashMap<PodId, Pod>,
    listed: Vec<(FlowKey, Flow)>,
    unlisted: Vec<(FlowKey, Flow)>,
    denials: RefCell<Vec<(FlowKey, Denied)>>,
}

impl Tables for Fake {
    fn pods(&self) -> Result<HashMap<PodId, Pod>, MapError> {
        Ok(self.pods.clone())
    }
    fn flows(&self, _table: u32) -> Result<Vec<(FlowKey, Flow)>, MapError> {
        Ok(self.listed.clone())
    }
    fn flow(&self, _table: u32, key: &FlowKey) -> Result<Option<Flow>, MapError> {
        let all = self.listed.iter().chain(&self.unlisted);
        Ok(all.clone().find(|(other, _)| other == key).map(|(_, flow)| *flow))
    }
    fn denials(&self) -> Result<Vec<(FlowKey, Denied)>, MapError> {
        Ok(self.denials.borrow().clone())
    }
    fn remove_denied(&self, key: &FlowKey) -> Result<(), MapError> {
        self.denials.borrow_mut().retain(|(other, _)| other != key);
        Ok(())
    }
}

fn pod(since: u64) -> Pod {
    Pod {
        since,
        name: 1,
        tenant: 1,
        space: 1,
        table: 0,
        limited: false,
        other_end: None,
        mac: [2; 6],
    }
}

fn key(port: u16) -> FlowKey {
    FlowKey {
        pod: 1,
        local: "10.0.0.1".parse().unwrap(),
        remote: "10.0.0.2".parse().unwrap(),
        local_port: port,
        remote_port: 80,
        proto: 6,
        echo: Side::Vm,
    }
}

fn flow(begun: u64, seen: u64) -> Flow {
    Flow {
        seen,
        begun,
        packets: [2, 1],
        bytes: [120, 60],
        opener: Side::Vm,
        state: State::Answered,
        finished: 0,
        generation: 1,
    }
}

fn event(kind: EventKind, key: FlowKey, flow: Flow) -> Event {
    Event { kind, key, flow, tenant: 1, peer_tenant: 2, peer_service: 0, peer_pod: 2, peer_name: 0 }
}

fn denied(key: FlowKey, begun: u64) -> Event {
    event(EventKind::Denied(Reason::Options), key, flow(begun, begun))
}

fn book(past: usize) -> Book {
    book_of(past, 64)
}

fn book_of(past: usize, living: usize) -> Book {
    let mut names = Names::default();
    let who = |tenant: &str, name: &str| Who { tenant: tenant.to_owned(), name: name.to_owned() };
    names.put_pod(1, SECOND, who("red", "red/a"));
    names.put_pod(2, SECOND, who("blue", "blue/b"));
    names.put_tenant(1, "red");
    names.put_tenant(2, "blue");
    Book::new(Clock { boot: 0 }, past, living, names)
}
