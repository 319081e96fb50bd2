//! Manifests. In: a few names and addresses. Out: JSON objects (which are YAML too) in a folder, each file replaced by rename.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::lab::{Node, Pod};
use crate::topology;

/// A folder of manifests that agents watch.
#[derive(Clone, Debug)]
pub struct Manifests {
    path: PathBuf,
}

impl Manifests {
    /// A folder that exists.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one object, or replaces what the file said before in one step.
    pub fn write(&self, file: &str, object: impl Into<Value>) {
        self.write_text(file, &format!("{:#}\n", object.into()));
    }

    /// Writes several objects as one `List`.
    pub fn write_list(&self, file: &str, objects: impl IntoIterator<Item = impl Into<Value>>) {
        let items: Vec<Value> = objects.into_iter().map(Into::into).collect();
        self.write(file, json!({"apiVersion": "v1", "kind": "List", "items": items}));
    }

    /// Writes text as it is.
    pub fn write_text(&self, file: &str, text: &str) {
        write_by_rename(&self.path.join(file), text)
            .unwrap_or_else(|error| panic!("writing {file} in {}: {error}", self.path.display()));
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) {
        fs::remove_file(self.path.join(file))
            .unwrap_or_else(|error| panic!("removing {file} in {}: {error}", self.path.display()));
    }
}

/// Replaces a file in one step; the new text is complete before it has the name. Returns the moment before it got it.
pub fn write_by_rename(path: &Path, text: &str) -> io::Result<SystemTime> {
    // A leading dot keeps the half-written file out of the sight of those who watch the folder.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let half = path.with_file_name(format!(".{name}.new"));
    fs::write(&half, text)?;
    let complete = SystemTime::now();
    fs::rename(half, path)?;
    Ok(complete)
}

/// A Service in the making: of type ClusterIP, in namespace `default`, without ports.
#[derive(Clone, Debug)]
pub struct Service {
    object: Value,
}

impl Service {
    /// A Service without selector and ports.
    pub fn new(name: &str) -> Self {
        let metadata = json!({"name": name, "namespace": "default", "uid": format!("uid-{name}")});
        let spec = json!({"type": "ClusterIP", "ports": []});
        Self { object: json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}) }
    }

    /// In another namespace.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.object["metadata"]["namespace"] = namespace.into();
        self
    }

    /// Adds a pair to the selector.
    pub fn selector(mut self, key: &str, value: &str) -> Self {
        self.object["spec"]["selector"][key] = value.into();
        self
    }

    /// Its ClusterIPs, primary first.
    pub fn cluster_ips(mut self, addresses: &[IpAddr]) -> Self {
        let families: Vec<&str> =
            addresses.iter().map(|address| if address.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
        let spec = &mut self.object["spec"];
        spec["clusterIP"] = addresses.first().map(ToString::to_string).into();
        spec["clusterIPs"] = addresses.iter().map(ToString::to_string).collect();
        spec["ipFamilies"] = json!(families);
        spec["ipFamilyPolicy"] = if addresses.len() > 1 { "PreferDualStack" } else { "SingleStack" }.into();
        self
    }

    /// The usual pair of ClusterIPs, 10.96.0.N and fd00:10:96::N.
    pub fn dual_stack(self, number: u16) -> Self {
        let [high, low] = number.to_be_bytes();
        let v4 = std::net::Ipv4Addr::new(10, 96, high, low);
        let v6 = std::net::Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number);
        self.cluster_ips(&[v4.into(), v6.into()])
    }

    /// Adds a port; `target` is a number or a name of a container's port.
    pub fn port(self, name: &str, protocol: &str, port: u16, target: impl Into<Value>) -> Self {
        self.push(json!({"name": name, "protocol": protocol, "port": port, "targetPort": target.into()}))
    }

    /// Adds a port that is a NodePort too.
    pub fn node_port(
        mut self,
        name: &str,
        protocol: &str,
        port: u16,
        target: impl Into<Value>,
        node_port: u16,
    ) -> Self {
        if self.object["spec"]["type"] == "ClusterIP" {
            self.object["spec"]["type"] = "NodePort".into();
        }
        let target = target.into();
        self.push(
            json!({"name": name, "protocol": protocol, "port": port, "targetPort": target, "nodePort": node_port}),
        )
    }

    /// Makes it a LoadBalancer with these addresses.
    pub fn load_balancer(mut self, addresses: &[IpAddr]) -> Self {
        let ingress: Vec<Value> = addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
        self.object["spec"]["type"] = "LoadBalancer".into();
        self.object["status"] = json!({"loadBalancer": {"ingress": ingress}});
        self
    }

    /// Its externalIPs.
    pub fn external_ips(self, addresses: &[IpAddr]) -> Self {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        self.spec("externalIPs", json!(addresses))
    }

    /// Sets any field of the spec.
    pub fn spec(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.object["spec"][field] = value.into();
        self
    }

    fn push(mut self, port: Value) -> Self {
        if let Some(ports) = self.object["spec"]["ports"].as_array_mut() {
            ports.push(port);
        }
        self
    }
}

