//! What can be changed of the policy, in one step.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::document::Documents;
use super::entry::{Entry, Namespace};

/// A change. What it does not speak of stays as it was applied last.
#[derive(Debug, Clone)]
pub enum Change {
    /// Nothing: what was applied last is put in force again, as after a boot.
    Restore,
    /// Other policy documents in place of all.
    Policy(Documents),
    /// Another identity table.
    Replace {
        /// Who has which address.
        entries: Vec<Entry>,
        /// The namespaces' labels.
        namespaces: Vec<Namespace>,
    },
    /// Some identities.
    Update {
        /// New, or in place of those with the same address.
        put: Vec<Entry>,
        /// Addresses that nobody has any more. Fine if nobody had them.
        remove: Vec<IpAddr>,
        /// New, or in place of those with the same name.
        namespaces: Vec<Namespace>,
    },
}

/// A change of identities as the daemon's socket takes it: `{"replace": [entries]}` or
/// `{"put": [entries], "remove": [addresses]}`, each with `"namespaces"` if those changed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The whole table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace: Option<Vec<Entry>>,
    /// Entries, new or instead of others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub put: Vec<Entry>,
    /// Addresses that nobody has any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<IpAddr>,
    /// Namespaces: all of them with `replace`, else some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<Namespace>,
}

impl TryFrom<Request> for Change {
    type Error = &'static str;

    fn try_from(request: Request) -> Result<Self, Self::Error> {
        let Request { replace, put, remove, namespaces } = request;
        match replace {
            Some(entries) if put.is_empty() && remove.is_empty() => {
                Ok(Self::Replace { entries, namespaces })
            }
            Some(_) => Err("replace goes alone: put and remove must not be there with it"),
            None if put.is_empty() && remove.is_empty() && namespaces.is_empty() => {
                Err("nothing to change: give replace, or put, remove or namespaces")
            }
            None => Ok(Self::Update { put, remove, namespaces }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(json: &str) -> Result<Change, String> {
        let request: Request = serde_json::from_str(json).map_err(|error| error.to_string())?;
        Change::try_from(request).map_err(str::to_owned)
    }

    #[test]
    fn requests_are_one_change_or_none() {
        let entry = r#"{"address":"10.0.0.1","namespace":"a"}"#;
        let whole = change(&format!(r#"{{"replace":[{entry}]}}"#)).unwrap();
        assert!(matches!(whole, Change::Replace { entries, .. } if entries.len() == 1));
        assert!(matches!(change(r#"{"replace":[]}"#), Ok(Change::Replace { .. })));
        let some = change(&format!(r#"{{"put":[{entry}],"remove":["fd00::1"]}}"#)).unwrap();
        assert!(
            matches!(some, Change::Update { put, remove, .. } if put.len() + remove.len() == 2)
        );
        for (json, words) in [
            ("{}", "nothing to change"),
            (r#"{"replace":[],"remove":["10.0.0.1"]}"#, "goes alone"),
            (r#"{"remove":["10.0.0.0/8"]}"#, "invalid IP"),
            (r#"{"puts":[]}"#, "unknown field"),
            (r#"{"put":[{"namespace":"a"}]}"#, "address"),
            ("7", "invalid type"),
        ] {
            let error = change(json).unwrap_err();
            assert!(error.contains(words), "{json}: {error}");
        }
    }
}
