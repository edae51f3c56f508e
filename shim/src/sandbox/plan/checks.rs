//! What no VM pod can have, whatever it is mounted from.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{Facts, Refusal, refuse};

/// Annotations that ask for devices of the Container Device Interface.
const CDI: &str = "cdi.k8s.io/";

/// Devices of the Container Device Interface are the host's. containerd turns such a request into devices,
/// mounts and hooks, each of which is looked at for itself; what it has left to the runtime is seen here.
pub(super) fn annotations(spec: &Spec) -> Result<(), Refusal> {
    let mut all = spec.annotations().iter().flatten();
    match all.find(|(key, _)| key.starts_with(CDI)) {
        Some((key, devices)) => Err(refuse(
            "annotation",
            format!("{key}: {devices}"),
            "CDI devices are the host's, and not available in a virtual machine",
        )),
        None => Ok(()),
    }
}

/// Profiles of AppArmor are loaded on the host, and the guest has none. containerd's own, which every container gets
/// on a node that has AppArmor, keeps a container from its host: here the machine does.
pub(super) fn profiles(spec: &Spec) -> Result<(), Refusal> {
    const DEFAULTS: [&str; 3] = ["", "unconfined", "cri-containerd.apparmor.d"];
    let profile = spec.process().as_ref().and_then(|process| process.apparmor_profile().as_deref());
    match profile.filter(|profile| !DEFAULTS.contains(profile)) {
        Some(profile) => Err(refuse(
            "process.apparmorProfile",
            profile,
            "profiles of the host do not reach into a virtual machine; use RuntimeDefault or Unconfined, and \
             seccomp, which does",
        )),
        None => Ok(()),
    }
}

/// Hooks would run on the host.
pub(super) fn hooks(spec: &Spec) -> Result<(), Refusal> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let kinds = [
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (kind, hooks) in kinds {
        if let Some(hook) = hooks.iter().flatten().next() {
            return Err(refuse(
                "hooks",
                format!("{kind}: {}", hook.path().display()),
                "OCI hooks run on the host, where a VM pod has no processes",
            ));
        }
    }
    Ok(())
}

/// Namespaces of the host, and of another container.
pub(super) fn namespaces(spec: &Spec, facts: &Facts<'_>) -> Result<(), Refusal> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let missing = |typ| all.iter().all(|namespace| namespace.typ() != typ);
    if missing(LinuxNamespaceType::Pid) {
        return Err(refuse("hostPID", "true", "a VM pod cannot see the host's processes"));
    }
    if missing(LinuxNamespaceType::Network) {
        return Err(refuse(
            "hostNetwork",
            "true",
            "host network is not supported: the pod's network is its virtual machine's own",
        ));
    }
    if missing(LinuxNamespaceType::Ipc) {
        return Err(refuse(
            "hostIPC",
            "true",
            "host IPC is not supported: the pod's shared memory, semaphores and message queues are its \
             virtual machine's own",
        ));
    }
    let pod = format!("/proc/{}/ns/pid", facts.vmm_pid);
    let target = all.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
    if let Some(path) = target.and_then(|namespace| namespace.path().as_ref())
        && path != Path::new(&pod)
    {
        return Err(refuse(
            "process namespace",
            path.display(),
            "joining another container's processes (targetContainerName) is not supported; use \
             shareProcessNamespace",
        ));
    }
    Ok(())
}
