//! Endpoints of Services by kube-proxy's rules and by the EndpointSlice controller's, and what a change affects.

use std::fmt::Write;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn service(value: Value) -> Change {
    Change::Upsert(Object::Service(Box::new(serde_json::from_value(value).unwrap())))
}

fn slice(value: Value) -> Change {
    let slice = serde_json::from_value(value).unwrap();
    Change::Upsert(Object::EndpointSlice(SliceState::new(&slice, &mut Interner::default()).0.into()))
}

fn pod(value: Value) -> Change {
    let pod = serde_json::from_value(value).unwrap();
    Change::Upsert(Object::Pod(PodState::new(&pod, &mut Interner::default()).0.into()))
}

fn node(value: Value) -> Change {
    Change::Upsert(Object::Node(Box::new(serde_json::from_value(value).unwrap())))
}

fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn named(names: &[&str]) -> BTreeSet<ObjectName> {
    names.iter().map(|text| name(text)).collect()
}

/// `port/protocol addr:port` and R, S, T for ready, serving, terminating.
fn shown(backends: &[Backend]) -> Vec<String> {
    backends
        .iter()
        .map(|backend| {
            let mut text = format!("{}/{} {}:{} ", backend.port_name, backend.protocol, backend.addr, backend.port);
            for (set, letter) in [(backend.ready, 'R'), (backend.serving, 'S'), (backend.terminating, 'T')] {
                if set {
                    text.write_char(letter).unwrap();
                }
            }
            text.trim().to_owned()
        })
        .collect()
}

fn backends(changes: impl IntoIterator<Item = Change>) -> Vec<String> {
    let mut model = Model::new("n1");
    for change in changes {
        model.apply(change);
    }
    shown(&model.backends(&name("web")))
}

fn web() -> Change {
    service(
        json!({"metadata": {"name": "web"}, "spec": {"ports": [{"name": "http", "port": 80}], "selector": {"app": "web"}}}),
    )
}

fn slice_of(slice_name: &str, endpoints: Value) -> Change {
    slice(json!({
        "metadata": {"name": slice_name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints,
    }))
}

#[test]
fn conditions_of_slices_have_kube_proxys_defaults() {
    for (conditions, expected) in [
        (json!(null), "RS"),
        (json!({}), "RS"),
        (json!({"ready": false}), "S"),
        (json!({"ready": false, "terminating": true}), "ST"),
        (json!({"ready": false, "serving": false, "terminating": true}), "T"),
        (json!({"serving": false}), "R"),
        (json!({"ready": false, "serving": true, "terminating": true}), "ST"),
        (json!({"ready": true, "serving": null, "terminating": null}), "RS"),
    ] {
        let endpoints = json!([{"addresses": ["10.0.0.1", "10.0.0.2"], "conditions": conditions}]);
        let expected = format!("http/TCP 10.0.0.1:8080 {expected}").trim().to_owned();
        assert_eq!(backends([web(), slice_of("web-1", endpoints)]), [expected], "{conditions}");
    }
}

#[test]
fn slice_ports_without_name_or_number_are_skipped() {
    let ports = json!([
        {"port": 1}, {"name": null, "port": 2}, {"name": "a"}, {"name": "b", "port": 0}, {"name": "", "port": 3},
        {"name": "c", "port": 4, "protocol": "UDP"}, {"name": "d", "port": 5, "protocol": null},
    ]);
    let slice = slice(json!({
        "metadata": {"name": "s", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": ports, "endpoints": [{"addresses": ["10.0.0.1"]}],
    }));
    assert_eq!(backends([web(), slice]), ["/TCP 10.0.0.1:3 RS", "c/UDP 10.0.0.1:4 RS", "d/TCP 10.0.0.1:5 RS"]);
}

#[test]
fn addresses_that_are_not_of_the_slices_family_are_skipped_and_reported() {
    let slice = |family: &str| -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": "s"}, "addressType": family, "ports": [{"name": "", "port": 1}],
            "endpoints": [{"addresses": ["10.0.0.01"]}, {"addresses": ["fd00::1"]}, {"addresses": ["x"]}, {"addresses": []}],
        }))
        .unwrap()
    };
    for (family, addrs, fields) in [
        ("IPv4", &["10.0.0.1"][..], &["endpoints[1].addresses[0]", "endpoints[2].addresses[0]"][..]),
        ("IPv6", &["fd00::1"], &["endpoints[0].addresses[0]", "endpoints[2].addresses[0]"]),
        ("FQDN", &[], &[]),
        ("", &[], &["addressType"]),
    ] {
        let (state, errors) = SliceState::new(&slice(family), &mut Interner::default());
        assert_eq!(state.endpoints.iter().map(|e| e.addr.to_string()).collect::<Vec<_>>(), addrs);
        assert_eq!(errors.iter().map(|e| e.field.as_str()).collect::<Vec<_>>(), fields);
    }
}

