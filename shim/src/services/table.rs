//! A tenant's table as the bytes of a guest's maps, and the records that lead from one to the next.
//!
//! A record is a base, from which a new table is made, or a change of the one before it. A change writes the
//! endpoints of what is new where no front names any, then the fronts, then removes what is no more: whoever
//! connects meanwhile finds the old endpoints or the new ones. Where there is no room for that, a base follows, in
//! which all is in order again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use joey_protocol::services::{
    BACKEND, Backend, BadParts, FRONT, Front, KEY, Key, MAX_ELEMENTS, Part, parts,
};

use super::compile::{View, Wanted};

/// Room that a new table has beyond what is in it: a quarter, and this many fronts and endpoints.
const SPARE_FRONTS: usize = 64;
const SPARE_BACKENDS: usize = 256;

/// What leads from one table to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// With which change of the node's services it came.
    pub generation: u64,
    /// Room for fronts in a new table; 0 for a change.
    pub fronts: u32,
    /// Room for endpoints.
    pub backends: u32,
    /// [`Part`]s.
    pub parts: Vec<u8>,
}

impl Record {
    /// Whether a new table begins with it.
    #[must_use]
    pub fn is_base(&self) -> bool {
        self.fronts > 0
    }
}

/// A record that does not fit the table before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// Its parts are none.
    #[error(transparent)]
    Parts(#[from] BadParts),
    /// It is a change and comes first.
    #[error("services: a change comes before any base")]
    NoBase,
    /// It names endpoints that are not there.
    #[error("services: elements {first} to {end} of {room}")]
    Range {
        /// The first.
        first: usize,
        /// The one after the last.
        end: usize,
        /// How many there are.
        room: usize,
    },
}

/// A front, and what was wanted behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Placed {
    front: Front,
    wanted: Arc<Wanted>,
}

/// A tenant's table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    room_fronts: usize,
    room_backends: usize,
    fronts: BTreeMap<Key, Placed>,
    /// Ranges that no front names, in order, none next to another.
    free: Vec<Range<u32>>,
    last_id: u32,
}

/// Writes elements of two arrays as parts of a bounded size.
fn put(fronts: &[(Key, Front)], to: &mut Vec<u8>) {
    for some in fronts.chunks(MAX_ELEMENTS) {
        let keys: Vec<u8> = some.iter().flat_map(|(key, _)| key.encode()).collect();
        let fronts: Vec<u8> = some.iter().flat_map(|(_, front)| front.encode()).collect();
        Part::Put { keys: &keys, fronts: &fronts }.encode(to);
    }
}

fn backends(first: u32, elements: &[Backend], to: &mut Vec<u8>) {
    for (at, some) in (first..).step_by(MAX_ELEMENTS).zip(elements.chunks(MAX_ELEMENTS)) {
        let elements: Vec<u8> = some.iter().flat_map(|element| element.encode()).collect();
        Part::Backends { first: at, elements: &elements }.encode(to);
    }
}

fn remove(keys: &[Key], to: &mut Vec<u8>) {
    for some in keys.chunks(MAX_ELEMENTS) {
        let keys: Vec<u8> = some.iter().flat_map(|key| key.encode()).collect();
        Part::Remove { keys: &keys }.encode(to);
    }
}

fn range(front: &Front) -> Range<u32> {
    front.first..front.first + front.count
}

impl Table {
    /// A new table with what is wanted in it, and the record from which it is made.
    pub(super) fn base(generation: u64, view: &View) -> (Self, Record) {
        Self::default().rebuilt(generation, view)
    }

