//! `fairlead explain --manifests` as a process: every case of `data/flows.json`, and what people type.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::cases::{self, Case, Detector, Expect, Flow};
use serde_json::{Value, json};

fn explain(dir: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fairlead"))
        .arg("explain")
        .arg("--manifests")
        .arg(dir)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn config(case: &Case, mode: &str) -> Value {
    let mut config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "nodePortAddresses": case.node_port_addresses(mode),
        "hostnameOverride": "",
        "iptables": { "masqueradeAll": case.node.masquerade_all, "localhostNodePorts": case.node.localhost_node_ports },
        "nftables": { "masqueradeAll": case.node.masquerade_all, "syncPeriod": "0s" },
        "conntrack": null,
    });
    match &case.node.local_detector {
        None => {}
        Some(Detector::ClusterCIDR { cidrs }) => config["clusterCIDR"] = cidrs.join(",").into(),
        Some(Detector::InterfaceNamePrefix { interface }) => {
            config["detectLocalMode"] = "InterfaceNamePrefix".into();
            config["detectLocal"] = json!({ "interfaceNamePrefix": interface });
        }
    }
    config
}

fn line(flow: &Flow) -> String {
    let Flow { from, to, port, protocol, from_interface, .. } = flow;
    let mut packet = json!({ "from": from, "to": to, "port": port, "protocol": protocol });
    if let Some(name) = from_interface {
        packet["from_interface"] = name.as_str().into();
    }
    packet.to_string()
}

/// A folder with a case's manifests and configuration beside it.
fn folder(case: &Case, mode: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("manifests")).unwrap();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": case.manifests(&case.objects) });
    std::fs::write(dir.path().join("manifests/all.json"), list.to_string()).unwrap();
    std::fs::write(dir.path().join("config.conf"), config(case, mode).to_string()).unwrap();
    dir
}

#[test]
fn the_process_says_what_kube_proxy_does() {
    let cases: Vec<Case> = cases::all().into_iter().chain(cases::with_other_node_ports()).collect();
    for mode in ["iptables", "nftables"] {
        let (mut rows, mut agreeing) = (0, 0);
        for case in cases.iter().filter(|case| case.applies_to.iter().any(|it| it == mode)) {
            let dir = folder(case, mode);
            let flows: Vec<&Flow> = case.flows.iter().filter(|flow| flow.is_of(mode)).collect();
            let lines: Vec<String> = flows.iter().map(|flow| line(flow)).collect();
            let config = dir.path().join("config.conf").to_str().unwrap().to_owned();
            let mut arguments =
                vec!["--config", &config, "--hostname-override", &case.node.name, "--packets", "-", "--output", "json"];
            let addresses: Vec<String> = case.node.ips.iter().map(ToString::to_string).collect();
            addresses.iter().for_each(|address| arguments.extend(["--local-address", address]));
            let output = explain(&dir.path().join("manifests"), &arguments, &lines.join("\n"));
            let text = String::from_utf8(output.stdout).unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {errors}", case.id);
            let answers: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(answers.len(), flows.len(), "{}", case.id);
            for (flow, answer) in flows.iter().zip(answers) {
                rows += 1;
                let found: Expect = serde_json::from_value(answer.clone()).unwrap();
                if flow.accepts(found) {
                    agreeing += 1;
                } else {
                    eprintln!("{mode} {} {}: {answer} instead of {:?}", case.id, flow.name, flow.expect);
                }
            }
        }
        println!("{mode}, by explain: {agreeing} of {rows} rows agree");
        assert_eq!(agreeing, rows);
    }
}

fn overall() -> tempfile::TempDir {
    folder(&cases::all()[0], "nftables")
}

#[test]
fn a_packet_in_words_is_answered_in_a_paragraph() {
    let dir = overall();
    let arguments = ["--hostname-override", "test-node", "tcp", "10.180.0.4:40000", "172.30.0.44:80"];
    let output = explain(&dir.path().join("manifests"), &arguments, "");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "TCP from 10.180.0.4 to 172.30.0.44:80 is sent on. The Service is ns4/svc4:p80. One of these 2 endpoints gets it: \
         10.180.0.4:80, 10.180.0.5:80. The endpoint sees the client's own address, but 10.180.0.4:80 sees this node's.\n"
    );
}

#[test]
fn the_json_form_has_the_documented_fields() {
    let dir = overall();
    let packets = r#"{"from":"10.180.0.4","to":"172.30.0.44","port":80,"protocol":"TCP"}

{"from":"203.0.113.1","to":"172.30.0.99","port":80,"protocol":"UDP"}
"#;
    let arguments = ["--hostname-override", "test-node", "--packets", "-", "--output", "json"];
    let output = explain(&dir.path().join("manifests"), &arguments, packets);
    let want = r#"{"verdict":"dnat","endpoints":["10.180.0.4:80","10.180.0.5:80"],"masquerade":false,"hairpin":["10.180.0.4:80"],"service":"ns4/svc4:p80","reason":"new_flow"}
{"verdict":"drop","endpoints":[],"masquerade":false,"service":null,"reason":"unallocated"}
"#;
    assert_eq!(String::from_utf8(output.stdout).unwrap(), want);
}

#[test]
fn what_can_not_be_answered_is_an_error_that_says_why() {
    let dir = overall();
    let manifests = dir.path().join("manifests");
    for (arguments, input, code, words) in [
        (&["--packets", "-"][..], "{}", 1, "-, line 1: not a packet; write it like"),
        (&["--packets", "/nowhere/packets"], "", 1, "/nowhere/packets can't be read"),
        (&["tcp", "10.0.0.1", "10.0.0.2"], "", 2, "`10.0.0.2` has no port"),
        (&["tcp", "10.0.0.1"], "", 2, "required"),
        (&[], "", 2, "required"),
        (&["--config", "/nowhere/config", "tcp", "10.0.0.1", "10.0.0.2:80"], "", 1, "/nowhere/config can't be read"),
    ] {
        let output = explain(&manifests, &[&["--hostname-override", "test-node"], arguments].concat(), input);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(words), "{arguments:?}: {errors}");
    }
}
