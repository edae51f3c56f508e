//! `UpdateServices`: what the host writes down of services, into the maps of the programs that translate by them.

use std::sync::PoisonError;

use joey_ebpf::guest::services::{self, Services};
use joey_ebpf::map::MapError;
use joey_protocol::services::{BACKEND, BadParts, FRONT, KEY, MAX_PARTS, Part, parts};
use joey_protocol::{api, limits};

use crate::programs::Programs;

const _: () = assert!(
    KEY == services::KEY && FRONT == services::FRONT && BACKEND == services::BACKEND,
    "the programs have the layout that the host writes"
);
const _: () = assert!(MAX_PARTS < limits::MAX_MESSAGE, "a piece fits a message");

/// Services cannot be changed. What counted before still does, perhaps with a part of the change: the host begins a
/// table anew.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServicesError {
    /// There are no programs that would translate.
    #[error("services: this guest has no programs that translate connections")]
    NoPrograms,
    /// A change comes before any table.
    #[error("services: generation {0} changes a table, and there is none")]
    NoTable(u64),
    /// The bytes are none that a host writes.
    #[error(transparent)]
    Parts(#[from] BadParts),
    /// A map does not take them.
    #[error("services: {0}")]
    Map(#[from] MapError),
}

impl ServicesError {
    /// Whether it is the request that is wrong.
    pub(crate) fn is_callers(&self) -> bool {
        matches!(self, Self::NoTable(_) | Self::Parts(_))
    }
}

/// Makes a piece of a change.
pub(crate) fn update(
    programs: Option<&Programs>,
    request: &api::UpdateServicesRequest,
) -> Result<(), ServicesError> {
    let programs = programs.ok_or(ServicesError::NoPrograms)?;
    let mut services = programs.services.lock().unwrap_or_else(PoisonError::into_inner);
    write(&mut services, request)
}

fn write(
    services: &mut Services,
    request: &api::UpdateServicesRequest,
) -> Result<(), ServicesError> {
    if request.fronts != 0 {
        services.begin(request.fronts, request.backends)?;
    } else if !services.has_table() {
        return Err(ServicesError::NoTable(request.generation));
    }
    for part in parts(&request.parts) {
        match part?.0 {
            Part::Backends { first, elements } => services.put_backends(first, elements)?,
            Part::Put { keys, fronts } => services.put_fronts(keys, fronts)?,
            Part::Remove { keys } => services.remove_fronts(keys)?,
        }
    }
    if request.last {
        services.commit()?;
    }
    Ok(())
}
