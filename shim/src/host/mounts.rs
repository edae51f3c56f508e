//! What is mounted where on the host (proc_pid_mountinfo(5)).

use std::fs;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    device: String,
    /// The path in its file system that is mounted.
    root: PathBuf,
    place: PathBuf,
}

fn table() -> Vec<Entry> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Entry> {
    let mut fields = line.split(' ').skip(2);
    let device = fields.next()?.to_owned();
    let [root, place] = [fields.next()?, fields.next()?].map(|field| unescape(field).into());
    Some(Entry { device, root, place })
}

/// Blanks, tabs, line ends and backslashes are three octal digits there.
fn unescape(field: &str) -> String {
    let codes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    codes.iter().fold(field.to_owned(), |text, (code, character)| text.replace(code, character))
}

/// Which path of its file system is mounted at a path, which may lead through links.
pub(crate) fn root_of(path: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    // The last one covers the others.
    table().into_iter().rfind(|entry| entry.place == path).map(|entry| entry.root)
}

/// From where the bind mount at a path was made: another place that shows the same, if there is one.
pub(crate) fn bound_from(path: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    let table = table();
    let bound = table.iter().rfind(|entry| entry.place == path)?;
    let other = |entry: &&Entry| entry.device == bound.device && entry.place != path;
    let shown = |entry: &Entry| {
        let inside = bound.root.strip_prefix(&entry.root).ok()?;
        Some(entry.place.join(inside)).filter(|path| path.exists())
    };
    table.iter().filter(other).find_map(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_unescaped() {
        let line = r"36 35 98:0 /a\040b /c\134d rw,noatime master:1 - ext4 /dev/root rw";
        let entry = Entry { device: "98:0".into(), root: "/a b".into(), place: r"/c\d".into() };
        assert_eq!(parse(line), Some(entry));
        assert_eq!(parse("36 35 98:0"), None);
        assert!(root_of(Path::new("/")).is_some());
        assert_eq!(bound_from(Path::new("/nowhere")), None);
    }

    #[test]
    fn a_link_on_the_way_hides_no_mount() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        assert_eq!(root_of(&link.join("proc")), root_of(Path::new("/proc")));
        assert!(root_of(&link.join("proc")).is_some());
    }
}
