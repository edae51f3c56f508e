//! From a specification to what the engine will do: every refusal that needs no side effect.
//!
//! Namespaces: the guest's own network, IPC and UTS namespaces are the pod's. A container that
//! names one of those by path, or does not list it, shares the pod's; one that lists it without a
//! path gets its own (but never an own network). Mount and cgroup namespaces are always its own.

use std::collections::HashMap;

use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Spec};

use super::{Error, Kind};

/// A container's PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    /// A new one.
    Own,
    /// The pod's shared one.
    Pod,
}

/// A checked specification.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) spec: Spec,
    /// `spec.linux`, empty where the specification has none.
    pub(crate) linux: Linux,
    pub(crate) process: Process,
    pub(crate) pid: PidNamespace,
    pub(crate) own_ipc: bool,
    pub(crate) own_uts: bool,
    /// Paths below /proc/sys, and values.
    pub(crate) sysctls: Vec<(String, String)>,
}

fn unsupported<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(Kind::Unsupported, message))
}

fn invalid<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(Kind::Invalid, message))
}

impl Plan {
    /// Checks `spec`.
    pub(crate) fn new(mut spec: Spec) -> Result<Plan, Error> {
        refuse_hooks(&spec)?;
        let Some(process) = spec.process_mut().take() else {
            return invalid("the specification has no process to run");
        };
        check_process(&process)?;
        let linux = spec.linux_mut().take().unwrap_or_default_empty();
        check_linux(&linux)?;
        let namespaces = Namespaces::new(&linux)?;
        let sysctls = sysctls(linux.sysctl().as_ref(), &namespaces)?;
        let Namespaces { pid, own_ipc, own_uts } = namespaces;
        Ok(Plan { spec, linux, process, pid, own_ipc, own_uts, sysctls })
    }
}

/// `Linux::default()` is youki's idea of a container; this one is what an absent section means.
trait UnwrapOrEmpty {
    fn unwrap_or_default_empty(self) -> Linux;
}

impl UnwrapOrEmpty for Option<Linux> {
    fn unwrap_or_default_empty(self) -> Linux {
        self.unwrap_or_else(|| {
            let mut linux = Linux::default();
            linux
                .set_namespaces(None)
                .set_devices(None)
                .set_resources(None)
                .set_masked_paths(None)
                .set_readonly_paths(None);
            linux
        })
    }
}

struct Namespaces {
    pid: PidNamespace,
    own_ipc: bool,
    own_uts: bool,
}

impl Namespaces {
    fn new(linux: &Linux) -> Result<Namespaces, Error> {
        let listed: HashMap<_, _> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|namespace| (namespace.typ(), namespace.path().is_some()))
            .collect();
        for (kind, name) in [(LinuxNamespaceType::User, "user"), (LinuxNamespaceType::Time, "time")]
        {
            if listed.contains_key(&kind) {
                return unsupported(format!(
                    "{name} namespaces are not available in a VM pod: the pod's own kernel is \
                     the boundary; remove hostUsers: false or its like"
                ));
            }
        }
        let pid = match listed.get(&LinuxNamespaceType::Pid) {
            Some(false) => PidNamespace::Own,
            Some(true) => PidNamespace::Pod,
            None => {
                return unsupported(
                    "host PID namespace is not available to a VM pod: remove hostPID",
                );
            }
        };
        let own = |kind| listed.get(&kind) == Some(&false);
        let own_ipc = own(LinuxNamespaceType::Ipc);
        let own_uts = own(LinuxNamespaceType::Uts);
        Ok(Namespaces { pid, own_ipc, own_uts })
    }
}

fn refuse_hooks(spec: &Spec) -> Result<(), Error> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    let kinds = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (kind, hooks) in kinds {
        if let Some(hook) = hooks.iter().flatten().next() {
            return unsupported(format!(
                "{kind} hook {:?} cannot run: it is a program of the host, and the container is \
                 in a VM",
                hook.path()
            ));
        }
    }
    Ok(())
}

/// What of a process this engine cannot do, and what no engine can.
pub(crate) fn check_process(process: &Process) -> Result<(), Error> {
    if process.args().as_ref().is_none_or(|arguments| arguments.is_empty()) {
        return invalid("the process has no command: args is empty");
    }
    if !process.cwd().is_absolute() {
        return invalid(format!("the working directory {:?} is not absolute", process.cwd()));
    }
    if process.scheduler().is_some() {
        return unsupported("process.scheduler is not available in a VM pod");
    }
    if process.io_priority().is_some() {
        return unsupported("process.ioPriority is not available in a VM pod");
    }
    if process.exec_cpu_affinity().is_some() {
        return unsupported("process.execCPUAffinity is not available in a VM pod");
    }
    Ok(())
}