    /// The same in the place of this one: fronts keep their numbers, by which guests remember clients.
    pub(super) fn rebuilt(&self, generation: u64, view: &View) -> (Self, Record) {
        let mut table = Self { last_id: self.last_id, ..Self::default() };
        let mut all = Vec::new();
        for (key, wanted) in view {
            let id = self.fronts.get(key).map(|placed| placed.front.id);
            let front = table.front(id, wanted, all.len() as u32);
            all.extend_from_slice(&wanted.backends);
            table.fronts.insert(*key, Placed { front, wanted: Arc::clone(wanted) });
        }
        let used = all.len();
        table.room_fronts = view.len() + view.len() / 4 + SPARE_FRONTS;
        table.room_backends = used + used / 4 + SPARE_BACKENDS;
        table.free.push(used as u32..table.room_backends as u32);
        let mut record = Record {
            generation,
            fronts: table.room_fronts as u32,
            backends: table.room_backends as u32,
            parts: Vec::new(),
        };
        backends(0, &all, &mut record.parts);
        let fronts: Vec<_> =
            table.fronts.iter().map(|(key, placed)| (*key, placed.front)).collect();
        put(&fronts, &mut record.parts);
        (table, record)
    }

    fn front(&mut self, id: Option<u32>, wanted: &Wanted, first: u32) -> Front {
        let id = id.unwrap_or_else(|| {
            self.last_id = self.last_id.wrapping_add(1);
            self.last_id
        });
        Front { first, count: wanted.backends.len() as u32, affinity: wanted.affinity, id }
    }

    /// Goes on to what is wanted now; `None` if that is what is there.
    pub(super) fn advance(&mut self, generation: u64, view: &View) -> Option<Record> {
        let is_as = |wanted: &Arc<Wanted>, placed: &Placed| {
            Arc::ptr_eq(wanted, &placed.wanted) || **wanted == *placed.wanted
        };
        let changed: Vec<_> = view
            .iter()
            .filter(|(key, wanted)| !self.fronts.get(key).is_some_and(|it| is_as(wanted, it)))
            .collect();
        let gone: Vec<Key> =
            self.fronts.keys().filter(|key| !view.contains_key(key)).copied().collect();
        if changed.is_empty() && gone.is_empty() {
            return None;
        }
        let before = self.clone();
        let change = self.changed(generation, &changed, &gone);
        Some(change.unwrap_or_else(|| {
            let (table, record) = before.rebuilt(generation, view);
            *self = table;
            record
        }))
    }

    /// As a change of this table; `None` if there is no room, and then nothing is left of the table.
    fn changed(
        &mut self,
        generation: u64,
        changed: &[(&Key, &Arc<Wanted>)],
        gone: &[Key],
    ) -> Option<Record> {
        let mut record = Record { generation, ..Record::default() };
        let (mut fronts, mut freed) = (Vec::new(), Vec::new());
        for (key, wanted) in changed {
            let old = self.fronts.get(key).cloned();
            let id = old.as_ref().map(|placed| placed.front.id);
            let front = match &old {
                Some(old) if old.wanted.backends == wanted.backends => {
                    Front { affinity: wanted.affinity, ..old.front }
                }
                _ => {
                    let first = self.allocate(wanted.backends.len() as u32)?;
                    backends(first, &wanted.backends, &mut record.parts);
                    freed.extend(old.map(|old| range(&old.front)));
                    self.front(id, wanted, first)
                }
            };
            self.fronts.insert(**key, Placed { front, wanted: Arc::clone(wanted) });
            fronts.push((**key, front));
        }
        // What goes is still there when the last that is new has come.
        if self.fronts.len() > self.room_fronts {
            return None;
        }
        put(&fronts, &mut record.parts);
        remove(gone, &mut record.parts);
        for key in gone {
            freed.extend(self.fronts.remove(key).map(|placed| range(&placed.front)));
        }
        self.free.extend(freed);
        self.tidy();
        Some(record)
    }

    /// Takes a free range: of those that are large enough, the last one, so that what was freed lately is used
    /// late.
    fn allocate(&mut self, count: u32) -> Option<u32> {
        if count == 0 {
            return Some(0);
        }
        let fits = |range: &Range<u32>| range.end - range.start >= count;
        let free = self.free.iter_mut().rev().find(|range| fits(range))?;
        let first = free.start;
        free.start += count;
        Some(first)
    }

