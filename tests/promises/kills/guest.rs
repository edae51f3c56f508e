//! The container's own process, killed inside the guest.

use anyhow::Result;
use joey_tests::pod::{self, Pod, SOON};
use k8s_cri::v1::{ContainerConfig, NamespaceMode, NamespaceOption};

use super::{interrupt, standby};
use crate::context::{Context, refused, same};

/// Lets a container see the processes of the whole pod.
fn shared(mut config: ContainerConfig) -> ContainerConfig {
    let options = pod::security(&mut config).namespace_options.get_or_insert_default();
    options.pid = NamespaceMode::Pod.into();
    config
}

/// A neighbour in the pod kills the process that has just been created, or started; the shim still waits
/// for the agent's answer, or has yet to note it.
pub(super) fn process_in_the_guest(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    standby(ctx, 0, || {
        let mut config = pod::config(ctx.node, "inside");
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        let options: &mut NamespaceOption = security.namespace_options.get_or_insert_default();
        options.pid = NamespaceMode::Pod.into();
        let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
        let neighbour = pod.start(&shared(pod::script("neighbour", "sleep 1000")))?;
        let pids = || Ok::<_, anyhow::Error>(neighbour.sh("cd /proc; echo [0-9]*")?.text());
        for point in ["create.made", "start.done", "exec-start.done"] {
            let is_exec = point.starts_with("exec");
            let victim = pod.create(&shared(pod::script("victim", "sleep 2000")))?;
            if is_exec {
                ctx.node.cri.start(&victim.id)?;
            }
            let known = pids()?;
            // Whatever came since, but for those that look for it.
            let kill = format!(
                "known=' {known} '; for p in $(cd /proc; echo [0-9]*); do \
                 case \"$known\" in *\" $p \"*) ;; *) [ $p = $$ ] || kill -9 $p 2>/dev/null;; esac; done; true"
            );
            let told = interrupt(
                ctx,
                point,
                || match is_exec {
                    true => victim.sh("sleep 3000").map(|output| output.code),
                    false => ctx.node.cri.start(&victim.id).map(|()| 0),
                },
                |_| neighbour.sh(&kill).map(drop),
            )?;
            if is_exec {
                same("the exec's exit code", told?, 137)?;
                same("the container lives on", victim.sh("echo ok")?.text(), "ok")?;
            } else {
                let created = point == "create.made";
                match created {
                    true => {
                        refused("StartContainer", told, "cannot start a process that is stopped")?
                    }
                    false => same("StartContainer", told?, 0)?,
                }
                // CRI's code for what could not be started, and SIGKILL's.
                let expected = if created { 128 } else { 137 };
                same("exit code", victim.wait(SOON)?.exit_code, expected)?;
            }
            victim.remove(std::time::Duration::ZERO)?;
            same("the neighbour lives on", neighbour.sh("echo ok")?.text(), "ok")?;
        }
        pod.remove()
    })
}
