//! containerd's filters (its `filters` package) as far as they can speak of snapshots.
//!
//! `kind==committed,labels."a.b"!=x`: all of one filter must hold, one of several filters. Values need
//! quotes only if they have commas or spaces, or begin with what else has a meaning there. `~=` takes
//! regular expressions, which may also be between slashes or bars.

use regex::bytes::{Regex, RegexBuilder};

use crate::store::{Kind, Snapshot};

#[derive(Debug, PartialEq, Eq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
    Matching(Regex),
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
            // Kinds are written either way, and matched in small letters.
            let same = |to: &String| match field {
                Field::Kind => value.is_some_and(|value| value.eq_ignore_ascii_case(to)),
                _ => value == Some(to),
            };
            match test {
                Test::Present => value.is_some(),
                Test::Equal(to) => same(to),
                Test::Matching(pattern) => {
                    let value = value.unwrap_or_default();
                    match field {
                        Field::Kind => pattern.is_match(value.to_ascii_lowercase().as_bytes()),
                        _ => pattern.is_match(value.as_bytes()),
                    }
                }
                // What is not there is unequal to everything but nothing.
                Test::Unequal(to) => !(same(to) || value.is_none() && to.is_empty()),
            }
        };
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(holds))
    }
}

fn parse(filter: &str) -> Result<Vec<(Field, Test)>, String> {
    let mut tests = Vec::new();
    let mut rest = filter.trim();
    let wrong = || format!("{filter:?} is not understood");
    while !rest.is_empty() {
        let (field, after) = field(rest).ok_or_else(wrong)?;
        let (operator, after) = operator(after);
        let (test, after) = match operator {
            "" => (Test::Present, after),
            "==" | "!=" | "~=" => {
                let (value, after) = value(after, operator == "~=").ok_or_else(wrong)?;
                let test = match operator {
                    "==" => Test::Equal(value),
                    "!=" => Test::Unequal(value),
                    _ => Test::Matching(pattern(&value).map_err(|error| {
                        format!("{filter:?}: the regular expression {value:?}: {error}")
                    })?),
                };
                (test, after)
            }
            _ => return Err(wrong()),
        };
        tests.push((field, test));
        rest = match after.trim_start() {
            "" => "",
            more => more.strip_prefix(',').ok_or_else(wrong)?.trim_start(),
        };
    }
    Ok(tests)
}

/// As Go has them: classes such as `\\d` are ASCII's.
fn pattern(text: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(text).unicode(false).build()
}

/// A path of names, and what follows.
fn field(text: &str) -> Option<(Field, &str)> {
    let (first, mut after) = name(text)?;
    let mut path = vec![first];
    while let Some(next) = after.strip_prefix('.') {
        let (part, left) = name(next)?;
        path.push(part);
        after = left;
    }
    let field = match path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["name"] => Field::Name,
        ["parent"] => Field::Parent,
        ["kind"] => Field::Kind,
        ["labels", key @ ..] if !key.is_empty() => Field::Label(key.join(".")),
        _ => return None,
    };
    Some((field, after))
}

/// Part of a path: letters, digits, `_` and `-`, or anything in quotes.
fn name(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    if text.starts_with('"') {
        return quoted(text);
    }
    let part =
        |character: char| matches!(character, '_' | '-') || character.is_ascii_alphanumeric();
    let end = text.find(|character| !part(character)).unwrap_or(text.len());
    (end > 0).then(|| (text[..end].to_owned(), &text[end..]))
}

/// The operator, empty if there is none, and what follows.
fn operator(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    let of = |character: char| matches!(character, '=' | '!' | '~');
    text.split_at(text.find(|character| !of(character)).unwrap_or(text.len()))
}

/// What comes after an operator: up to a comma or space, or anything in quotes.
fn value(text: &str, is_pattern: bool) -> Option<(String, &str)> {
    let text = text.trim_start();
    match text.chars().next()? {
        '"' => return quoted(text),
        '/' | '|' if is_pattern => return quoted(text),
        // containerd's scanner takes these for other things, and so refuses the filter.
        ',' | '.' | '/' | '|' | '=' | '!' | '~' => return None,
        _ => {}
    }
    let end = text.find(|character: char| character == ',' || character.is_whitespace());
    let (value, after) = text.split_at(end.unwrap_or(text.len()));
    Some((value.to_owned(), after))
}

/// What is between quotes of the first character's kind, and what follows; of Go's escapes those with
/// one letter.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut characters = text.char_indices();
    let (_, quote) = characters.next()?;
    let mut value = String::new();
    while let Some((at, character)) = characters.next() {
        match character {
            end if end == quote => return Some((value, &text[at + quote.len_utf8()..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                same if same == quote || same == '\\' => same,
                _ => return None,
            }),
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
            labels: [
                ("containerd.io/gc.root".to_owned(), "1.5".to_owned()),
                ("empty".to_owned(), String::new()),
                ("odd".to_owned(), "a=b~c!=.d/e".to_owned()),
            ]
            .into(),
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
            "name==a/1/x",
            r#"labels."containerd.io/gc.root"==1.5"#,
            r#"labels."containerd.io/gc.root"!=1.6,kind==committed"#,
            "labels.odd==a=b~c!=.d/e",
            "labels.odd == a=b~c!=.d/e , kind==committed",
            "labels.empty",
            "labels.empty==\"\"",
            "labels.none!=x",
            "name~=^a/\\d/",
            "name~=/^a\\/[0-9]/,kind~=^comm",
            r#"name~="^a/\\d""#,
            "labels.none~=^$",
        ] {
            assert!(takes(filter), "{filter}");
        }
        for filter in
            ["kind==view", "name~=^x", "labels.none", r#"labels."containerd.io/gc.root"!="1.5""#]
        {
            assert!(!takes(filter), "{filter}");
        }
        assert!(Filters::default().take("x", &snapshot));
        for filter in [
            "what==1",
            "kind==",
            "kind=committed",
            r#"name=="x"#,
            "labels",
            "name==/x",
            "name==.x",
            "name==x y",
            r#"name~="\d""#,
            "name===x",
        ] {
            assert!(Filters::parse(&[filter.to_owned()]).is_err(), "{filter}");
        }
        let error = Filters::parse(&["name~=(".to_owned()]).unwrap_err();
        assert!(error.contains("regular expression"), "{error}");
    }
}
