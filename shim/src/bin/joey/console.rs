//! `joey console`: what a guest has printed, made harmless for the operator's terminal.
//!
//! The shim keeps the console in two files, the older half in `console.log.1` once the newer one is full.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use joey_shim::config::Config;
use joey_shim::sandbox::record::directory;
use serde_json::json;

use super::sandboxes::find;

/// How often a console is looked at that is followed.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) fn show(config: &Config, id: &str, follow: bool, json: bool) -> Result<()> {
    ensure!(!(follow && json), "--json tells of what is there now: it does not go with --follow");
    let record = find(config, id)?;
    let directory = directory(&config.run_dir, &record.id);
    let path = directory.join("console.log");
    let (text, mut file) = read(&path)?;
    if json {
        let text = String::from_utf8_lossy(&text);
        println!("{}", json!({"sandbox": record.id, "console": text}));
        return Ok(());
    }
    let mut out = io::stdout().lock();
    let mut shown = Shown::default();
    out.write_all(shown.add(&text).as_bytes())?;
    while follow && directory.exists() {
        out.flush()?;
        std::thread::sleep(LOOK);
        let text = more(&path, &mut file)?;
        out.write_all(shown.add(&text).as_bytes())?;
    }
    out.write_all(shown.end().as_bytes())?;
    Ok(out.flush()?)
}

/// What tells a file from another one of the same name.
fn number(file: &File) -> Option<u64> {
    file.metadata().map(|meta| meta.ino()).ok()
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Everything that is there, and the file in which more will come.
fn read(path: &Path) -> Result<(Vec<u8>, Option<File>)> {
    let mut text = Vec::new();
    // The newer one first: what is in it then cannot become the older one unseen.
    let mut file = File::open(path).ok();
    let older = File::open(older(path)).ok();
    ensure!(
        file.is_some() || older.is_some(),
        "the guest has printed nothing yet ({})",
        path.display()
    );
    if let Some(mut older) = older
        // Moved between the two openings.
        && number(&older) != file.as_ref().and_then(number)
    {
        older.read_to_end(&mut text).context("read the older half of the console")?;
    }
    if let Some(file) = &mut file {
        file.read_to_end(&mut text).context("read the console")?;
    }
    Ok((text, file))
}

/// What has come since; goes on in the new file when the console was started anew.
fn more(path: &Path, file: &mut Option<File>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    if let Some(file) = file {
        file.read_to_end(&mut text)?;
    }
    let now = std::fs::metadata(path).map(|meta| meta.ino()).ok();
    if now.is_some() && now != file.as_ref().and_then(number) {
        // The last of the old one was written before it was moved.
        if let Some(file) = file {
            file.read_to_end(&mut text)?;
        }
        *file = File::open(path).ok();
        if let Some(file) = file {
            file.read_to_end(&mut text)?;
        }
    }
    Ok(text)
}

/// Turns what a guest prints into what a terminal only shows: line ends and tabs stay, any other control
/// character, and those that change the direction of writing, are spelled out.
#[derive(Default)]
struct Shown {
    /// The beginning of something that may become a character, or a line's end.
    rest: Vec<u8>,
}

impl Shown {
    fn add(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let whole = self.rest.len() - unfinished(&self.rest);
        let rest = self.rest.split_off(whole);
        let whole = std::mem::replace(&mut self.rest, rest);
        escape(&String::from_utf8_lossy(&whole))
    }

    fn end(self) -> String {
        escape(&String::from_utf8_lossy(&self.rest))
    }
}

/// How many bytes at the end only more can make sense of.
fn unfinished(bytes: &[u8]) -> usize {
    if bytes.ends_with(b"\r") {
        return 1;
    }
    (1..=bytes.len().min(3))
        .find(|count| {
            let last = bytes.get(bytes.len() - count..).unwrap_or_default();
            matches!(std::str::from_utf8(last), Err(error)
                if error.error_len().is_none() && error.valid_up_to() == 0)
        })
        .unwrap_or(0)
}

pub(crate) fn escape(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    // A serial console ends its lines with both.
    for character in text.replace("\r\n", "\n").chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                shown.extend(character.escape_unicode());
            }
            character if character.is_control() => shown.extend(character.escape_default()),
            character => shown.push(character),
        }
    }
    shown
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_reach_the_terminal() {
        assert_eq!(escape("a\tb\r\nc\n"), "a\tb\nc\n");
        assert_eq!(escape("\x1b[2J\x07\r\u{9b}é"), "\\u{1b}[2J\\u{7}\\r\\u{9b}é");
        assert_eq!(escape("\u{202e}x"), "\\u{202e}x");
        let mut shown = Shown::default();
        let pieces = ["é\r".as_bytes(), b"\n\xc3", b"\xa9\xe2\x82", b"\xac\r"];
        let text: String = pieces.into_iter().map(|piece| shown.add(piece)).collect();
        assert_eq!(text + &shown.end(), "é\né€\\r");
        let mut shown = Shown::default();
        assert_eq!(shown.add(b"\xff\xfe."), "\u{fffd}\u{fffd}.");
    }

    #[test]
    fn both_halves_are_shown_and_a_new_one_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert!(read(&path).is_err());
        std::fs::write(older(&path), "one ").unwrap();
        std::fs::write(&path, "two ").unwrap();
        let (text, mut file) = read(&path).unwrap();
        assert_eq!(text, b"one two ");
        let mut writer = File::options().append(true).open(&path).unwrap();
        writer.write_all(b"three ").unwrap();
        std::fs::rename(&path, older(&path)).unwrap();
        std::fs::write(&path, "four").unwrap();
        assert_eq!(more(&path, &mut file).unwrap(), b"three four");
        assert_eq!(more(&path, &mut file).unwrap(), b"");
    }
}
