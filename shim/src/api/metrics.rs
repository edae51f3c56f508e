//! What the agent measured, as containerd's `io.containerd.cgroups.v2.Metrics`.
//!
//! containerd's CRI takes nothing else: an unknown or empty message fails the statistics of *every*
//! container on the node. The numbers come from the guest and are passed on as numbers only.

use containerd_shim::protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim::protos::protobuf::{Message as _, well_known_types::any::Any};
use joey_protocol::api::StatsResponse;

/// Name that containerd's type registry knows the message by.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Packs the statistics of one container, or of a sandbox's.
///
/// # Errors
/// The message cannot be encoded (it always can).
pub fn pack(stats: &StatsResponse) -> ttrpc::Result<Any> {
    let mut metrics = Metrics::new();
    metrics.cpu = Some(CPUStat {
        usage_usec: stats.cpu_usage_usec,
        user_usec: stats.cpu_user_usec,
        system_usec: stats.cpu_system_usec,
        nr_periods: stats.cpu_nr_periods,
        nr_throttled: stats.cpu_nr_throttled,
        throttled_usec: stats.cpu_throttled_usec,
        ..Default::default()
    })
    .into();
    metrics.memory = Some(memory(stats)).into();
    let event = |key: &str| stats.memory_events.get(key).copied().unwrap_or(0);
    metrics.memory_events = Some(MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..Default::default()
    })
    .into();
    metrics.pids =
        Some(PidsStat { current: stats.pids_current, limit: stats.pids_max, ..Default::default() })
            .into();
    metrics.io =
        Some(IOStat { usage: stats.io.iter().map(io_entry).collect(), ..Default::default() })
            .into();
    let value = metrics
        .write_to_bytes()
        .map_err(|error| ttrpc::Error::Others(format!("encode statistics: {error}")))?;
    Ok(Any { type_url: TYPE_URL.to_owned(), value, ..Default::default() })
}

fn io_entry(io: &joey_protocol::api::IoStat) -> IOEntry {
    IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    }
}

/// `memory.stat` key by key; a limit of 0 is the kernel's `max`.
fn memory(stats: &StatsResponse) -> MemoryStat {
    let stat = |key: &str| stats.memory_stat.get(key).copied().unwrap_or(0);
    let limit = |value: u64| if value == 0 { u64::MAX } else { value };
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        workingset_refault: stat("workingset_refault_anon")
            .saturating_add(stat("workingset_refault_file")),
        workingset_activate: stat("workingset_activate_anon")
            .saturating_add(stat("workingset_activate_file")),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: stats.memory_current,
        usage_limit: limit(stats.memory_max),
        swap_usage: stats.swap_current,
        swap_limit: limit(stats.swap_max),
        max_usage: stats.memory_peak,
        ..Default::default()
    }
}
