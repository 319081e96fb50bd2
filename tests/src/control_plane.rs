//! Kubernetes' own control plane, in the lab's switch, where every node reaches it. In: a lab. Out: etcd, API server and controllers
//! that run, kubeconfigs for their users, an [`Api`] for the test. Never here: a kubelet. Tests say themselves what Pods are like, or
//! start a [`crate::Kubelet`] beside it.

mod api;
mod dns;
mod keys;
pub mod parts;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

pub use self::api::Api;
use crate::lab::Lab;
use crate::netns::Netns;
use crate::topology::{SWITCH_V4, SWITCH_V6};

/// Where nodes find the API server.
pub const PORT: u16 = 6443;

/// How long a part may take to come up on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// The part of etcd that tests speak to themselves.
const ETCD: &str = "127.0.0.1:2379";

/// Every user by name, with its group; the token is the name.
const USERS: [(&str, &str, &str); 5] = [
    ("admin", "admin", "system:masters"),
    // All controllers as one user, which spares each its own service account.
    ("controllers", "controllers", "system:masters"),
    // What a kubelet may do is not what is tested.
    ("kubelet", "kubelet", "system:masters"),
    // What kube-proxy is to the API server: ClusterRole system:node-proxier, by a binding that every API server makes.
    ("proxy", "system:kube-proxy", ""),
    // Nobody, until a test grants it something.
    ("other", "other", ""),
];

/// A control plane that runs.
#[derive(Debug)]
pub struct ControlPlane {
    binary: PathBuf,
    netns: Netns,
    folder: PathBuf,
    nodes: Nodes,
    processes: BTreeMap<&'static str, Child>,
}

/// Who says what Nodes and Pods are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nodes {
    /// The test.
    Written,
    /// Kubelets.
    Run,
}

/// The controllers that make endpoints of Pods, and clean up.
const CONTROLLERS: &str = "endpoints-controller,endpointslice-controller,endpointslice-mirroring-controller,\
     serviceaccount-controller,namespace-controller,garbage-collector-controller";

/// Those that make Pods besides, and look after them and their nodes.
const POD_CONTROLLERS: &str = "serviceaccount-token-controller,root-ca-certificate-publisher-controller,\
     replicationcontroller-controller,replicaset-controller,deployment-controller,daemonset-controller,statefulset-controller,\
     job-controller,disruption-controller,resourcequota-controller,node-lifecycle-controller,taint-eviction-controller,\
     pod-garbage-collector-controller,service-cidr-controller";

impl ControlPlane {
    /// Starts it in the lab. Panics with the reason when that can't be done: nothing can be tested then.
    pub fn start(lab: &Lab) -> Self {
        Self::build(lab).unwrap_or_else(|error| panic!("starting the control plane: {error:#}"))
    }

    /// Starts it in the lab, with a Node object for each node.
    pub fn build(lab: &Lab) -> Result<Self> {
        let plane = Self::build_for(lab, Nodes::Written)?;
        for node in &lab.nodes {
            plane.api().put(crate::manifest::node_object(node));
        }
        Ok(plane)
    }

    /// Starts it with a scheduler, a name server and what else kubelets and their Pods need.
    pub fn build_for_kubelets(lab: &Lab) -> Result<Self> {
        let mut plane = Self::build_for(lab, Nodes::Run)?;
        let kubeconfig = format!("--kubeconfig={}", plane.kubeconfig("controllers").display());
        plane.spawn("kube-scheduler", &[kubeconfig, "--leader-elect=false".to_owned()])?;
        dns::start(&mut plane)?;
        Ok(plane)
    }

    fn build_for(lab: &Lab, nodes: Nodes) -> Result<Self> {
        let binary = parts::ensure(&parts::KUBE)?;
        let folder = lab.folder().join("control-plane");
        fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
        keys::make_authority(&folder)?;
        keys::make_accounts(&folder)?;
        let mut tokens = String::new();
        for (token, user, groups) in USERS {
            tokens += &format!("{token},{user},{token},{groups}\n");
            fs::write(folder.join(format!("{token}.kubeconfig")), kubeconfig(&folder, token))?;
        }
        fs::write(folder.join("tokens.csv"), tokens)?;
        let mut plane = Self { binary, netns: lab.switch.clone(), folder, nodes, processes: BTreeMap::new() };
        plane.start_etcd()?;
        plane.start_api_server()?;
        plane.start_controllers()?;
        let api = plane.api();
        plane.wait_for("the controllers", || api.get("/api/v1/namespaces/default/serviceaccounts/default").is_ok())?;
        Ok(plane)
    }