#[test]
fn slices_are_united_and_an_endpoint_that_stays_beats_one_that_goes() {
    let going =
        json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": false, "serving": true, "terminating": true}}]);
    let staying = json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}]);
    let expected = ["http/TCP 10.0.0.1:8080 RS", "http/TCP 10.0.0.2:8080 RS"];
    assert_eq!(backends([web(), slice_of("a", going.clone()), slice_of("b", staying.clone())]), expected);
    assert_eq!(backends([web(), slice_of("a", staying), slice_of("b", going)]), expected);
}

#[test]
fn a_slice_may_come_before_its_service() {
    let mut model = Model::new("n1");
    let early = model.apply(slice_of("a", json!([{"addresses": ["10.0.0.1"]}])));
    assert_eq!(early, Affected::default());
    assert_eq!(model.apply(web()).services, named(&["web"]));
    assert_eq!(model.backends(&name("web")).len(), 1);
}

#[test]
fn hidden_slices_and_those_without_the_label_are_no_endpoints() {
    for labels in [json!({}), json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""})] {
        let slice = slice(json!({
            "metadata": {"name": "s", "labels": labels}, "addressType": "IPv4",
            "ports": [{"name": "http", "port": 1}], "endpoints": [{"addresses": ["10.0.0.1"]}],
        }));
        assert!(backends([web(), slice]).is_empty());
    }
}

