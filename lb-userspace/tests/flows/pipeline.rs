//! A case becomes the tables that an agent would make of it.

use std::collections::BTreeMap;

use fairlead::{
    image::Image,
    model::{Change, Interner, Object},
    pipeline::Pipeline,
    plan::node::{LocalDetector, NodeOptions, ProxyMode},
};
use lb_common::layout::{Device, device_flags};
use serde_json::Value;

use crate::{
    cases::{Case, Detector, Flow},
    objects::object,
};

/// What the operator of the case wishes.
pub fn options(case: &Case, mode: &str) -> NodeOptions {
    NodeOptions {
        mode: if mode == "iptables" { ProxyMode::Iptables } else { ProxyMode::Nftables },
        node_port_addresses: case.node_port_addresses(mode),
        localhost_node_ports: case.node.localhost_node_ports,
        detector: match &case.node.local_detector {
            None => LocalDetector::None,
            Some(Detector::ClusterCIDR { cidrs }) => {
                LocalDetector::ClusterCidr(cidrs.iter().map(|text| text.parse().unwrap()).collect())
            }
            Some(Detector::InterfaceNamePrefix { interface }) => LocalDetector::InterfaceNamePrefix(interface.clone()),
        },
        masquerade_all: case.node.masquerade_all,
        ..NodeOptions::default()
    }
}

/// Manifests as objects, with the Node and ServiceCIDR of the case.
pub fn objects(case: &Case, values: &[Value]) -> Vec<Object> {
    let mut interner = Interner::default();
    case.manifests(values).iter().map(|value| object(value, &mut interner)).collect()
}

/// Ifindex of an interface that a row names.
pub fn device(flow: &Flow) -> u32 {
    match flow.from_interface.as_deref() {
        None => 0,
        Some("eth0") => 1,
        Some(_) => 2,
    }
}

/// A pipeline that has seen no object yet.
pub fn empty(case: &Case, mode: &str) -> Pipeline {
    let options = options(case, mode);
    let names = case.flows.iter().filter_map(|flow| Some((device(flow), flow.from_interface.as_deref()?)));
    let local = |name: &str| if options.detector.takes_interface(name) { device_flags::LOCAL_SOURCES } else { 0 };
    let devices: BTreeMap<u32, Device> =
        names.map(|(ifindex, name)| (ifindex, Device { flags: local(name), ..Device::default() })).collect();
    let mut pipeline = Pipeline::new(&case.node.name, options, Image::default());
    pipeline.image_mut().set_devices(&devices);
    pipeline.set_interfaces(case.node.ips.clone());
    pipeline
}

/// The pipeline of a fresh start.
pub fn from_scratch(case: &Case, mode: &str) -> Pipeline {
    let mut pipeline = empty(case, mode);
    objects(case, &case.objects).into_iter().for_each(|object| _ = pipeline.take(Change::Upsert(object)));
    pipeline.compile(0);
    pipeline
}

/// The changes from the objects before to those of the case.
pub fn changes_from_previous(case: &Case) -> Vec<Change> {
    let key = |object: &Object| (object.kind(), object.name());
    let (before, after) = (objects(case, &case.previous_objects), objects(case, &case.objects));
    let keys: Vec<_> = after.iter().map(key).collect();
    let gone = before.iter().map(key).filter(|key| !keys.contains(key));
    let gone: Vec<Change> = gone.map(|(kind, name)| Change::Delete(kind, name)).collect();
    gone.into_iter().chain(after.into_iter().map(Change::Upsert)).collect()
}
