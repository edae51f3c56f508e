//! Kubernetes label selectors.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use super::error::Fault;

/// Labels of a pod or namespace.
pub(super) type Labels = BTreeMap<String, String>;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSelector {
    match_labels: Option<BTreeMap<String, String>>,
    match_expressions: Option<Vec<RawExpression>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExpression {
    key: String,
    operator: String,
    #[serde(default)]
    values: Option<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

/// All of these must hold; none: everything is selected. Equal selectors are equal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Selector(Vec<Requirement>);

impl RawSelector {
    pub(super) fn check(self) -> Result<Selector, Fault> {
        let mut all = Vec::new();
        for (key, value) in self.match_labels.into_iter().flatten() {
            check_key(&key).map_err(|fault| fault.within("matchLabels"))?;
            all.push(Requirement::In(key, vec![value]));
        }
        for (at, expression) in self.match_expressions.into_iter().flatten().enumerate() {
            let within = format!("matchExpressions[{at}]");
            all.push(expression.check().map_err(|fault| fault.within(&within))?);
        }
        all.sort();
        all.dedup();
        Ok(Selector(all))
    }
}

impl RawExpression {
    fn check(self) -> Result<Requirement, Fault> {
        let Self { key, operator, values } = self;
        check_key(&key)?;
        let mut values = values.unwrap_or_default();
        values.sort();
        values.dedup();
        match operator.as_str() {
            "In" | "NotIn" if values.is_empty() => {
                Err(Fault::new("values", "[]", format!("{operator} needs at least one")))
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let reason = format!("{operator} has none");
                Err(Fault::new("values", values.join(", "), reason))
            }
            "In" => Ok(Requirement::In(key, values)),
            "NotIn" => Ok(Requirement::NotIn(key, values)),
            "Exists" => Ok(Requirement::Exists(key)),
            "DoesNotExist" => Ok(Requirement::DoesNotExist(key)),
            _ => {
                let reason = "must be In, NotIn, Exists or DoesNotExist";
                Err(Fault::new("operator", operator, reason))
            }
        }
    }
}

fn check_key(key: &str) -> Result<(), Fault> {
    if key.is_empty() || key.len() > 317 {
        return Err(Fault::new("key", key, "must be a label's name"));
    }
    Ok(())
}

impl Selector {
    pub(super) fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => {
                labels.get(key).is_some_and(|value| values.binary_search(value).is_ok())
            }
            Requirement::NotIn(key, values) => {
                labels.get(key).is_none_or(|value| values.binary_search(value).is_err())
            }
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}

/// Selectors to be found by a pod's labels without a look at each: policies of thousands of peers are not
/// compared with thousands of pods one by one.
#[derive(Debug)]
pub(super) struct Index<'a, T> {
    by_label: HashMap<(&'a str, &'a str), Vec<(&'a Selector, T)>>,
    /// Those that require no label to have a value.
    others: Vec<(&'a Selector, T)>,
}

impl<T> Default for Index<'_, T> {
    fn default() -> Self {
        Self { by_label: HashMap::new(), others: Vec::new() }
    }
}

impl<'a, T: Copy + Ord> Index<'a, T> {
    pub(super) fn add(&mut self, selector: &'a Selector, what: T) {
        let required = selector.0.iter().find_map(|requirement| match requirement {
            Requirement::In(key, values) => Some((key, values)),
            _ => None,
        });
        let Some((key, values)) = required else {
            self.others.push((selector, what));
            return;
        };
        for value in values {
            self.by_label.entry((key, value)).or_default().push((selector, what));
        }
    }

    /// Whose selectors select these labels: sorted.
    pub(super) fn matching(&self, labels: &Labels) -> Vec<T> {
        let by_label = labels
            .iter()
            .filter_map(|(key, value)| self.by_label.get(&(key.as_str(), value.as_str())));
        let candidates = by_label.flatten().chain(&self.others);
        let matching = candidates.filter(|(selector, _)| selector.matches(labels));
        let mut matching: Vec<T> = matching.map(|(_, what)| *what).collect();
        matching.sort_unstable();
        matching.dedup();
        matching
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("all");
        }
        for (at, requirement) in self.0.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { ", " })?;
            match requirement {
                Requirement::In(key, values) if values.len() == 1 => {
                    write!(f, "{key}={}", values[0])?;
                }
                Requirement::In(key, values) => write!(f, "{key} in ({})", values.join(", "))?,
                Requirement::NotIn(key, values) => {
                    write!(f, "{key} not in ({})", values.join(", "))?;
                }
                Requirement::Exists(key) => write!(f, "has {key}")?,
                Requirement::DoesNotExist(key) => write!(f, "has no {key}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(json: serde_json::Value) -> Result<Selector, String> {
        let raw: RawSelector = serde_json::from_value(json).map_err(|error| error.to_string())?;
        raw.check().map_err(|fault| format!("{fault:?}"))
    }

    #[test]
    fn each_operator() {
        let labels: Labels =
            [("app", "web"), ("tier", "")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let cases = [
            (r#"{}"#, true),
            (r#"{"matchLabels": null, "matchExpressions": []}"#, true),
            (r#"{"matchLabels": {"app": "web"}}"#, true),
            (r#"{"matchLabels": {"app": "web", "x": "y"}}"#, false),
            (r#"{"matchLabels": {"tier": ""}}"#, true),
            (
                r#"{"matchExpressions": [{"key": "app", "operator": "In", "values": ["db", "web"]}]}"#,
                true,
            ),
            (
                r#"{"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}"#,
                false,
            ),
            (
                r#"{"matchExpressions": [{"key": "no", "operator": "NotIn", "values": ["web"]}]}"#,
                true,
            ),
            (r#"{"matchExpressions": [{"key": "no", "operator": "In", "values": [""]}]}"#, false),
            (r#"{"matchExpressions": [{"key": "tier", "operator": "Exists"}]}"#, true),
            (r#"{"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}"#, false),
        ];
        for (text, expected) in cases {
            let selector = selector(serde_json::from_str(text).unwrap()).unwrap();
            assert_eq!(selector.matches(&labels), expected, "{text}");
        }
    }

    #[test]
    fn hostile_selectors_are_refused() {
        let wrong = [
            r#"{"matchLabel": {}}"#,
            r#"{"matchLabels": {"app": 1}}"#,
            r#"{"matchLabels": {"": "x"}}"#,
            r#"{"matchLabels": ["app"]}"#,
            r#"{"matchExpressions": [{"key": "a", "operator": "in", "values": ["x"]}]}"#,
            r#"{"matchExpressions": [{"key": "a", "operator": "In"}]}"#,
            r#"{"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}"#,
            r#"{"matchExpressions": [{"operator": "Exists"}]}"#,
            r#"{"matchExpressions": [{"key": "a", "operator": "Exists", "value": "x"}]}"#,
        ];
        for text in wrong {
            assert!(selector(serde_json::from_str(text).unwrap()).is_err(), "{text}");
        }
    }
}
