//! Names that cross the boundary, checked once: containerd's rules for identifiers.
//!
//! A checked name is letters, digits, and `.`, `_`, `-` singly between them, at most 76 bytes. So it
//! is a safe path component: never empty, never `.` or `..`, no slash.

use std::fmt;
use std::str::FromStr;

/// The one container that a guest runs before `StartSandbox`, and that must be deleted by then: the
/// host's own program, by which a waiting machine comes to know the way of a container's start.
pub const REHEARSAL: &str = "rehearsal";

/// What is shared with the guest has this name in the root of the share's mount.
pub const SHARED: &str = "shared";

/// Among the answers of a share: not one, but the request to forget files that are not in use, of each of
/// which the server has one open. In the form of an answer (`struct fuse_out_header`): its length, and zeros.
pub const FORGET: [u8; 16] = [16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// containerd's bound.
pub const MAX_ID: usize = 76;
/// How much of a refused name an error shows.
const SHOWN: usize = 100;

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The empty string.
    #[error("the {kind} is empty")]
    Empty {
        /// Which name.
        kind: &'static str,
    },
    /// More than [`MAX_ID`] bytes.
    #[error("the {kind} {value:?}… has {length} bytes, at most {MAX_ID} are allowed")]
    TooLong {
        /// Which name.
        kind: &'static str,
        /// How it begins.
        value: String,
        /// Its length.
        length: usize,
    },
    /// A character that is not allowed, or not there.
    #[error(
        "the {kind} {value:?} is not a valid name: letters and digits, with single '.', '_' or '-' \
         between them"
    )]
    Invalid {
        /// Which name.
        kind: &'static str,
        /// The name.
        value: String,
    },
}

fn check(kind: &'static str, value: &str) -> Result<(), IdError> {
    if value.is_empty() {
        return Err(IdError::Empty { kind });
    }
    if value.len() > MAX_ID {
        let shown = value.chars().take(SHOWN).collect();
        return Err(IdError::TooLong { kind, value: shown, length: value.len() });
    }
    let alphanumeric = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let bytes = value.as_bytes();
    let fits = |(index, byte): (usize, &u8)| match byte {
        // A separator must stand between two letters or digits.
        b'.' | b'_' | b'-' => {
            index > 0
                && alphanumeric(bytes.get(index - 1).copied())
                && alphanumeric(bytes.get(index + 1).copied())
        }
        byte => byte.is_ascii_alphanumeric(),
    };
    if bytes.iter().enumerate().all(fits) {
        Ok(())
    } else {
        Err(IdError::Invalid { kind, value: value.to_owned() })
    }
}

macro_rules! id {
    ($name:ident, $kind:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks a name.
            pub fn new(value: &str) -> Result<Self, IdError> {
                check($kind, value)?;
                Ok(Self(value.into()))
            }

            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(value: &str) -> Result<Self, IdError> {
                Self::new(value)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

id!(SandboxId, "sandbox id", "Name of a sandbox: containerd's id of the pod.");
id!(ContainerId, "container id", "Name of a container in a sandbox.");
id!(ExecId, "exec id", "Name of a further process of a container.");
id!(VolumeId, "volume id", "Name of a volume in the guest.");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_containerd_takes() {
        for name in ["a", "0", "a-b", "a.b_c-d", "x".repeat(MAX_ID).as_str()] {
            assert_eq!(ContainerId::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_the_rest_and_names_it() {
        for name in [".", "..", "a/b", "../a", "-a", "a-", "a--b", "a b", "ä", "a\0", "a\n", "_"] {
            let error = ContainerId::new(name).unwrap_err();
            assert!(error.to_string().contains(&format!("container id {name:?}")), "{error}");
        }
        assert_eq!(ExecId::new("").unwrap_err().to_string(), "the exec id is empty");
        let error = SandboxId::new(&"x".repeat(MAX_ID + 1)).unwrap_err().to_string();
        assert!(error.contains("77 bytes"), "{error}");
    }
}
