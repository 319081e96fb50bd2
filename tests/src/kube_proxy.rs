//! The real kube-proxy, to compare with. In: a lab's node, a kubeconfig, a mode. Out: a process that serves the node until dropped;
//! its rules go with the node.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::control_plane::parts;
use crate::lab::{Lab, Node};

/// The pods' networks, as `--cluster-cidr` takes them.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";

/// A kube-proxy that runs.
#[derive(Debug)]
pub struct KubeProxy {
    process: Child,
}

impl KubeProxy {
    /// Starts it.
    pub fn start(lab: &Lab, node: &Node, kubeconfig: &Path, mode: &str) -> Result<Self> {
        let configuration = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode,
            "hostnameOverride": node.name,
            "clientConnection": {"kubeconfig": kubeconfig},
            "clusterCIDR": CLUSTER_CIDR,
            "detectLocalMode": "ClusterCIDR",
            "oomScoreAdj": 0,
            // nf_conntrack_max can't be written outside the machine's first network namespace.
            "conntrack": {"maxPerCore": 0},
        });
        let file = lab.folder().join(format!("kube-proxy-{}.json", node.name));
        fs::write(&file, configuration.to_string()).context("writing kube-proxy's configuration")?;
        Self::start_with_config(lab, node, &file)
    }

    /// Starts it with a configuration file.
    pub fn start_with_config(lab: &Lab, node: &Node, config: &Path) -> Result<Self> {
        Self::start_with(lab, node, &["--config".as_ref(), config.as_os_str()])
    }

    /// Starts it with a command line.
    pub fn start_with(lab: &Lab, node: &Node, arguments: &[&OsStr]) -> Result<Self> {
        let log = File::create(lab.folder().join("log").join(format!("kube-proxy-{}.log", node.name)))?;
        let mut command = Command::new(parts::ensure(&parts::KUBE)?);
        node.netns.apply(&mut command)?;
        command.arg("kube-proxy").args(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        Ok(Self { process: command.spawn().context("starting kube-proxy")? })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until its rules on the node name all of these addresses.
    pub fn wait_written(&self, node: &Node, addresses: &[&str]) -> Result<()> {
        let start = Instant::now();
        loop {
            let rules = rules(node)?;
            let Some(missing) = addresses.iter().find(|address| !rules.contains(**address)) else { return Ok(()) };
            if start.elapsed() > Duration::from_secs(60) {
                bail!("kube-proxy's rules don't name {missing}:\n{rules}");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Every rule of netfilter on a node that kube-proxy may have written, whichever mode it is in.
pub fn rules(node: &Node) -> Result<String> {
    let mut text = String::new();
    for (program, arguments) in
        [("iptables-save", &["-t", "nat"][..]), ("ip6tables-save", &["-t", "nat"]), ("nft", &["list", "ruleset"])]
    {
        text += &node.netns.exec(program, arguments)?;
    }
    Ok(text)
}

/// Every chain that is not netfilter's own, every rule of netfilter's tables as `iptables` shows them, and every table that it doesn't.
pub fn chains_and_rules(node: &Node) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for program in ["iptables-save", "ip6tables-save"] {
        let mut table = String::new();
        for line in node.netns.exec(program, &[])?.lines() {
            if line.starts_with('*') {
                line.clone_into(&mut table);
            } else if let Some((chain, "-")) =
                line.strip_prefix(':').and_then(|rest| rest.rsplit_once(" [")?.0.rsplit_once(' '))
            {
                all.insert(format!("{program} {table} :{chain}"));
            } else if line.starts_with("-A ") {
                all.insert(format!("{program} {table} {line}"));
            }
        }
    }
    let tables = node.netns.exec("nft", &["list", "tables"])?;
    let of_iptables = |table: &&str| {
        let words: Vec<&str> = table.split(' ').collect();
        matches!(words[..], ["table", "ip" | "ip6", "raw" | "mangle" | "nat" | "filter" | "security"])
    };
    all.extend(tables.lines().filter(|table| !of_iptables(table)).map(str::to_owned));
    Ok(all)
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
