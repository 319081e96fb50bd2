//! A small cluster with one of everything, as manifests, and an agent that has it.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use fairlead::{
    image::{Image, Write},
    model::{Change, Object},
    pipeline::Pipeline,
    plan::node::{LocalDetector, NodeOptions},
};
use lb_common::{
    layout::{Device, device_flags},
    memory::Memory,
};
use serde_json::{Value, json};

/// The node whose agent it is.
pub const NODE: &str = "node1";

/// One object of each kind, and a Service of each type.
pub fn manifests() -> Vec<Value> {
    let service = |name: &str, spec: Value, status: Value| {
        let metadata = json!({ "namespace": "shop", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z", "labels": { "a": "b" } });
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status })
    };
    let slice = |name: &str, family: &str, addresses: [&str; 3]| {
        let endpoints = addresses.iter().zip([NODE, "node2", "node2"]).map(|(address, node)| {
            json!({
                "addresses": [address],
                "conditions": { "ready": node == NODE, "serving": true, "terminating": node != NODE },
                "nodeName": node,
                "hints": { "forZones": [{ "name": "z1" }], "forNodes": [{ "name": NODE }] },
            })
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": { "namespace": "shop", "name": name, "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": family,
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }, { "name": "dns", "port": 53, "protocol": "UDP" }],
        })
    };
    let selected = json!({
        "type": "NodePort",
        "clusterIP": "10.96.0.11",
        "clusterIPs": ["10.96.0.11"],
        "ports": [{ "port": 80, "targetPort": "main", "nodePort": 30081 }],
        "selector": { "app": "x" },
        "publishNotReadyAddresses": true,
    });
    let balanced = json!({
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.10",
        "clusterIPs": ["10.96.0.10", "fd00:96::10"],
        "ports": [
            { "name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080, "targetPort": 8080 },
            { "name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053 },
        ],
        "externalIPs": ["192.0.2.1", "2001:db8::1"],
        "loadBalancerSourceRanges": ["203.0.113.0/24", "fd00:1::/32"],
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Cluster",
        "healthCheckNodePort": 32000,
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 10 } },
    });
    let ingress =
        json!({ "loadBalancer": { "ingress": [{ "ip": "192.0.2.2", "ipMode": "VIP" }, { "ip": "2001:db8::2" }] } });
    vec![
        service("web", balanced, ingress),
        service("pods", selected, json!({})),
        slice("web-4", "IPv4", ["10.1.0.1", "10.1.0.2", "10.2.0.1"]),
        slice("web-6", "IPv6", ["fd00:1::1", "fd00:1::2", "fd00:2::1"]),
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "namespace": "shop", "name": "p", "labels": { "app": "x" } },
            "spec": { "nodeName": NODE, "containers": [{ "ports": [{ "name": "main", "containerPort": 7000, "protocol": "TCP" }] }] },
            "status": {
                "phase": "Running",
                "podIP": "10.1.0.7",
                "podIPs": [{ "ip": "10.1.0.7" }, { "ip": "fd00:1::7" }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": NODE, "labels": { "topology.kubernetes.io/zone": "z1" } },
            "spec": { "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"] },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.168.0.2" }, { "type": "ExternalIP", "address": "fd00:c0::2" }] },
        }),
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": ["10.96.0.0/16", "fd00:96::/108"] },
        }),
    ]
}

/// An agent that has seen no object, with these tables, and what it writes.
pub fn agent(image: Image) -> (Pipeline, Vec<Write>) {
    let options = NodeOptions {
        node_port_addresses: vec!["primary".to_owned()],
        detector: LocalDetector::NodeCidr,
        ..NodeOptions::default()
    };
    let mut pipeline = Pipeline::new(NODE, options, image);
    let local = Device { flags: device_flags::LOCAL_SOURCES, ..Device::default() };
    let mut writes = pipeline.image_mut().set_devices(&BTreeMap::from([(1, local), (2, Device::default())]));
    writes.extend(pipeline.image_mut().set_terminates(false));
    // No one but the first agent knows this: what is there is kept, and here it is nothing.
    writes.extend(pipeline.image_mut().leave_mid_flow(0));
    pipeline.set_interfaces(["192.168.0.2", "fd00:c0::2"].map(|text| text.parse::<IpAddr>().unwrap()).to_vec());
    (pipeline, writes)
}

/// An agent that starts with these tables and finds these objects, and what it writes.
pub fn start<'a>(objects: impl IntoIterator<Item = &'a Object>, image: Image, now: u64) -> (Pipeline, Vec<Write>) {
    let (mut pipeline, mut writes) = agent(image);
    objects.into_iter().for_each(|object| _ = pipeline.take(Change::Upsert(object.clone())));
    writes.extend(pipeline.compile(now));
    writes.extend(pipeline.sweep(now));
    (pipeline, writes)
}

/// Panics where tables lack a bit that others have.
pub fn assert_bits(there: &Memory, needed: &Memory) {
    for (there, needed) in
        [(&there.frontend_bits, &needed.frontend_bits), (&there.endpoint_bits, &needed.endpoint_bits)]
    {
        assert!(needed.iter().all(|bit| there.contains(&bit)), "a bit is missing");
    }
}

/// Panics where two things are not the same, with what differs: both are long.
pub fn assert_same<T: PartialEq + fmt::Debug>(is: &T, should_be: &T) {
    if is != should_be {
        let [is, should_be] = [is, should_be].map(|it| format!("{it:#?}"));
        let (is, should_be): (Vec<&str>, Vec<&str>) = (is.lines().collect(), should_be.lines().collect());
        let same = |(a, b): &(&&str, &&str)| a == b;
        let start = is.iter().zip(&should_be).take_while(same).count();
        let end = is.iter().rev().zip(should_be.iter().rev()).take_while(same).count();
        let part = |lines: &[&str]| lines[start.saturating_sub(8)..(lines.len() - end).max(start)].join("\n");
        panic!("is\n{}\nand should be\n{}", part(&is), part(&should_be));
    }
}
