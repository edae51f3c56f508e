//! OCI images made on the spot from files of Debian packages, as archives for `ctr images import`.

use std::fs;
use std::io::{Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The image most tests run: busybox with users, two layers.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// A web server from Debian's packages: nginx, its libraries and a page.
pub const NGINX: &str = "localhost/nginx:1";

/// A proxy of Debian's packages: sslsplit.
pub const SSLSPLIT: &str = "localhost/sslsplit:1";

/// A large image of real files: Debian's python3 and openjdk.
pub const DEBIAN: &str = "localhost/debian:1";

/// One layer: a tar, possibly to be compressed.
pub struct Layer(tar::Builder<Vec<u8>>, bool);

impl Default for Layer {
    fn default() -> Self {
        Self(tar::Builder::new(Vec::new()), false)
    }
}

impl Layer {
    /// A regular file.
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Result<Self> {
        let mut header = header(tar::EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content)?;
        Ok(self)
    }

    /// A directory.
    pub fn directory(mut self, path: &str, mode: u32) -> Result<Self> {
        let mut header = header(tar::EntryType::Directory, mode);
        self.0.append_data(&mut header, path, &[][..])?;
        Ok(self)
    }

    /// A symbolic link.
    pub fn link(mut self, path: &str, target: &str) -> Result<Self> {
        self.0.append_link(&mut header(tar::EntryType::Symlink, 0o777), path, target)?;
        Ok(self)
    }

    /// Compresses the layer with gzip.
    pub fn gzip(mut self) -> Self {
        self.1 = true;
        self
    }

    /// An entry with a name that a careful writer would refuse.
    pub fn raw(mut self, path: &str, content: &[u8]) -> Result<Self> {
        let mut header = header(tar::EntryType::Regular, 0o644);
        header.set_size(content.len() as u64);
        let name = header.as_old_mut().name.get_mut(..path.len()).context("name too long")?;
        name.copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.0.append(&header, content)?;
        Ok(self)
    }

    /// Another name of a file, whose mode it repeats: containerd gives the file this one.
    pub fn hard_link(mut self, path: &str, target: &str, mode: u32) -> Result<Self> {
        self.0.append_link(&mut header(tar::EntryType::Link, mode), path, target)?;
        Ok(self)
    }

    /// Everything below a folder of this machine.
    pub fn tree(mut self, folder: &Path) -> Result<Self> {
        self.0.follow_symlinks(false);
        self.0.append_dir_all("", folder).with_context(|| format!("pack {}", folder.display()))?;
        Ok(self)
    }
}

fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    header
}

/// What an image's configuration says about its process.
#[derive(Default)]
pub struct Settings<'a> {
    /// Default command.
    pub command: &'a [&'a str],
    /// Variables, `KEY=value`.
    pub environment: &'a [&'a str],
    /// User by name or number; empty: root.
    pub user: &'a str,
    /// Directories that are volumes (`VOLUME`).
    pub volumes: &'a [&'a str],
}

/// Writes an OCI archive of one image.
pub fn write(path: &Path, name: &str, layers: Vec<Layer>, settings: &Settings<'_>) -> Result<()> {
    let mut archive = tar::Builder::new(fs::File::create(path)?);
    let mut blob = |bytes: &[u8]| -> Result<(String, usize)> {
        let digest = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
        let mut header = header(tar::EntryType::Regular, 0o644);
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, format!("blobs/sha256/{digest}"), bytes)?;
        Ok((format!("sha256:{digest}"), bytes.len()))
    };
    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    for layer in layers {
        let tar = layer.0.into_inner()?;
        let hash = Sha256::digest(&tar).iter().map(|b| format!("{b:02x}")).collect::<String>();
        diff_ids.push(format!("sha256:{hash}"));
        let (media, tar) = match layer.1 {
            true => ("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&tar)?),
            false => ("application/vnd.oci.image.layer.v1.tar", tar),
        };
        let (digest, size) = blob(&tar)?;
        descriptors.push(json!({ "mediaType": media, "digest": digest, "size": size }));
    }
    let volumes: serde_json::Map<_, _> =
        settings.volumes.iter().map(|path| ((*path).to_owned(), json!({}))).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Cmd": settings.command, "Env": settings.environment, "User": settings.user,
            "WorkingDir": "/", "Volumes": volumes,
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let (digest, size) = blob(config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": digest, "size": size },
        "layers": descriptors,
    });
    let (digest, size) = blob(manifest.to_string().as_bytes())?;
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest, "size": size,
            "platform": { "architecture": "amd64", "os": "linux" },
            "annotations": { "io.containerd.image.name": name,
                             "org.opencontainers.image.ref.name": name },
        }],
    });
    for (file, content) in
        [("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })), ("index.json", index)]
    {
        let content = content.to_string();
        let mut header = header(tar::EntryType::Regular, 0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, file, content.as_bytes())?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new("gzip");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("gzip has no input")?;
    let mut output = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(move || input.write_all(bytes));
        child.stdout.take().context("gzip has no output")?.read_to_end(&mut output)?;
        let written = writer.join();
        written.map_err(|_| anyhow!("gzip's writer panicked"))?.context("write to gzip")
    })?;
    if !child.wait()?.success() {
        bail!("gzip failed");
    }
    Ok(output)
}