impl From<Service> for Value {
    fn from(service: Service) -> Self {
        service.object
    }
}

/// A Pod object in the making: Running and Ready, in namespace `default`.
#[derive(Clone, Debug)]
pub struct PodObject {
    object: Value,
}

impl PodObject {
    /// The object of a lab's pod.
    pub fn of(pod: &Pod) -> Self {
        Self::new(&pod.name, &pod.node, &[pod.v4.into(), pod.v6.into()])
    }

    /// The object of a hostNetwork pod on a node, called as the node.
    pub fn on_host(node: &Node) -> Self {
        let mut pod = Self::new(&node.name, &node.name, &[node.v4().into(), node.v6().into()]);
        pod.object["spec"]["hostNetwork"] = true.into();
        pod
    }

    /// Any pod.
    pub fn new(name: &str, node: &str, addresses: &[IpAddr]) -> Self {
        let ips: Vec<Value> = addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
        Self {
            object: json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "labels": {}},
                "spec": {"nodeName": node, "containers": [{"name": "server", "ports": []}]},
                "status": {
                    "phase": "Running",
                    "podIP": addresses.first().map(ToString::to_string),
                    "podIPs": ips,
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }),
        }
    }

    /// In another namespace.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.object["metadata"]["namespace"] = namespace.into();
        self
    }

    /// Adds a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.object["metadata"]["labels"][key] = value.into();
        self
    }

    /// Names a port of its container.
    pub fn container_port(mut self, name: &str, protocol: &str, port: u16) -> Self {
        if let Some(ports) = self.object["spec"]["containers"][0]["ports"].as_array_mut() {
            ports.push(json!({"name": name, "protocol": protocol, "containerPort": port}));
        }
        self
    }

    /// Whether it is Ready.
    pub fn ready(mut self, ready: bool) -> Self {
        self.object["status"]["conditions"][0]["status"] = if ready { "True" } else { "False" }.into();
        self
    }

    /// Being deleted.
    pub fn terminating(mut self) -> Self {
        self.object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        self
    }

    /// Its phase.
    pub fn phase(mut self, phase: &str) -> Self {
        self.object["status"]["phase"] = phase.into();
        self
    }
}

impl From<PodObject> for Value {
    fn from(pod: PodObject) -> Self {
        pod.object
    }
}

/// The Node object of a lab's node: addresses, pod networks, hostname and zone labels.
pub fn node_object(node: &Node) -> Value {
    let number = node.number;
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": {
            "kubernetes.io/hostname": node.name,
            "topology.kubernetes.io/zone": format!("zone-{number}"),
        }},
        "spec": {
            "podCIDR": format!("10.244.{number}.0/24"),
            "podCIDRs": [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")],
        },
        "status": {"addresses": [
            {"type": "InternalIP", "address": topology::node_v4(number).to_string()},
            {"type": "InternalIP", "address": topology::node_v6(number).to_string()},
            {"type": "Hostname", "address": node.name},
        ]},
    })
}

/// An EndpointSlice of one family; the pods are given with their addresses and conditions.
pub fn endpoint_slice(name: &str, service: &str, ports: &[(&str, &str, u16)], endpoints: &[SliceEndpoint]) -> Value {
    let v6 = endpoints.first().is_some_and(|endpoint| endpoint.address.is_ipv6());
    let ports: Vec<Value> =
        ports.iter().map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port})).collect();
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| {
            let mut conditions = Map::new();
            conditions.insert("ready".to_owned(), (endpoint.serving && !endpoint.terminating).into());
            conditions.insert("serving".to_owned(), endpoint.serving.into());
            conditions.insert("terminating".to_owned(), endpoint.terminating.into());
            json!({
                "addresses": [endpoint.address.to_string()],
                "nodeName": endpoint.node,
                "conditions": conditions,
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    })
}

/// An endpoint of [`endpoint_slice`].
#[derive(Clone, Debug)]
pub struct SliceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its node.
    pub node: String,
    /// Whether it answers.
    pub serving: bool,
    /// Whether it is being deleted.
    pub terminating: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_carries_what_its_builder_was_told() {
        let service = Value::from(
            Service::new("web").selector("app", "web").dual_stack(258).node_port("http", "TCP", 80, "http", 30080),
        );
        assert_eq!(service["spec"]["type"], "NodePort");
        assert_eq!(service["spec"]["clusterIPs"], json!(["10.96.1.2", "fd00:10:96::102"]));
        assert_eq!(service["spec"]["ports"][0]["targetPort"], "http");
        assert_eq!(service["spec"]["selector"], json!({"app": "web"}));
    }
}
