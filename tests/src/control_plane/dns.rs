//! The cluster's name server. In: a control plane. Out: CoreDNS beside the API server, behind the Service `kube-dns`, which has the
//! address that kubelets tell their Pods.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::{ControlPlane, parts};
use crate::topology::{SWITCH_V4, SWITCH_V6};

/// The Service's IPv4 address.
pub const ADDRESS: &str = "10.96.0.10";

/// Where it says that it is ready.
const READY: &str = "127.0.0.1:8181";

/// Starts it and waits until it answers.
pub fn start(plane: &mut ControlPlane) -> Result<()> {
    let corefile = plane.folder.join("Corefile");
    let text = format!(
        ".:53 {{
  errors
  ready {READY}
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {}
    pods insecure
    ttl 5
  }}
  cache 5
  loadbalance
}}
",
        plane.kubeconfig("controllers").display()
    );
    fs::write(&corefile, text).context("writing the Corefile")?;
    let mut command = Command::new(parts::ensure(&parts::COREDNS)?);
    command.arg("-conf").arg(corefile);
    plane.spawn_command("coredns", command)?;

    let metadata = |name: &str| json!({"name": name, "namespace": "kube-system"});
    let ports =
        json!([{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]);
    let api = plane.api();
    api.put(json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata("kube-dns"), "spec": {
        "clusterIPs": [ADDRESS, "fd00:10:96::a"], "clusterIP": ADDRESS, "ipFamilyPolicy": "RequireDualStack", "ports": ports,
    }}));
    for (family, address) in [("IPv4", SWITCH_V4.to_string()), ("IPv6", SWITCH_V6.to_string())] {
        let mut metadata = metadata(&format!("kube-dns-{}", family.to_lowercase()));
        metadata["labels"] = json!({"kubernetes.io/service-name": "kube-dns"});
        api.put(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
            "addressType": family, "ports": ports, "endpoints": [{"addresses": [address]}]}));
    }
    let netns = plane.netns.clone();
    plane.wait_for("the name server", || netns.run(|| ready().is_ok_and(|answer| answer.contains(" 200 "))))
}

/// The answer to one HTTP request.
fn ready() -> std::io::Result<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(READY)?;
    stream.write_all(b"GET /ready HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
