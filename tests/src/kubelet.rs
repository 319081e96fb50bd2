//! A node that runs Pods: containerd and a kubelet in a lab's node. In: a lab's node, a control plane with what kubelets need, an image.
//! Out: a Ready node whose Pods run. Never here: what sends the connections of Services; that is what is tested.
//!
//! Everything runs in a [`Machine`], so that ending one process leaves neither a container nor a mount behind.

mod cgroups;
pub mod image;
mod machine;
mod settings;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub use self::cgroups::{Cgroups, leftovers, remove as remove_cgroups};
use self::machine::Machine;
pub use self::settings::Settings;
use crate::control_plane::{ControlPlane, parts};
use crate::lab::{Lab, Node};

/// Where Debian keeps the plugins of container networks.
pub const CNI: &str = "/usr/lib/cni";

/// How long a part may take to come up on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// A kubelet that runs.
#[derive(Debug)]
pub struct Kubelet {
    name: String,
    folder: PathBuf,
    children: Vec<Child>,
    machine: Machine,
    // Dropped last: they can go when nobody is in them.
    cgroups: Cgroups,
}

impl Kubelet {
    /// Starts it on a node. It is Ready some seconds later.
    pub fn start(lab: &Lab, node: &Node, plane: &ControlPlane, image: &Path) -> Result<Self> {
        let folder = lab.folder().join(format!("kubelet-{}", node.name));
        fs::create_dir_all(folder.join("cni")).with_context(|| format!("creating {}", folder.display()))?;
        let cgroups = Cgroups::create(&format!("{}-{}", lab.id(), node.name))?;
        let machine = Machine::start(&node.netns)?;
        let mut kubelet = Self { name: node.name.clone(), folder, children: Vec::new(), machine, cgroups };
        kubelet.start_containerd(node)?;
        kubelet.import(image)?;
        kubelet.start_kubelet(node, plane)?;
        Ok(kubelet)
    }

    /// Waits until the API server sees the node Ready.
    pub fn wait_ready(&mut self, plane: &ControlPlane) -> Result<()> {
        let (api, path) = (plane.api(), format!("/api/v1/nodes/{}", self.name));
        self.wait_for("the node", |_| {
            let node = api.get(&path).unwrap_or_default();
            let mut conditions = node["status"]["conditions"].as_array().into_iter().flatten();
            conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        })
    }

    fn start_containerd(&mut self, node: &Node) -> Result<()> {
        let (number, folder) = (node.number, self.folder.display());
        let configuration = format!(
            r#"version = 2
root = "{folder}/containerd"
state = "/run/containerd"
# Without CAP_SYS_RESOURCE no score can be lowered.
oom_score = 0
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  # Anything that waits will do as the process that holds a Pod's namespaces.
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{folder}/cni"
"#,
            image = image::name()?,
            socket = machine::SOCKET,
        );
        fs::write(self.folder.join("containerd.toml"), configuration).context("writing containerd's configuration")?;
        let subnets = [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")];
        let ranges: Vec<Value> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
        let ipam = json!({"type": "host-local", "dataDir": self.folder.join("addresses"), "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]});
        let network = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ]});
        fs::write(self.folder.join("cni/10-pods.conflist"), network.to_string()).context("writing the network")?;
        let mut command = self.machine.command("containerd");
        command.arg("--config").arg(self.folder.join("containerd.toml"));
        self.spawn("containerd", command)?;
        self.wait_for("containerd", |kubelet| {
            let status = kubelet.ctr(&["version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        })
    }

    /// Gives it an image's archive.
    pub fn import(&self, image: &Path) -> Result<()> {
        let mut command = self.ctr(&["images", "import"]);
        let output = command.arg(image).output().context("running ctr")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "containerd doesn't take {}: {said}", image.display());
        Ok(())
    }

    fn start_kubelet(&mut self, node: &Node, plane: &ControlPlane) -> Result<()> {
        let folder = &self.folder;
        fs::write(folder.join("resolv.conf"), format!("nameserver {}\n", plane.dns()))
            .context("writing resolv.conf")?;
        let configuration = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            // Hosts with cgroup v1 are refused otherwise.
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.cgroups.root(),
            "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": format!("unix://{}", machine::SOCKET),
            "clusterDNS": [plane.dns()],
            "clusterDomain": "cluster.local",
            "resolvConf": folder.join("resolv.conf"),
            "oomScoreAdj": 0,
            "failSwapOn": false,
            // A busy machine's disk is nothing to evict Pods or images for; a Pod that writes more than it may is (a spec needs that).
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
            "maxPods": 200,
            "podLogsDir": folder.join("logs"),
            "nodeStatusUpdateFrequency": "5s",
        });
        let file = folder.join("kubelet.json");
        fs::write(&file, configuration.to_string()).context("writing the kubelet's configuration")?;
        let mut command = self.machine.command(&parts::ensure(&parts::KUBE)?);
        command.arg("kubelet").arg("--config").arg(file);
        command.arg("--kubeconfig").arg(plane.kubeconfig("kubelet"));
        command.args(["--hostname-override", &node.name, "--node-ip", &format!("{},{}", node.v4(), node.v6())]);
        command.arg("--root-dir").arg(folder.join("kubelet")).arg("--cert-dir").arg(folder.join("certificates"));
        command.args(["--node-labels", &format!("topology.kubernetes.io/zone=zone-{}", node.number)]);
        self.spawn("kubelet", command)
    }

    /// containerd's own client, in the namespace of images that kubelets use.
    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = self.machine.command("ctr");
        command.args(["--address", machine::SOCKET, "--namespace", "k8s.io"]).args(arguments).stdin(Stdio::null());
        command
    }

    fn spawn(&mut self, part: &str, mut command: Command) -> Result<()> {
        let log = File::create(self.log(part)).with_context(|| format!("creating the log of {part}"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.children.push(command.spawn().with_context(|| format!("starting {part}"))?);
        Ok(())
    }

    fn wait_for(&mut self, what: &str, ready: impl Fn(&Self) -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready(self) {
            for child in &mut self.children {
                if let Some(status) = child.try_wait()? {
                    bail!("a part of {} ended with {status}; logs:\n{}", self.name, self.logs());
                }
            }
            ensure!(start.elapsed() < PATIENCE, "{what} is not ready after {PATIENCE:?}; logs:\n{}", self.logs());
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn log(&self, part: &str) -> PathBuf {
        self.folder.join(format!("{part}.log"))
    }

    fn logs(&self) -> String {
        let tail = |part: &&str| {
            let text = fs::read_to_string(self.log(part)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("{part}:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        ["containerd", "kubelet"].iter().map(tail).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.machine.end();
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}