/// Makes the archives every node imports, into `folder`; existing ones are made again.
pub fn standard(folder: &Path, pause: &str) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder)?;
    let busybox = busybox()?;
    let pause_path = folder.join("pause.tar");
    let layer = Layer::default().file("pause", 0o755, &busybox)?.link("sleep", "pause")?;
    let settings = Settings { command: &["/sleep", "2147483647"], ..Settings::default() };
    write(&pause_path, pause, vec![layer], &settings)?;

    let busybox_path = folder.join("busybox.tar");
    let settings = Settings {
        command: &["sh"],
        environment: &["PATH=/bin:/sbin:/usr/bin", "FROM_IMAGE=yes"],
        ..Settings::default()
    };
    write(&busybox_path, BUSYBOX, busybox_layers(&busybox)?, &settings)?;
    Ok(vec![pause_path, busybox_path])
}

fn busybox() -> Result<Vec<u8>> {
    fs::read("/bin/busybox").context("read /bin/busybox: run `cargo xtask deps`")
}

fn busybox_layers(busybox: &[u8]) -> Result<Vec<Layer>> {
    let output = Command::new("/bin/busybox").arg("--list").output()?;
    if !output.status.success() {
        bail!("busybox --list: {}", output.status);
    }
    let mut base = Layer::default()
        .directory("bin", 0o755)?
        .directory("etc", 0o755)?
        .directory("home", 0o755)?
        .directory("tmp", 0o1777)?
        .directory("proc", 0o755)?
        .directory("sys", 0o755)?
        .directory("dev", 0o755)?
        .file("bin/busybox", 0o755, busybox)?;
    for applet in String::from_utf8_lossy(&output.stdout).lines().filter(|a| *a != "busybox") {
        base = base.link(&format!("bin/{applet}"), "busybox")?;
    }
    let passwd = "root:x:0:0:root:/:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n";
    let group = "root:x:0:\napp:x:1000:\nextra:x:2000:app\n";
    let base = base
        .file("etc/passwd", 0o644, passwd.as_bytes())?
        .file("etc/group", 0o644, group.as_bytes())?
        .file("etc/replaced", 0o644, b"lower\n")?
        .file("etc/removed", 0o644, b"lower\n")?;
    let top = Layer::default()
        .directory("etc", 0o755)?
        .file("etc/replaced", 0o644, b"upper\n")?
        .file("etc/.wh.removed", 0o000, b"")?
        .directory("www", 0o755)?
        .file("www/index.html", 0o644, b"hello from the pod\n")?;
    Ok(vec![base, top])
}

/// Writes an archive of busybox with layers on top.
pub fn on_busybox(path: &Path, name: &str, layers: Vec<Layer>, volumes: &[&str]) -> Result<()> {
    let mut all = busybox_layers(&busybox()?)?;
    all.extend(layers);
    let settings =
        Settings { environment: &["PATH=/bin"], command: &["sh"], volumes, ..Settings::default() };
    write(path, name, all, &settings)
}

