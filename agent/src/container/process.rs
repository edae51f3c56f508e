//! What makes a process the one that the specification describes, from its limits to `execve`.
//!
//! Order, and why: limits and the bounding set first, while there is privilege; then user and
//! groups, keeping the permitted set; then everything that only looks (working directory, command),
//! with the rights that the command will have; then "ready". After "go" come only the filter and
//! the final capabilities: without no_new_privileges a filter may only be loaded with
//! CAP_SYS_ADMIN, so it is loaded before the last capabilities go; with it, after them.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fstat, major, stat, umask};
use nix::unistd::{AccessFlags, Uid, chdir, faccessat, fchown, getcwd};
use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process};

use super::capability::Sets;
use super::paths;
use super::seccomp::Filter;
use super::{Error, Kind, sys};

/// `/etc/passwd` is read no further than this.
const PASSWD_MAX: u64 = 1 << 20;

/// Everything of a process but its last step.
pub(crate) struct Prepared {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    capabilities: Sets,
    filter: Option<Filter>,
    no_new_privileges: bool,
}

fn failed(what: &str, error: impl std::fmt::Display) -> Error {
    Error::failed(format!("{what}: {error}"))
}

/// Turns this process into the described one, up to its last step. Runs in the container's root.
pub(crate) fn prepare(
    process: &Process,
    root: BorrowedFd<'_>,
    filter: Option<Filter>,
) -> Result<Prepared, Error> {
    for limit in process.rlimits().iter().flatten() {
        set_limit(limit)?;
    }
    give_stdio(process.user().uid());
    let early_directory = enter_directory(root, process.cwd());
    let environment = environment(process, root)?;
    let capabilities = Sets::new(process.capabilities().as_ref());
    change_user(process, &capabilities)?;
    if early_directory.is_err() {
        // A directory that only the user may enter (NFS and FUSE shut root out).
        chdir(process.cwd())
            .map_err(|error| failed(&format!("chdir to cwd ({:?})", process.cwd()), error))?;
    }
    stay_inside()?;
    umask(Mode::from_bits_truncate(process.user().umask().unwrap_or(0o022)));
    let arguments = strings(process.args().iter().flatten(), "an argument")?;
    let program = find_program(process)?;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    Ok(Prepared { program, arguments, environment, capabilities, filter, no_new_privileges })
}

impl Prepared {
    /// The last step. Returns only the reason why there is no new program.
    pub(crate) fn exec(self) -> Result<Infallible, Error> {
        if self.no_new_privileges {
            sys::process_control(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
                .map_err(|error| failed("setting no_new_privileges", error))?;
        } else if let Some(filter) = &self.filter {
            filter.load()?;
        }
        self.capabilities
            .after_user()
            .map_err(|error| failed("setting the capabilities", error))?;
        if let (true, Some(filter)) = (self.no_new_privileges, &self.filter) {
            filter.load()?;
        }
        let error = sys::exec(&self.program, &self.arguments, &self.environment);
        let text = match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::ENOEXEC => "exec format error".to_string(),
            Errno::E2BIG => "argument list too long".to_string(),
            Errno::EACCES => "permission denied".to_string(),
            Errno::ENOENT => "no such file or directory".to_string(),
            other => other.desc().to_string(),
        };
        Err(Error::failed(format!("exec {}: {text}", self.program.to_string_lossy())))
    }
}

fn limit_number(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

fn set_limit(limit: &PosixRlimit) -> Result<(), Error> {
    sys::set_limit(limit_number(limit.typ()), limit.soft(), limit.hard()).map_err(|error| {
        let (soft, hard) = (limit.soft(), limit.hard());
        failed(&format!("setting {} to {soft}:{hard}", limit.typ()), error)
    })
}

/// So that a process that is not root can open /dev/stdout again.
fn give_stdio(uid: u32) {
    for fd in [0, 1, 2].map(sys::standard) {
        let ours = fstat(fd).is_ok_and(|data| {
            let memory_device =
                data.st_mode & libc::S_IFMT == libc::S_IFCHR && major(data.st_rdev) == 1;
            data.st_uid == uid || memory_device
        });
        if !ours {
            // A descriptor whose owner cannot change works all the same, only not by its path.
            let _ = fchown(fd, Some(Uid::from_raw(uid)), None);
        }
    }
}

/// Makes the working directory where it is missing, and goes there.
fn enter_directory(root: BorrowedFd<'_>, cwd: &Path) -> Result<(), Error> {
    let enter = || -> io::Result<()> {
        match chdir(cwd) {
            Err(Errno::ENOENT) => {}
            result => return Ok(result?),
        }
        let relative = cwd.strip_prefix("/").unwrap_or(cwd);
        paths::create_directories(root, relative, Mode::from_bits_truncate(0o755))?;
        Ok(chdir(cwd)?)
    };
    enter().map_err(|error| failed(&format!("chdir to cwd ({cwd:?})"), error))
}

/// A working directory reached through a descriptor of the outside would show here.
fn stay_inside() -> Result<(), Error> {
    match getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        Ok(path) => Err(failed("working directory", format!("{path:?} is outside the root"))),
        Err(error) => Err(failed("working directory", error)),
    }
}

