//! What a user reads of the real kube-proxy, built here, and of the agent in its place: the configuration that each writes and shows,
//! and every page that is served.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::control_plane::parts;
use tests::traffic::http::{Answer, ask};
use tests::{Agent, Client, ControlPlane, KubeProxy, Lab, Topology};

const METRICS: u16 = 10249;
const HEALTH: u16 = 10256;

/// Where kubeadm's and kind's ConfigMaps have it.
const KUBECONFIG: &str = "/var/lib/kube-proxy/kubeconfig.conf";

/// The questions and answers of `lb-userspace/tests/config`.
fn record(name: &str) -> Value {
    serde_json::from_str(&recorded(name)).unwrap()
}

fn recorded(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-userspace/tests/data/config");
    fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn what_is_on_record_of_kube_proxys_configuration_is_what_it_writes() {
    let program = parts::ensure(&parts::KUBE).unwrap();
    let (cases, answers) = (record("cases.json"), record("answers.json"));
    let [cases, answers] = [&cases, &answers].map(|list| list.as_array().unwrap());
    assert!(cases.len() > 60 && cases.len() == answers.len());
    let folder = tempfile::tempdir().unwrap();
    let (config, written) = (folder.path().join("config"), folder.path().join("written"));
    let mut wrong = Vec::new();
    for (case, answer) in cases.iter().zip(answers) {
        let _ = fs::remove_file(&written);
        let mut command = Command::new(&program);
        command.arg("kube-proxy");
        if let Some(text) = case["file"].as_str() {
            fs::write(&config, text).unwrap();
            command.arg("--config").arg(&config);
        }
        command.args(case["args"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()));
        command.arg("--write-config-to").arg(&written).output().unwrap();
        let text = fs::read_to_string(&written).ok();
        if text.as_deref() != answer.as_str() {
            wrong.push(format!("{case}: {text:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// Sections of a configuration file, each beside what every one has here.
fn configurations() -> Vec<Value> {
    vec![
        json!({}),
        json!({"mode": "nftables", "nftables": {"masqueradeAll": true, "syncPeriod": "9s", "minSyncPeriod": "2s"}}),
        json!({"mode": "iptables", "iptables": {"masqueradeBit": 3, "localhostNodePorts": false, "syncPeriod": "1m"}}),
        json!({"mode": "nftables", "nodePortAddresses": ["primary"], "clusterCIDR": "10.244.0.0/16,fd00:10:244::/48"}),
        json!({"nodePortAddresses": ["10.0.0.0/8", "fd00::/8"], "bindAddress": "::", "metricsBindAddress": "127.0.0.1:10249"}),
        json!({"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "veth"}}),
        json!({"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}, "configSyncPeriod": "1h"}),
        json!({"conntrack": {"maxPerCore": 0, "min": 5, "tcpEstablishedTimeout": "0s", "udpTimeout": "1m", "tcpBeLiberal": true}}),
        json!({"clientConnection": {"qps": 7.5, "burst": 20, "contentType": "application/json"}, "oomScoreAdj": 3, "logging": {"format": "json"}}),
        json!({"logging": {"verbosity": 3, "flushFrequency": "2s", "vmodule": [{"filePattern": "a", "verbosity": 2}]}}),
        json!({"featureGates": {"KubeProxyIPVS": true}, "showHiddenMetricsForVersion": "1.36", "enableProfiling": true}),
        json!({"ipvs": {"scheduler": "rr", "excludeCIDRs": ["10.0.0.0/8"], "strictARP": true, "tcpTimeout": "1s"}, "portRange": "1-2"}),
        json!({"winkernel": {"enableDSR": true, "sourceVip": "1.2.3.4"}, "windowsRunAsService": true, "bindAddressHardFail": true}),
    ]
}

/// Asks both for a page: the port, method and path, headers.
type Ask<'a> = dyn Fn(u16, &str, &[&str]) -> [Answer; 2] + 'a;

/// Both with one configuration, in network namespaces of their own, as the node of one name.
struct Both {
    lab: Lab,
    plane: ControlPlane,
}

impl Both {
    fn new() -> Self {
        let lab = Lab::new(Topology::default());
        let plane = ControlPlane::start(&lab);
        Self { lab, plane }
    }

    /// With a file that has these sections.
    fn run<T>(&self, sections: &Value, work: impl FnOnce(&Ask<'_>) -> T) -> T {
        let mut all = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "hostnameOverride": self.lab.node(1).name,
            "conntrack": {"maxPerCore": 0},
            "clientConnection": {"kubeconfig": self.plane.kubeconfig("proxy")},
        });
        for (name, section) in sections.as_object().unwrap() {
            match (all.get_mut(name).and_then(Value::as_object_mut), section.as_object()) {
                (Some(fields), Some(more)) => fields.extend(more.clone()),
                _ => all[name] = section.clone(),
            }
        }
        self.run_file(&all.to_string(), work)
    }

    /// With this file.
    fn run_file<T>(&self, text: &str, work: impl FnOnce(&Ask<'_>) -> T) -> T {
        let (ours, theirs) = (self.lab.node(1), self.lab.node(2));
        let file = self.lab.folder().join("configuration");
        fs::write(&file, text).unwrap();
        let agent = Agent::spawn_with_config(&self.lab, ours, &file).unwrap();
        let name = OsStr::new(&ours.name);
        let flags = ["--config".as_ref(), file.as_os_str(), "--hostname-override".as_ref(), name];
        let _proxy = KubeProxy::start_with(&self.lab, theirs, &flags).unwrap();
        self.asked(&agent, text, work)
    }

    /// With this command line.
    fn run_flags<T>(&self, flags: &[&str], work: impl FnOnce(&Ask<'_>) -> T) -> T {
        let (ours, theirs) = (self.lab.node(1), self.lab.node(2));
        let (kubeconfig, what) = (self.plane.kubeconfig("proxy"), flags.join(" "));
        let flags = [flags, &["--conntrack-max-per-core=0"]].concat();
        let agent = Agent::spawn_on_api_server(&self.lab, ours, &kubeconfig, &flags).unwrap();
        let (kubeconfig, name) = (kubeconfig.display().to_string(), &*ours.name);
        let flags = [&["--kubeconfig", &kubeconfig, "--hostname-override", name], &*flags].concat();
        let flags: Vec<&OsStr> = flags.into_iter().map(OsStr::new).collect();
        let _proxy = KubeProxy::start_with(&self.lab, theirs, &flags).unwrap();
        self.asked(&agent, &what, work)
    }

    fn asked<T>(&self, agent: &Agent, what: &str, work: impl FnOnce(&Ask<'_>) -> T) -> T {
        let (ours, theirs) = (self.lab.node(1), self.lab.node(2));
        let start = Instant::now();
        let answers = |port: u16, request: &str, headers: &[&str]| {
            [ours, theirs].map(|node| {
                let (client, to) = (Client::new(&node.netns), SocketAddr::from(([127, 0, 0, 1], port)));
                loop {
                    match ask(&client, to, request, headers) {
                        Ok(answer) => break answer,
                        Err(error) if start.elapsed() > Duration::from_secs(30) => {
                            panic!("{what}: {}: {request}: {error:#}\n{}", node.name, agent.log_since_start())
                        }
                        Err(_) => thread::sleep(Duration::from_millis(50)),
                    }
                }
            })
        };
        work(&answers)
    }
}

/// The places where two trees differ.
fn differences(path: &str, ours: &Value, theirs: &Value, wrong: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
            for name in names {
                let [ours, theirs] = [ours, theirs].map(|fields| fields.get(name).unwrap_or(&Value::Null));
                differences(&format!("{path}.{name}"), ours, theirs, wrong);
            }
        }
        _ if ours == theirs => {}
        _ => wrong.push(format!("{path} is {ours}, and kube-proxy's {theirs}")),
    }
}

/// Where the configurations that both show differ.
fn shown_differences(what: &str, answers: &Ask<'_>) -> Vec<String> {
    let shown = answers(METRICS, "GET /configz", &[]);
    let [ours, theirs]: [Value; 2] = shown.map(|answer| serde_json::from_str(&answer.body).unwrap());
    let mut wrong = Vec::new();
    differences("", &ours, &theirs, &mut wrong);
    wrong.into_iter().map(|wrong| format!("{what}: {wrong}")).collect()
}

#[test]
fn the_configuration_in_force_is_shown_as_kube_proxy_shows_it() {
    let both = Both::new();
    let mut wrong = Vec::new();
    for sections in configurations() {
        wrong.extend(both.run(&sections, |answers| shown_differences(&sections.to_string(), answers)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_configuration_of_command_lines_and_of_cluster_makers_is_shown_as_kube_proxy_shows_it() {
    let both = Both::new();
    let kubeconfig = both.plane.kubeconfig("proxy").display().to_string();
    let (cases, answers) = (record("cases.json"), record("answers.json"));
    let (mut asked, mut wrong) = (0, Vec::new());
    for (case, answer) in cases.as_array().unwrap().iter().zip(answers.as_array().unwrap()) {
        let flags: Vec<&str> = case["args"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        let Some(answer) = answer.as_str().filter(|_| case.get("difference").is_none()) else { continue };
        // What is on the list of differences, is a file, names its own node and API server, has the page elsewhere or not at all, or
        // needs IPVS of the kernel, is compared as it is written only.
        let is_reachable = ["127.0.0.1", "0.0.0.0"]
            .iter()
            .any(|address| answer.contains(&format!("metricsBindAddress: {address}:10249\n")));
        let names_its_own =
            |flag: &&str| ["--kubeconfig", "--hostname-override", "--metrics-"].iter().any(|own| flag.starts_with(own));
        if !is_reachable
            || answer.contains("mode: ipvs\n")
            || case["file"].is_string()
            || flags.iter().any(names_its_own)
        {
            continue;
        }
        wrong.extend(both.run_flags(&flags, |answers| shown_differences(&format!("{flags:?}"), answers)));
        asked += 1;
    }
    assert!(asked > 25, "{asked}");
    // As they are, but for where the kubeconfig is, and what no network namespace but the first may write.
    for name in ["kubeadm.conf", "kind.conf"] {
        let file = recorded(name).replace(KUBECONFIG, &kubeconfig).replace("maxPerCore: null", "maxPerCore: 0");
        assert!(file.contains(&kubeconfig) && file.contains("maxPerCore: 0"), "{file}");
        wrong.extend(both.run_file(&file, |answers| shown_differences(name, answers)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_page_is_served_as_kube_proxy_serves_it() {
    // Their bodies say when and who; what is in them has tests of its own.
    let varying = ["/metrics", "/metrics/slis", "/statusz", "/flagz", "/healthz", "/livez", "/configz"];
    let both = Both::new();
    both.run(&json!({"mode": "nftables"}), |answers| {
        let start = Instant::now();
        while answers(HEALTH, "GET /healthz", &[]).iter().any(|answer| answer.code != 200) {
            assert!(start.elapsed() < Duration::from_secs(30), "{:?}", answers(HEALTH, "GET /healthz", &[]));
            thread::sleep(Duration::from_millis(100));
        }
        let mut wrong = Vec::new();
        let mut compare = |port: u16, request: &str, headers: &[&str]| {
            let path = request.split([' ', '?']).nth(1).unwrap();
            let shown = answers(port, request, headers).map(|answer| {
                let told = |name: &str| !["date", "content-length", "process-start-time-unix"].contains(&name);
                let headers: BTreeMap<String, String> =
                    answer.headers.into_iter().filter(|(name, _)| told(name)).collect();
                let is_object = ["/statusz", "/flagz"].contains(&path);
                let body = match (answer.code, varying.contains(&path)) {
                    // How it is written shows at its beginning.
                    (200, true) if is_object => answer.body.chars().take(40).collect(),
                    (200, true) => String::new(),
                    _ => answer.body,
                };
                (answer.code, headers, body)
            });
            if shown[0] != shown[1] {
                wrong.push(format!("{port} {request} {headers:?}:\n  {:?}\n  {:?}", shown[0], shown[1]));
            }
        };
        for method in ["GET", "HEAD", "POST"] {
            for path in ["/healthz", "/livez", "/", "/metrics", "/readyz"] {
                compare(HEALTH, &format!("{method} {path}"), &[]);
            }
            for path in [
                "/healthz",
                "/healthz/ping",
                "/healthz/other",
                "/healthz?verbose",
                "/livez",
                "/metrics",
                "/metrics/slis",
                "/proxyMode",
                "/proxyMode/",
                "/configz",
                "/statusz",
                "/flagz",
                "/",
                "/debug/pprof/",
                "/debug/flags/v",
            ] {
                compare(METRICS, &format!("{method} {path}"), &[]);
            }
        }
        for accept in
            ["text/plain", "application/json", "*/*", "application/yaml", "text/html", "application/*", "image/png"]
        {
            for (path, kind) in [("/statusz", "Statusz"), ("/flagz", "Flagz")] {
                for version in ["v1alpha1", "v1beta1"] {
                    let accept = format!("Accept: {accept};v={version};g=config.k8s.io;as={kind}");
                    compare(METRICS, &format!("GET {path}"), &[&accept]);
                }
                compare(METRICS, &format!("GET {path}"), &[&format!("Accept: {accept}")]);
                let curl = [&*format!("Accept: {accept}"), "User-Agent: curl/8.0"];
                compare(METRICS, &format!("GET {path}"), &curl);
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