#[test]
fn hints_and_nodes_are_kept() {
    let mut model = Model::new("n1");
    model.apply(web());
    model.apply(slice_of(
        "a",
        json!([{"addresses": ["10.0.0.1"], "nodeName": "n2", "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "n2"}]}}]),
    ));
    let backend = model.backends(&name("web")).remove(0);
    assert_eq!(backend.node.as_deref(), Some("n2"));
    assert_eq!(backend.for_zones, ["z".into()]);
    assert_eq!(backend.for_nodes, ["n2".into()]);
}

fn ready_pod(pod_name: &str, app: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": pod_name, "labels": {"app": app, "env": "test"}},
        "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "main", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// A Pod that is like [`ready_pod`] but for these fields.
fn pod_with(pointers: &[(&str, Value)]) -> Change {
    let mut value = ready_pod("web-1", "web", "10.0.0.1");
    for (pointer, new) in pointers {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        value.pointer_mut(parent).unwrap()[key] = new.clone();
    }
    pod(value)
}

#[test]
fn pods_are_endpoints_by_the_controllers_rules() {
    let sidecar = |policy: &str| json!([{"restartPolicy": policy, "ports": [{"name": "side", "containerPort": 9}]}]);
    let going = ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z"));
    let not_ready = ("/status/conditions", json!([{"type": "Ready", "status": "False"}]));
    let target = |port: Value| json!({"name": "p", "port": 80, "targetPort": port});
    let plain = json!({"name": "p", "port": 80});
    for (what, port, publish, changes, expected) in [
        ("ready", plain.clone(), false, vec![], &["p/TCP 10.0.0.1:80 RS"][..]),
        ("not ready", plain.clone(), false, vec![not_ready.clone()], &["p/TCP 10.0.0.1:80"]),
        ("published", plain.clone(), true, vec![not_ready.clone()], &["p/TCP 10.0.0.1:80 R"]),
        ("terminating", plain.clone(), false, vec![going.clone()], &["p/TCP 10.0.0.1:80 ST"]),
        ("terminating, published", plain.clone(), true, vec![going.clone()], &["p/TCP 10.0.0.1:80 ST"]),
        ("terminating, not ready", plain.clone(), false, vec![going, not_ready], &["p/TCP 10.0.0.1:80 T"]),
        ("succeeded", plain.clone(), true, vec![("/status/phase", json!("Succeeded"))], &[]),
        ("failed", plain.clone(), true, vec![("/status/phase", json!("Failed"))], &[]),
        ("no address", plain.clone(), true, vec![("/status/podIP", json!(null))], &[]),
        ("other labels", plain.clone(), true, vec![("/metadata/labels/app", json!("api"))], &[]),
        ("host network", plain.clone(), false, vec![("/spec/hostNetwork", json!(true))], &["p/TCP 10.0.0.1:80 RS"]),
        (
            "both families",
            plain.clone(),
            false,
            vec![("/status/podIPs", json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]))],
            &["p/TCP 10.0.0.1:80 RS", "p/TCP fd00::1:80 RS"],
        ),
        ("number", target(json!(81)), false, vec![], &["p/TCP 10.0.0.1:81 RS"]),
        ("zero is absent", target(json!(0)), false, vec![], &["p/TCP 10.0.0.1:80 RS"]),
        ("name", target(json!("main")), false, vec![], &["p/TCP 10.0.0.1:8080 RS"]),
        ("name that it has not", target(json!("side")), false, vec![], &[]),
        (
            "sidecar",
            target(json!("side")),
            false,
            vec![("/spec/initContainers", sidecar("Always"))],
            &["p/TCP 10.0.0.1:9 RS"],
        ),
        ("init container", target(json!("side")), false, vec![("/spec/initContainers", sidecar("Never"))], &[]),
        (
            "name of another protocol",
            json!({"name": "p", "port": 80, "targetPort": "main", "protocol": "UDP"}),
            false,
            vec![],
            &[],
        ),
    ] {
        let service = service(json!({
            "metadata": {"name": "web"},
            "spec": {"ports": [port], "selector": {"app": "web"}, "publishNotReadyAddresses": publish},
        }));
        assert_eq!(backends([service, pod_with(&changes)]), expected, "{what}");
    }
}

#[test]
fn pods_count_only_where_no_slice_names_the_service() {
    let mut model = Model::new("n1");
    model.apply(web());
    model.apply(pod(ready_pod("web-1", "web", "10.0.0.1")));
    assert_eq!(shown(&model.backends(&name("web"))), ["http/TCP 10.0.0.1:80 RS"]);
    assert_eq!(model.apply(slice_of("s", json!([]))).services, named(&["web"]));
    assert!(model.backends(&name("web")).is_empty());
    assert_eq!(model.apply(pod(ready_pod("web-2", "web", "10.0.0.2"))), Affected::default());
    assert_eq!(model.apply(Change::Delete(Kind::EndpointSlice, name("s"))).services, named(&["web"]));
    assert_eq!(model.backends(&name("web")).len(), 2);
}

#[test]
fn services_without_selector_and_external_names_have_no_endpoints() {
    for spec in [
        json!({"ports": [{"port": 80}]}),
        json!({"ports": [{"port": 80}], "type": "ExternalName", "selector": {"app": "web"}}),
    ] {
        let service = service(json!({"metadata": {"name": "web"}, "spec": spec}));
        assert!(backends([service, pod(ready_pod("web-1", "web", "10.0.0.1"))]).is_empty());
    }
}

#[test]
fn a_label_change_affects_the_service_that_loses_the_pod_and_the_one_that_gets_it() {
    let mut model = Model::new("n1");
    for other in ["web", "api", "idle"] {
        model.apply(service(
            json!({"metadata": {"name": other}, "spec": {"ports": [{"port": 80}], "selector": {"app": other}}}),
        ));
    }
    assert_eq!(model.apply(pod(ready_pod("p", "web", "10.0.0.1"))).services, named(&["web"]));
    assert_eq!(model.apply(pod(ready_pod("p", "web", "10.0.0.1"))), Affected::default());
    assert_eq!(model.apply(pod(ready_pod("p", "api", "10.0.0.1"))).services, named(&["web", "api"]));
    assert_eq!(model.apply(Change::Delete(Kind::Pod, name("p"))).services, named(&["api"]));
}

#[test]
fn only_the_own_node_matters() {
    let mut model = Model::new(" N1 ");
    let other = json!({"metadata": {"name": "n2"}});
    let own = json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}}});
    assert!(!model.apply(node(other)).node);
    assert!(model.apply(node(own.clone())).node);
    assert!(!model.apply(node(own)).node);
    assert_eq!(model.node().unwrap().metadata.labels.get("topology.kubernetes.io/zone"), Some("a"));
    assert_eq!(model.count(Kind::Node), 2);
    assert!(model.apply(Change::Delete(Kind::Node, ObjectName::new("", "n1"))).node);
    assert!(model.node().is_none());
}

#[test]
fn hidden_services_say_so() {
    for (label, hidden) in [
        ("service.kubernetes.io/service-proxy-name", true),
        ("service.kubernetes.io/headless", true),
        ("app.kubernetes.io/name", false),
    ] {
        let service: Service = serde_json::from_value(json!({"metadata": {"labels": {label: ""}}})).unwrap();
        assert_eq!(service.is_hidden(), hidden, "{label}");
    }
}