/// Packs Debian's nginx with the files of the packages it needs.
pub fn nginx(folder: &Path) -> Result<PathBuf> {
    let tree = debian_tree(&folder.join("nginx-tree"), &["nginx-light"])?;
    let configuration = "daemon off; error_log /dev/stderr; pid /tmp/nginx.pid;\n\
        events {}\nhttp { access_log /dev/stdout; server { listen 80; listen [::]:80; root /www; } }\n";
    let settings_layer = Layer::default()
        .directory("etc", 0o755)?
        .file("usr/bin/busybox", 0o755, &busybox()?)?
        .file("etc/joey-nginx.conf", 0o644, configuration.as_bytes())?
        .file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        )?
        .file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?
        .directory("tmp", 0o1777)?
        .directory("www", 0o755)?
        .file("www/index.html", 0o644, b"<h1>hello from nginx in its own VM</h1>\n")?;
    let layers = vec![Layer::default().tree(&tree)?, settings_layer];
    let settings = Settings {
        command: &["/usr/sbin/nginx", "-c", "/etc/joey-nginx.conf"],
        environment: &["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        ..Settings::default()
    };
    let path = folder.join("nginx.tar");
    write(&path, NGINX, layers, &settings)?;
    Ok(path)
}

/// Packs Debian's sslsplit, a proxy that asks where a redirected connection was to go, with busybox. Kept for the
/// next time.
pub fn sslsplit(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("sslsplit.tar");
    if !path.exists() {
        let tree = debian_tree(&folder.join("sslsplit-tree"), &["sslsplit", "libsystemd0"])?;
        let busybox = busybox()?;
        let shell = Layer::default().file("usr/bin/busybox", 0o755, &busybox)?;
        let shell = shell.directory("bin", 0o755)?.file("bin/sh", 0o755, &busybox)?;
        let settings = Settings {
            command: &["/usr/bin/sslsplit"],
            environment: &["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            ..Settings::default()
        };
        let beside = folder.join("sslsplit.new");
        write(&beside, SSLSPLIT, vec![Layer::default().tree(&tree)?, shell], &settings)?;
        fs::rename(beside, &path)?;
    }
    Ok(path)
}

/// Packs Debian's python3 and openjdk as two compressed layers on busybox, kept for the next time.
pub fn debian(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("debian.tar");
    if !path.exists() {
        let layer = |name: &str, packages: &[&str]| {
            let tree = debian_tree(&folder.join(name), packages)?;
            Ok::<_, anyhow::Error>(Layer::default().tree(&tree)?.gzip())
        };
        let layers = vec![
            layer("python3-tree", &["python3"])?,
            layer("openjdk-tree", &["openjdk-17-jre-headless"])?,
        ];
        let beside = folder.join("debian.new");
        on_busybox(&beside, DEBIAN, layers, &[])?;
        fs::rename(beside, &path)?;
    }
    Ok(path)
}

/// Unpacks packages and what they depend on into one folder, kept for the next time.
fn debian_tree(folder: &Path, packages: &[&str]) -> Result<PathBuf> {
    let done = folder.join(".complete");
    let root = folder.join("root");
    if done.exists() {
        return Ok(root);
    }
    let debs = folder.join("debs");
    fs::create_dir_all(&debs)?;
    fs::create_dir_all(&root)?;
    let list = Command::new("apt-cache")
        .args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts"])
        .args(["--no-breaks", "--no-replaces", "--no-enhances", "--no-pre-depends"])
        .args(packages)
        .output()?;
    // Lines that start a package have no indent; virtual packages are in angle brackets.
    let skipped =
        ["debconf", "perl", "init", "systemd", "dpkg", "libsystemd", "python", "cdebconf"];
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    let names = text.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_alphanumeric()));
    let wanted = |name: &str| {
        // What was asked for is never left out.
        let asked = |skip: &&&str| !packages.iter().any(|package| package.starts_with(**skip));
        !skipped.iter().filter(asked).any(|skip| name.starts_with(skip))
    };
    let names = names.filter(|name| !name.contains(':') && wanted(name));
    run(Command::new("apt-get").args(["-qq", "download"]).args(names).current_dir(&debs))?;
    for deb in fs::read_dir(&debs)? {
        run(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&root))?;
    }
    for unneeded in ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"] {
        let _ = fs::remove_dir_all(root.join(unneeded));
    }
    fs::write(done, "")?;
    Ok(root)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
