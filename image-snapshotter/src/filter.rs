//! containerd's filters (its `filters` package) as far as they can speak of snapshots.
//!
//! `kind==committed,labels."a.b"!=x`: all of one filter must hold, one of several filters.

use crate::store::{Kind, Snapshot};

#[derive(Debug, PartialEq, Eq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
}

#[derive(Debug, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
}

/// Filters of one request; none of them lets everything pass.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<(Field, Test)>>);

impl Filters {
    /// Reads them.
    ///
    /// # Errors
    /// Says which filter is not understood.
    pub fn parse(filters: &[String]) -> Result<Self, String> {
        filters.iter().map(|filter| parse(filter)).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the snapshot passes.
    pub fn take(&self, name: &str, snapshot: &Snapshot) -> bool {
        let holds = |(field, test): &(Field, Test)| {
            let value = match field {
                Field::Name => Some(name),
                Field::Parent => Some(snapshot.parent.as_str()),
                Field::Kind => Some(match snapshot.kind {
                    Kind::View => "View",
                    Kind::Active => "Active",
                    Kind::Committed => "Committed",
                }),
                Field::Label(key) => snapshot.labels.get(key).map(String::as_str),
            };
            // Kinds are written either way.
            let same = |to: &String| match field {
                Field::Kind => value.is_some_and(|value| value.eq_ignore_ascii_case(to)),
                _ => value == Some(to),
            };
            match test {
                Test::Present => value.is_some_and(|value| !value.is_empty()),
                Test::Equal(to) => same(to),
                Test::Unequal(to) => !same(to),
            }
        };
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(holds))
    }
}

fn parse(filter: &str) -> Result<Vec<(Field, Test)>, String> {
    let mut tests = Vec::new();
    let mut rest = filter.trim();
    while !rest.is_empty() {
        let wrong = || format!("{filter:?} is not understood");
        let (first, mut after) = word(rest).ok_or_else(wrong)?;
        let mut path = vec![first];
        while let Some(next) = after.strip_prefix('.') {
            let (part, left) = word(next).ok_or_else(wrong)?;
            path.push(part);
            after = left;
        }
        let field = match path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["name"] => Field::Name,
            ["parent"] => Field::Parent,
            ["kind"] => Field::Kind,
            ["labels", key @ ..] if !key.is_empty() => Field::Label(key.join(".")),
            _ => return Err(wrong()),
        };
        let operators = [("==", true), ("!=", false)];
        let found =
            operators.iter().find_map(|(text, equal)| Some((after.strip_prefix(text)?, equal)));
        let test = match found {
            None => Test::Present,
            Some((value, equal)) => {
                let (value, left) = word(value).ok_or_else(wrong)?;
                after = left;
                if *equal { Test::Equal(value) } else { Test::Unequal(value) }
            }
        };
        tests.push((field, test));
        rest = match after.strip_prefix(',') {
            Some(more) => more,
            None if after.is_empty() => after,
            None => return Err(wrong()),
        };
    }
    Ok(tests)
}

/// A bare or quoted word, and what follows.
fn word(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', '.', '=', '!', '~']).unwrap_or(text.len());
        // A value, unlike a name, may have dots.
        return (end > 0).then(|| (text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn filters_as_containerd_sends_them() {
        let snapshot = Snapshot {
            parent: "below".to_owned(),
            kind: Kind::Committed,
            created: (0, 0),
            updated: (0, 0),
            labels: [("containerd.io/gc.root".to_owned(), "1.5".to_owned())].into(),
            layer: None,
        };
        let takes =
            |filter: &str| Filters::parse(&[filter.to_owned()]).unwrap().take("a/1/x", &snapshot);
        for filter in [
            "",
            "kind==committed",
            "parent==below,kind!=active",
            r#"labels."containerd.io/gc.root""#,
            r#"labels."containerd.io/gc.root"=="1.5""#,
            r#"name=="a/1/x""#,
        ] {
            assert!(takes(filter), "{filter}");
        }
        for filter in ["kind==view", "labels.none", r#"labels."containerd.io/gc.root"!="1.5""#] {
            assert!(!takes(filter), "{filter}");
        }
        assert!(Filters::default().take("x", &snapshot));
        for filter in ["what==1", "kind==", "kind=committed", r#"name=="x"#, "labels"] {
            assert!(Filters::parse(&[filter.to_owned()]).is_err(), "{filter}");
        }
    }
}
