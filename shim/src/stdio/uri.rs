//! containerd's names for stdio.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::StdioError;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    None,
    Fifo(PathBuf),
    File(PathBuf),
    Binary { program: PathBuf, args: Vec<OsString> },
}

impl Target {
    pub(super) fn into_path(self) -> PathBuf {
        match self {
            Self::None => PathBuf::new(),
            Self::Fifo(path) | Self::File(path) | Self::Binary { program: path, .. } => path,
        }
    }
}

pub(super) fn parse(name: &'static str, uri: &str) -> Result<Target, StdioError> {
    if uri.is_empty() {
        return Ok(Target::None);
    }
    let absolute = |path: PathBuf| {
        if path.is_absolute() {
            Ok(path)
        } else {
            Err(StdioError::Path { name, uri: uri.to_owned() })
        }
    };
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(Target::Fifo(absolute(uri.into())?));
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = absolute(decode(path, false).into())?;
    match scheme {
        "fifo" => Ok(Target::Fifo(path)),
        "file" => Ok(Target::File(path)),
        "binary" => Ok(Target::Binary { program: path, args: arguments(query) }),
        _ => Err(StdioError::Scheme { name, uri: uri.to_owned() }),
    }
}

/// `a=1&b` becomes `a 1 b`; containerd gives an empty value as an empty argument.
fn arguments(query: &str) -> Vec<OsString> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(key, true));
        args.push(decode(value, true));
    }
    args
}

fn decode(text: &str, plus: bool) -> OsString {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let (value, length) = match (byte, digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => ((high * 16 + low) as u8, 3),
            (b'+', ..) if plus => (b' ', 1),
            (byte, ..) => (*byte, 1),
        };
        decoded.push(value);
        at += length;
    }
    OsString::from_vec(decoded)
}
