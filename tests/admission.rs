//! The admission policy of the examples (`docs/examples/policy/tenant-annotation.yaml`): its expressions, evaluated as
//! the API server does, on pods that it must let pass and pods that it must not. What calls it, and the authorizer, are
//! stood for.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Arc;

use cel::extractors::This;
use cel::{Context, Env, Value as Cel};
use serde_json::{Value, json};

const EXAMPLE: &str = include_str!("../docs/examples/policy/tenant-annotation.yaml");
/// What the authorizer is asked, as the functions below put it together.
const ASSIGN: &str = "group joey.io, resource tenants, check assign";

/// The policy's `spec`.
fn policy() -> Value {
    let documents: Vec<Value> = serde_saphyr::from_multiple(EXAMPLE).unwrap();
    let is = |it: &&Value| it["kind"] == "ValidatingAdmissionPolicy";
    documents.iter().find(is).unwrap()["spec"].clone()
}

/// Whether a request is admitted; `may` is what its sender may do. A message where it is not.
fn admit(object: &Value, old: &Value, may: &str) -> Result<(), String> {
    let (policy, env) = (policy(), Arc::new(Env::stdlib()));
    let evaluate = |expression: &Value, variables: &HashMap<String, Cel>| {
        let expression = expression.as_str().unwrap();
        let mut context = Context::with_env(env.clone());
        context.add_variable("object", object).unwrap();
        context.add_variable("oldObject", old).unwrap();
        context.add_variable("authorizer", "").unwrap();
        context.add_variable_from_value("variables", variables.clone());
        for (function, joint) in [("group", ""), ("resource", ", "), ("check", ", ")] {
            let said = move |This(asked): This<Arc<String>>, what: Arc<String>| {
                Arc::new(format!("{asked}{joint}{function} {what}"))
            };
            context.add_function(function, said).unwrap();
        }
        let may = may.to_owned();
        context
            .add_function("allowed", move |This(asked): This<Arc<String>>| *asked == may)
            .unwrap();
        let program =
            env.compile(expression).unwrap_or_else(|error| panic!("{expression}: {error}"));
        program.execute(&context).unwrap_or_else(|error| panic!("{expression}: {error}"))
    };
    let mut variables = HashMap::new();
    for variable in policy["variables"].as_array().unwrap() {
        let value = evaluate(&variable["expression"], &variables);
        variables.insert(variable["name"].as_str().unwrap().to_owned(), value);
    }
    for validation in policy["validations"].as_array().unwrap() {
        match evaluate(&validation["expression"], &variables) {
            Cel::Bool(true) => {}
            Cel::Bool(false) => return Err(validation["message"].as_str().unwrap().to_owned()),
            other => panic!("{validation}: {other:?}"),
        }
    }
    Ok(())
}

fn pod(annotations: &Value) -> Value {
    let mut pod =
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "b"}});
    if !annotations.is_null() {
        pod["metadata"]["annotations"] = annotations.clone();
    }
    pod
}

#[test]
fn only_who_may_assign_tenants_says_whose_a_pod_is() {
    let none = [Value::Null, json!({}), json!({"other": "x"})];
    let said = [
        json!({"io.joey.tenant": "red"}),
        json!({"tenancy.x-k8s.io/cluster": "red"}),
        json!({"io.joey.tenant": "red", "tenancy.x-k8s.io/cluster": "vc", "other": "x"}),
    ];
    // Made: nothing may be said, in any way; an empty annotation says nothing, and the shim takes it so.
    for annotations in none.iter().chain(&[json!({"io.joey.tenant": ""})]) {
        admit(&pod(annotations), &Value::Null, "nothing").unwrap();
    }
    for annotations in &said {
        let refused = admit(&pod(annotations), &Value::Null, "nothing").unwrap_err();
        assert!(refused.contains("io.joey.tenant"), "{refused}");
        admit(&pod(annotations), &Value::Null, ASSIGN).unwrap();
        admit(&pod(annotations), &Value::Null, "group joey.io, resource tenants, check get")
            .unwrap_err();
        // Changed: what was said stays, and nothing comes to it or goes from it.
        admit(&pod(annotations), &pod(annotations), "nothing").unwrap();
        let mut more = annotations.clone();
        more["unrelated"] = json!("y");
        admit(&pod(&more), &pod(annotations), "nothing").unwrap();
        for other in none.iter().chain(said.iter().filter(|other| *other != annotations)) {
            admit(&pod(other), &pod(annotations), "nothing").unwrap_err();
            admit(&pod(annotations), &pod(other), "nothing").unwrap_err();
            admit(&pod(annotations), &pod(other), ASSIGN).unwrap();
        }
    }
}

#[test]
fn everything_that_can_say_it_is_asked_about() {
    let policy = policy();
    let rules = &policy["matchConstraints"]["resourceRules"];
    assert_eq!(policy["failurePolicy"], "Fail");
    assert_eq!(rules[0]["operations"], json!(["CREATE", "UPDATE"]));
    for resource in ["pods", "pods/status", "services", "services/status"] {
        assert!(rules[0]["resources"].as_array().unwrap().contains(&json!(resource)), "{resource}");
    }
    let annotations = joey_shim::policy::tenant::default_annotations();
    for annotation in annotations {
        assert!(policy["variables"].to_string().contains(&annotation), "{annotation}");
    }
}