/// Few names and labels, so that changes meet each other.
fn any_change() -> impl Strategy<Value = Change> {
    let labels = (0..3_u8, 0..3_u8).prop_map(|(a, b)| match (a, b) {
        (0, b) => json!({"b": b.to_string()}),
        (a, 0) => json!({"a": a.to_string()}),
        (a, b) => json!({"a": a.to_string(), "b": b.to_string()}),
    });
    let selector = prop_oneof![1 => Just(json!({})), 4 => labels.clone()];
    let kind = prop_oneof![
        (0..5_u8, selector, any::<bool>()).prop_map(|(n, selector, publish)| service(json!({
            "metadata": {"name": format!("s{n}")},
            "spec": {"selector": selector, "publishNotReadyAddresses": publish, "ports": [{"name": "p", "port": 80}]},
        }))),
        (0..8_u8, labels, 0..4_u8, any::<bool>(), any::<bool>()).prop_map(|(n, labels, ip, ready, going)| pod(json!({
            "metadata": {"name": format!("p{n}"), "labels": labels, "deletionTimestamp": going.then_some("now")},
            "status": {"podIP": format!("10.0.0.{ip}"), "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        }))),
        (0..4_u8, 0..5_u8, 0..4_u8, any::<bool>()).prop_map(|(n, of, ip, going)| slice(json!({
            "metadata": {"name": format!("e{n}"), "labels": {"kubernetes.io/service-name": format!("s{of}")}},
            "addressType": "IPv4", "ports": [{"name": "p", "port": 80}],
            "endpoints": [{"addresses": [format!("10.0.0.{ip}")], "conditions": {"terminating": going}}],
        }))),
        (0..5_u8).prop_map(|n| Change::Delete(Kind::Service, name(&format!("s{n}")))),
        (0..8_u8).prop_map(|n| Change::Delete(Kind::Pod, name(&format!("p{n}")))),
        (0..4_u8).prop_map(|n| Change::Delete(Kind::EndpointSlice, name(&format!("e{n}")))),
    ];
    kind
}

fn all_backends(model: &Model) -> BTreeMap<ObjectName, Vec<Backend>> {
    model.services().map(|(name, _)| (name.clone(), model.backends(name))).collect()
}

proptest! {
    #[test]
    fn changes_one_by_one_lead_where_a_fresh_start_leads(changes in prop::collection::vec(any_change(), 1..40)) {
        let mut model = Model::new("n1");
        let mut state = BTreeMap::new();
        for change in changes {
            let before = all_backends(&model);
            match &change {
                Change::Upsert(object) => state.insert((object.kind(), object.name()), object.clone()),
                Change::Delete(kind, name) => state.remove(&(*kind, name.clone())),
            };
            let affected = model.apply(change);
            let after = all_backends(&model);
            for name in before.keys().chain(after.keys()) {
                let same = before.get(name) == after.get(name);
                prop_assert!(same || affected.services.contains(name), "{name} changed and was not named");
            }
            // The other way round, so that every order of arrival is met.
            let mut fresh = Model::new("n1");
            for object in state.values().rev() {
                fresh.apply(Change::Upsert(object.clone()));
            }
            prop_assert_eq!(after, all_backends(&fresh));
        }
    }
}

#[test]
fn a_slice_that_changes_says_since_when_and_of_which_family() {
    let slice_at = |time: Value, family: &str, addr: &str| {
        slice(json!({
            "metadata": {
                "name": "web-1",
                "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": time},
            },
            "addressType": family, "ports": [{"name": "http", "port": 8080}], "endpoints": [{"addresses": [addr]}],
        }))
    };
    for (time, family, addr, want) in [
        (json!("2026-11-25T16:00:00Z"), "IPv4", "10.0.0.1", &[(true, 1_795_622_400)][..]),
        (json!("2026-11-25T16:00:00.5Z"), "IPv6", "fd00::1", &[(false, 1_795_622_400)]),
        (json!(null), "IPv4", "10.0.0.1", &[]),
        (json!("yesterday"), "IPv4", "10.0.0.1", &[]),
    ] {
        let mut model = Model::new("n1");
        model.apply(web());
        assert_eq!(model.apply(slice_at(time.clone(), family, addr)).endpoints_changed, want, "{time}");
        assert_eq!(model.apply(Change::Delete(Kind::EndpointSlice, name("web-1"))).endpoints_changed, []);
    }
}
