//! What was applied last, on disk: the documents, the identity table and the services, a file each in
//! `<state_dir>/network`.
//!
//! A file is written beside, synced, and renamed: after a power cut it is the old one or the new one. Its epoch
//! says with which step it was applied; it is in force once the maps have that epoch.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::document::Documents;
use super::entry::{Entry, Namespace};
use super::error::PolicyError;
use crate::mesh::Namespaces;
use crate::services::document::Service;

/// Name of the documents' file.
pub(crate) const POLICY: &str = "policy.json";
/// Name of the services' file.
pub(crate) const SERVICES: &str = "services.json";

/// Format of the files. One of another format is refused, not guessed at.
const VERSION: u32 = 1;

/// A file's contents with what is said of them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Applied<T> {
    pub(crate) version: u32,
    /// With which epoch.
    pub epoch: u32,
    /// When, in seconds since 1970.
    pub at: u64,
    /// What.
    pub content: T,
}

/// The identity table.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Who has which address.
    pub entries: Vec<Entry>,
    /// The namespaces' labels.
    pub namespaces: Vec<Namespace>,
}

/// Where the state is.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

impl<T> Applied<T> {
    /// The same as applied with this epoch: now, or `again` what was before.
    pub(crate) fn stamped(self, epoch: u32, again: bool) -> Self {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let at = if again { self.at } else { now() };
        Self { version: VERSION, epoch, at, content: self.content }
    }
}

impl Store {
    /// The one below `state_dir`.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { directory: state_dir.join("network") }
    }

    /// The documents; none if none were applied.
    pub fn policy(&self) -> Result<Applied<Documents>, PolicyError> {
        self.read(POLICY)
    }

    /// The identities; none if none were applied.
    pub fn identities(&self) -> Result<Applied<Table>, PolicyError> {
        self.read("identities.json")
    }

    /// How the pods of namespaces are in a mesh: that part of the policy, in a file that is small enough for each
    /// pod's start.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn mesh(&self) -> Result<Namespaces, PolicyError> {
        self.read("mesh.json").map(|applied| applied.content)
    }

    pub(super) fn write_mesh(&self, mesh: &Applied<Namespaces>) -> Result<(), PolicyError> {
        self.write("mesh.json", mesh)
    }

    /// The services; none if none were applied.
    pub fn services(&self) -> Result<Applied<Vec<Service>>, PolicyError> {
        self.read(SERVICES)
    }

    /// Where a file of the state is, to see whether it has changed.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn write_policy(&self, policy: &Applied<Documents>) -> Result<(), PolicyError> {
        self.write(POLICY, policy)
    }

    pub(super) fn write_identities(&self, table: &Applied<Table>) -> Result<(), PolicyError> {
        self.write("identities.json", table)
    }

    pub(crate) fn write_services(
        &self,
        services: &Applied<Vec<&Service>>,
    ) -> Result<(), PolicyError> {
        self.write(SERVICES, services)
    }

    fn fail(&self, step: &'static str, name: &str) -> impl FnOnce(io::Error) -> PolicyError {
        let path = self.directory.join(name);
        move |cause| PolicyError::State { step, path, cause }
    }

    fn read<T: DeserializeOwned + Default>(&self, name: &str) -> Result<Applied<T>, PolicyError> {
        /// Read first, so that another format is told as such.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let bytes = match fs::read(self.directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Applied::default()),
            other => other.map_err(self.fail("read", name))?,
        };
        let invalid = |error: serde_json::Error| {
            let error = io::Error::new(io::ErrorKind::InvalidData, error);
            self.fail("read (applying all of it anew replaces it)", name)(error)
        };
        let Version { version } = serde_json::from_slice(&bytes).map_err(invalid)?;
        if version != VERSION {
            let words = format!("is of format {version}, this is for {VERSION}; apply it anew");
            return Err(self.fail("read", name)(io::Error::other(words)));
        }
        serde_json::from_slice(&bytes).map_err(invalid)
    }

    fn write<T: Serialize>(&self, name: &str, content: &T) -> Result<(), PolicyError> {
        let write = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
            // Who writes has the lock; what another left unfinished is overwritten.
            let beside = self.directory.join(format!("{name}.new"));
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = io::BufWriter::new(options.open(&beside)?);
            serde_json::to_writer(&mut file, content)?;
            file.flush()?;
            file.get_ref().sync_all()?;
            fs::rename(&beside, self.directory.join(name))?;
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(self.fail("write", name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert_eq!(store.policy().unwrap().epoch, 0);
        let mut documents = Documents::default();
        documents.read("x", "{kind: Namespace, apiVersion: v1, metadata: {name: a}}").unwrap();
        let applied = Applied { content: documents.clone(), ..Applied::default() };
        store.write_policy(&applied.stamped(7, false)).unwrap();
        let read = store.policy().unwrap();
        assert_eq!((read.epoch, read.content), (7, documents));
        let file = dir.path().join("network/policy.json");
        for (text, words) in [
            (r#"{"version":2,"epoch":1}"#, "format 2"),
            (r#"{"version":1,"epoch":1,"at":0,"content":[],"more":1}"#, "more"),
            (r#"{"version":1,"ep"#, "applying all of it anew"),
            ("", "applying all of it anew"),
        ] {
            fs::write(&file, text).unwrap();
            let error = store.policy().unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("policy.json"), "{error}");
        }
    }
}