    /// What the test itself says to the API server, as its administrator.
    pub fn api(&self) -> Api {
        Api::new(&self.netns, &self.kubeconfig("admin"))
    }

    /// Where the API server is, for Pods in the network of their node.
    pub fn server(&self) -> String {
        format!("https://{SWITCH_V4}:{PORT}")
    }

    /// The address of the name server's Service.
    pub fn dns(&self) -> &'static str {
        dns::ADDRESS
    }

    /// The namespace it runs in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The kubeconfig of a user: `admin`, `kubelet`, `proxy`, `other`.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// A token of a service account, which is there already.
    pub fn token_of_account(&self, namespace: &str, name: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token");
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
        let answer = self.api().create(&path, &request)?;
        answer["status"]["token"].as_str().context("a TokenRequest is answered by a token").map(str::to_owned)
    }

    /// The kubeconfig of a service account, which is there already.
    pub fn kubeconfig_of_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let token = self.token_of_account(namespace, name)?;
        let file = self.folder.join(format!("{namespace}-{name}.kubeconfig"));
        fs::write(&file, kubeconfig(&self.folder, &token)).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    /// Runs kubectl as the administrator, with something on its standard input.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<Output> {
        let mut command = Command::new(parts::ensure(&parts::KUBECTL)?);
        self.netns.apply(&mut command)?;
        command.arg("--kubeconfig").arg(self.kubeconfig("admin")).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("running kubectl")?;
        child
            .stdin
            .take()
            .context("kubectl has an input")?
            .write_all(input.as_bytes())
            .context("writing to kubectl")?;
        Ok(child.wait_with_output()?)
    }

    /// Starts the API server, and waits until it is ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        let key = |name: &str| self.folder.join(name).display().to_string();
        let mut arguments = vec![format!("--etcd-servers=http://{ETCD}"), format!("--advertise-address={SWITCH_V4}")];
        for (flag, file) in [
            ("tls-cert-file", "api.crt"),
            ("tls-private-key-file", "api.key"),
            ("client-ca-file", "ca.crt"),
            ("token-auth-file", "tokens.csv"),
            ("service-account-key-file", "accounts.pub"),
            ("service-account-signing-key-file", "accounts.key"),
        ] {
            arguments.push(format!("--{flag}={}", key(file)));
        }
        arguments.extend(
            [
                "--bind-address=::",
                "--secure-port=6443",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--authorization-mode=RBAC",
                "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/108",
                "--enable-priority-and-fairness=false",
                "--allow-privileged",
            ]
            .map(str::to_owned),
        );
        let more: &[&str] = match self.nodes {
            // Tests make Pods without service accounts.
            Nodes::Written => &["--disable-admission-plugins=ServiceAccount"],
            // Nobody resolves the names of nodes.
            Nodes::Run => &["--kubelet-preferred-address-types=InternalIP"],
        };
        arguments.extend(more.iter().map(|flag| (*flag).to_owned()));
        self.spawn("kube-apiserver", &arguments)?;
        let api = self.api();
        self.wait_for("the API server", || api.text("/readyz").is_ok_and(|text| text == "ok"))
    }

    /// Ends the API server at once, with every connection to it.
    pub fn kill_api_server(&mut self) {
        self.end("kube-apiserver");
    }

    /// The CA's certificate.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Restarts the API server with another key for tokens of service accounts: those that it gave out are worth nothing any more.
    pub fn revoke_tokens(&mut self) -> Result<()> {
        self.kill_api_server();
        keys::make_accounts(&self.folder)?;
        self.start_api_server()
    }

    /// Restarts the API server with a certificate of another CA. The controllers, which know the old one, are lost.
    pub fn replace_authority(&mut self) -> Result<()> {
        self.kill_api_server();
        keys::make_authority(&self.folder)?;
        self.start_api_server()
    }

    /// Forgets all versions but the current one, as etcd does after five minutes.
    pub fn compact(&self) {
        let status = self.ask_etcd("/v3/maintenance/status", "{}");
        let number = |text: &str| -> Option<u64> {
            let (_, rest) = text.split_once("\"revision\":\"")?;
            rest.split('"').next()?.parse().ok()
        };
        let revision = number(&status).unwrap_or_else(|| panic!("etcd says no revision: {status}"));
        let answer = self.ask_etcd("/v3/kv/compaction", &json!({"revision": revision, "physical": true}).to_string());
        // Nothing may have changed since the last time.
        let is_forgotten = answer.starts_with("HTTP/1.1 200") || answer.contains("has been compacted");
        assert!(is_forgotten, "etcd doesn't compact: {answer}");
    }

    fn start_etcd(&mut self) -> Result<()> {
        let data = self.folder.join("etcd").display().to_string();
        let arguments = [
            "--name=lab".to_owned(),
            format!("--data-dir={data}"),
            format!("--listen-client-urls=http://{ETCD}"),
            format!("--advertise-client-urls=http://{ETCD}"),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            "--initial-advertise-peer-urls=http://127.0.0.1:2380".to_owned(),
            "--initial-cluster=lab=http://127.0.0.1:2380".to_owned(),
            // What a lab says need not survive it.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        self.spawn("etcd", &arguments)
    }

    fn start_controllers(&mut self) -> Result<()> {
        let mut arguments = vec![
            format!("--kubeconfig={}", self.kubeconfig("controllers").display()),
            "--leader-elect=false".to_owned(),
            "--kube-api-qps=500".to_owned(),
            "--kube-api-burst=1000".to_owned(),
        ];
        match self.nodes {
            Nodes::Written => arguments.push(format!("--controllers={CONTROLLERS}")),
            Nodes::Run => {
                arguments.push(format!("--controllers={CONTROLLERS},{POD_CONTROLLERS}"));
                for (flag, file) in [("service-account-private-key-file", "accounts.key"), ("root-ca-file", "ca.crt")] {
                    arguments.push(format!("--{flag}={}", self.folder.join(file).display()));
                }
            }
        }
        self.spawn("kube-controller-manager", &arguments)
    }

    fn spawn(&mut self, part: &'static str, arguments: &[String]) -> Result<()> {
        let mut command = Command::new(&self.binary);
        command.arg(part).args(arguments);
        self.spawn_command(part, command)
    }

    fn spawn_command(&mut self, part: &'static str, mut command: Command) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log(part))?;
        self.netns.apply(&mut command)?;
        command.current_dir(&self.folder);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.processes.insert(part, command.spawn().with_context(|| format!("starting {part}"))?);
        Ok(())
    }

    fn wait_for(&mut self, what: &str, ready: impl Fn() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            for (part, child) in &mut self.processes {
                if let Some(status) = child.try_wait()? {
                    bail!("{part} ended with {status}; its log:\n{}", log_tail(&self.folder, part));
                }
            }
            let logs = || self.processes.keys().map(|part| log_tail(&self.folder, part)).collect::<Vec<_>>().join("\n");
            ensure!(start.elapsed() < PATIENCE, "{what} is not ready after {PATIENCE:?}; logs:\n{}", logs());
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn end(&mut self, part: &str) {
        if let Some(mut child) = self.processes.remove(part) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn log(&self, part: &str) -> PathBuf {
        self.folder.join(format!("{part}.log"))
    }

    /// One request to etcd's JSON gateway, which speaks plain HTTP, and the whole answer.
    fn ask_etcd(&self, path: &str, body: &str) -> String {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(ETCD)?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        self.netns.run(ask).unwrap_or_else(|error| panic!("asking etcd for {path}: {error}"))
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of the API server:\n{}", log_tail(&self.folder, "kube-apiserver"));
        }
        // Who depends on the others ends before them.
        for part in ["coredns", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"] {
            self.end(part);
        }
    }
}

fn log_tail(folder: &Path, part: &str) -> String {
    let text = fs::read_to_string(folder.join(format!("{part}.log"))).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("{part}:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
}

fn kubeconfig(folder: &Path, token: &str) -> String {
    let cluster = json!({
        "server": format!("https://{SWITCH_V4}:{PORT}"),
        "certificate-authority": folder.join("ca.crt"),
    });
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": token, "user": {"token": token}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": token}}],
        "current-context": "lab",
    })
    .to_string()
}

/// The names that the API server's certificate has to have.
fn subject_names() -> String {
    format!("DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:{SWITCH_V4},IP:{SWITCH_V6},IP:10.96.0.1")
}