fn check_linux(linux: &Linux) -> Result<(), Error> {
    let some = |what: bool, name: &str| match what {
        true => unsupported(format!("linux.{name} is not available in a VM pod")),
        false => Ok(()),
    };
    let any = |map: Option<usize>| map.is_some_and(|count| count > 0);
    some(any(linux.uid_mappings().as_ref().map(Vec::len)), "uidMappings")?;
    some(any(linux.gid_mappings().as_ref().map(Vec::len)), "gidMappings")?;
    some(any(linux.net_devices().as_ref().map(HashMap::len)), "netDevices")?;
    some(any(linux.time_offsets().as_ref().map(HashMap::len)), "timeOffsets")?;
    some(linux.intel_rdt().is_some(), "intelRdt")?;
    some(linux.memory_policy().is_some(), "memoryPolicy")
}

/// Only what belongs to a namespace that the container has, or to the pod's network.
fn sysctls(
    sysctls: Option<&HashMap<String, String>>,
    namespaces: &Namespaces,
) -> Result<Vec<(String, String)>, Error> {
    let mut checked = Vec::new();
    for (name, value) in sysctls.into_iter().flatten() {
        let path = name.replace('.', "/");
        if path.split('/').any(|part| part.is_empty() || part == "..") {
            return invalid(format!("sysctl {name:?} is no name of a sysctl"));
        }
        let ipc = path.starts_with("fs/mqueue/")
            || path.starts_with("kernel/msg")
            || path.starts_with("kernel/shm")
            || path == "kernel/sem";
        let allowed = path.starts_with("net/")
            || (ipc && namespaces.own_ipc)
            || (path == "kernel/domainname" && namespaces.own_uts);
        if !allowed {
            return unsupported(format!(
                "sysctl {name:?} does not belong to a namespace of this container; set it for the \
                 pod (securityContext.sysctls)"
            ));
        }
        checked.push((path, value.clone()));
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<Plan, Error> {
        Plan::new(serde_json::from_str(json).unwrap())
    }

    fn refusal(linux: &str, rest: &str) -> String {
        let process = r#"{"user":{"uid":0,"gid":0},"args":["x"],"cwd":"/"}"#;
        let json = format!(r#"{{"process":{process},"linux":{{{linux}}}{rest}}}"#);
        plan(&json).map(|plan| format!("{plan:?}")).unwrap_err().to_string()
    }

    #[test]
    fn refusals_name_what_they_refuse() {
        let pid = r#""namespaces":[{"type":"pid"}]"#;
        let hook = r#","hooks":{"poststart":[{"path":"/bin/x"}]}"#;
        assert!(refusal(pid, hook).contains("poststart hook \"/bin/x\""));
        assert!(refusal("", "").contains("host PID namespace"));
        let user = r#""namespaces":[{"type":"pid"},{"type":"user"}]"#;
        assert!(refusal(user, "").contains("user namespaces"));
        let sysctl = format!(r#"{pid},"sysctl":{{"kernel.shmmax":"1"}}"#);
        assert!(refusal(&sysctl, "").contains("kernel.shmmax"));
        let rdt = format!(r#"{pid},"intelRdt":{{}}"#);
        assert!(refusal(&rdt, "").contains("intelRdt"));
        assert!(plan("{}").is_err());
    }

    #[test]
    fn namespaces_by_path_are_the_pods() {
        let plan = plan(
            r#"{"process":{"user":{"uid":0,"gid":0},"args":["x"],"cwd":"/"},"linux":{
            "sysctl":{"kernel.shmmax":"1","net.core.somaxconn":"9"},
            "namespaces":[{"type":"pid","path":"/proc/1/ns/pid"},{"type":"ipc"},
            {"type":"uts","path":"/x"},{"type":"network"}]}}"#,
        )
        .unwrap();
        assert_eq!((plan.pid, plan.own_ipc, plan.own_uts), (PidNamespace::Pod, true, false));
        assert_eq!(plan.sysctls.len(), 2);
    }
}
