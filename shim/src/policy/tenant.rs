//! Whose a pod is: the one rule, for the shim at a pod's start and for what is said of pods elsewhere.

/// Annotation by which a cluster's admin says whose a pod is.
pub const ANNOTATION: &str = "io.joey.tenant";
/// Annotation by which VirtualCluster's syncer says from which tenant's control plane an object came. The
/// syncer writes it over whatever a tenant put there.
pub const VIRTUAL_CLUSTER: &str = "tenancy.x-k8s.io/cluster";

/// Refuses what cannot be a tenant's name.
///
/// # Errors
/// Why.
pub fn check(name: &str) -> Result<(), String> {
    let checked = super::node::name("tenant", name.to_owned());
    checked.map(drop).map_err(|fault| format!("tenant {name:?} {}", fault.reason))
}

/// Annotations that are believed unless the configuration names others.
#[must_use]
pub fn default_annotations() -> Vec<String> {
    [ANNOTATION, VIRTUAL_CLUSTER].map(str::to_owned).to_vec()
}

/// The tenant's name: the first of the annotations `keys` that is there and not empty, or else the
/// namespace. `None` for what has neither.
pub fn of<'a>(
    annotation: impl Fn(&str) -> Option<&'a str>,
    namespace: Option<&'a str>,
    keys: &[String],
) -> Option<String> {
    let named = keys.iter().filter_map(|key| annotation(key)).find(|value| !value.is_empty());
    named.or(namespace).filter(|name| !name.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_annotation_that_says_something_goes_before_the_namespace() {
        let keys = default_annotations();
        let of = |said: &[(&str, &'static str)], namespace| {
            let said = said.to_vec();
            of(|key| said.iter().find(|(k, _)| *k == key).map(|(_, v)| *v), namespace, &keys)
        };
        let both = [(VIRTUAL_CLUSTER, "vc-1"), (ANNOTATION, "blue")];
        assert_eq!(of(&both, Some("web")).as_deref(), Some("blue"));
        assert_eq!(of(&both[..1], Some("web")).as_deref(), Some("vc-1"));
        assert_eq!(of(&[(ANNOTATION, "")], Some("web")).as_deref(), Some("web"));
        assert_eq!(of(&[("other", "x")], Some("web")).as_deref(), Some("web"));
        assert_eq!(of(&[], Some("")), None);
        assert_eq!(of(&[], None), None);
    }
}