fn change_user(process: &Process, capabilities: &Sets) -> Result<(), Error> {
    let user = process.user();
    capabilities
        .before_user()
        .map_err(|error| failed("cutting the bounding capabilities", error))?;
    let mut groups = user.additional_gids().clone().unwrap_or_default();
    groups.dedup();
    sys::set_groups(&groups).map_err(|error| failed("setting additional groups", error))?;
    sys::set_user(user.uid(), user.gid()).map_err(|error| {
        failed(&format!("changing to user {} and group {}", user.uid(), user.gid()), error)
    })?;
    capabilities.while_waiting().map_err(|error| failed("lowering the capabilities", error))
}

fn strings<'a>(all: impl Iterator<Item = &'a String>, what: &str) -> Result<Vec<CString>, Error> {
    all.map(|one| {
        CString::new(one.as_str())
            .map_err(|_| Error::new(Kind::Invalid, format!("{what} of the process contains NUL")))
    })
    .collect()
}

/// The environment, with HOME from the container's `/etc/passwd` where it is missing.
fn environment(process: &Process, root: BorrowedFd<'_>) -> Result<Vec<CString>, Error> {
    let given = process.env().as_deref().unwrap_or(&[]);
    let mut all = strings(given.iter().filter(|pair| *pair != "HOME="), "an environment variable")?;
    if !given.iter().any(|pair| pair.starts_with("HOME=") && pair != "HOME=") {
        let passwd = read_passwd(root).unwrap_or_default();
        let home = home(&passwd, process.user().uid()).unwrap_or("/");
        all.extend(CString::new(format!("HOME={home}")));
    }
    Ok(all)
}

fn read_passwd(root: BorrowedFd<'_>) -> io::Result<String> {
    use io::Read;
    let fd = paths::open_with(root, Path::new("etc/passwd"), libc::O_RDONLY | libc::O_NONBLOCK)?;
    let mut text = Vec::new();
    fs::File::from(fd).take(PASSWD_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn home(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = fields.nth(2)?;
        let home = fields.nth(2)?;
        (id.parse() == Ok(uid) && !home.is_empty()).then_some(home)
    })
}

/// Whether the process may run the file; runc's words when not.
fn runnable(path: &Path) -> Result<(), String> {
    let data = match stat(path) {
        Ok(data) => data,
        Err(Errno::ENOENT) => {
            return Err(format!("stat {}: no such file or directory", path.display()));
        }
        Err(error) => {
            let text = error.desc().to_lowercase();
            return Err(format!("stat {}: {text}", path.display()));
        }
    };
    let kind = SFlag::from_bits_truncate(data.st_mode & libc::S_IFMT);
    if kind == SFlag::S_IFDIR {
        return Err("is a directory".into());
    }
    let flags = AtFlags::AT_EACCESS;
    match faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, flags) {
        Ok(()) if data.st_mode & 0o111 != 0 => Ok(()),
        _ => Err("permission denied".into()),
    }
}

/// Where the command is, by the PATH of its own environment.
fn find_program(process: &Process) -> Result<CString, Error> {
    let command = process.args().iter().flatten().next().map_or("", String::as_str);
    let not_found = |why: &str| {
        Error::failed(format!("unable to start container process: exec: {command:?}: {why}"))
    };
    let c_string = |path: &Path| {
        CString::new(path.as_os_str().as_bytes()).map_err(|_| not_found("it contains NUL"))
    };
    if command.contains('/') {
        runnable(Path::new(command)).map_err(|why| not_found(&why))?;
        return c_string(Path::new(command));
    }
    let path = process.env().iter().flatten().rev().find_map(|pair| pair.strip_prefix("PATH="));
    let directories = path.unwrap_or("").split(':').filter(|directory| directory.starts_with('/'));
    if !command.is_empty() {
        for directory in directories {
            let candidate = Path::new(directory).join(command);
            if runnable(&candidate).is_ok() {
                return c_string(&candidate);
            }
        }
    }
    Err(not_found("executable file not found in $PATH"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_looked_up_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1000::/srv/app:/bin/sh\n";
        assert_eq!(home(passwd, 0), Some("/root"));
        assert_eq!(home(passwd, 1000), Some("/srv/app"));
        assert_eq!(home(passwd, 7), None);
    }

    #[test]
    fn commands_are_judged_in_runcs_words() {
        assert!(runnable(Path::new("/bin/sh")).is_ok());
        let missing = runnable(Path::new("/no/such")).unwrap_err();
        assert_eq!(missing, "stat /no/such: no such file or directory");
        assert_eq!(runnable(Path::new("/etc")).unwrap_err(), "is a directory");
        assert_eq!(runnable(Path::new("/etc/passwd")).unwrap_err(), "permission denied");
    }
}