    fn tidy(&mut self) {
        self.free.retain(|range| !range.is_empty());
        self.free.sort_unstable_by_key(|range| range.start);
        self.free.dedup_by(|next, before| {
            let joins = before.end == next.start;
            if joins {
                before.end = next.end;
            }
            joins
        });
    }

    /// How many fronts and endpoints there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let backends = self.fronts.values().map(|placed| placed.wanted.backends.len()).sum();
        (self.fronts.len(), backends)
    }

    /// The addresses and ports with their endpoints, and how many seconds a client is kept at one.
    pub fn entries(&self) -> impl Iterator<Item = (Key, u32, &[Backend])> {
        self.fronts
            .iter()
            .map(|(key, placed)| (*key, placed.wanted.affinity, placed.wanted.backends.as_slice()))
    }
}

/// A table that is made of records, as a guest makes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replay {
    fronts: BTreeMap<Key, Front>,
    backends: Vec<Option<Backend>>,
    room_fronts: usize,
}

impl Replay {
    /// Adds a record.
    ///
    /// # Errors
    /// It does not fit what is there.
    pub fn add(&mut self, record: &Record) -> Result<(), BadRecord> {
        if record.is_base() {
            let (fronts, backends) = (BTreeMap::new(), vec![None; record.backends as usize]);
            *self = Self { fronts, backends, room_fronts: record.fronts as usize };
        } else if self.room_fronts == 0 {
            return Err(BadRecord::NoBase);
        }
        for part in parts(&record.parts) {
            match part?.0 {
                Part::Backends { first, elements } => {
                    let elements = elements.as_chunks::<BACKEND>().0;
                    let (first, room) = (first as usize, self.backends.len());
                    let end = first + elements.len();
                    let to = self.backends.get_mut(first..end);
                    let to = to.ok_or(BadRecord::Range { first, end, room })?;
                    for (to, element) in to.iter_mut().zip(elements) {
                        *to = Some(Backend::decode(element));
                    }
                }
                Part::Put { keys, fronts } => {
                    let fronts = fronts.as_chunks::<FRONT>().0.iter().map(Front::decode);
                    let keys = keys.as_chunks::<KEY>().0.iter().map(Key::decode);
                    for (key, front) in keys.zip(fronts) {
                        self.behind(&front)?;
                        self.fronts.insert(key, front);
                    }
                }
                Part::Remove { keys } => {
                    for key in keys.as_chunks::<KEY>().0 {
                        self.fronts.remove(&Key::decode(key));
                    }
                }
            }
        }
        Ok(())
    }

    fn behind(&self, front: &Front) -> Result<Vec<Backend>, BadRecord> {
        let first = front.first as usize;
        let (end, room) = (first + front.count as usize, self.backends.len());
        let bad = BadRecord::Range { first, end, room };
        let all = self.backends.get(first..end).ok_or_else(|| bad.clone())?;
        all.iter().copied().collect::<Option<Vec<_>>>().ok_or(bad)
    }

    /// The table, to go on from.
    ///
    /// # Errors
    /// There is none, or a front names endpoints that are not there.
    pub fn table(&self) -> Result<Table, BadRecord> {
        if self.room_fronts == 0 {
            return Err(BadRecord::NoBase);
        }
        let mut table = Table {
            room_fronts: self.room_fronts,
            room_backends: self.backends.len(),
            last_id: self.fronts.values().map(|front| front.id).max().unwrap_or(0),
            ..Table::default()
        };
        let mut used: Vec<Range<u32>> = self.fronts.values().map(range).collect();
        used.sort_unstable_by_key(|range| range.start);
        let mut at = 0;
        for range in used.into_iter().filter(|range| !range.is_empty()) {
            table.free.push(at..range.start);
            at = range.end;
        }
        table.free.push(at..self.backends.len() as u32);
        table.tidy();
        for (key, front) in &self.fronts {
            let wanted = Wanted { affinity: front.affinity, backends: self.behind(front)? };
            let placed = Placed { front: *front, wanted: Arc::new(wanted) };
            table.fronts.insert(*key, placed);
        }
        Ok(table)
    }
}
