//! Following `--config`: a file that changes takes effect without anybody restarting the agent.
//!
//! In: the file, what it said, inotify's events. Out: the moment at which it says something else that is possible. The agent
//! then begins anew in its own process, which packets don't notice: every setting takes effect, and there is one way for all
//! of them. kube-proxy ends in that place. What is impossible is said, and what the file said before stays in force.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use serde_json::Value;
use tokio::{sync::mpsc, time::sleep};
use tracing::{error, info};

use crate::config::{Config, flags::Flags};

/// How long a file must have been left alone: editors write in several steps.
const SETTLED: Duration = Duration::from_millis(200);

/// A file that is followed.
pub(super) struct Follow {
    path: PathBuf,
    text: String,
    config: Config,
    events: mpsc::UnboundedReceiver<()>,
    _watcher: RecommendedWatcher,
}

impl Follow {
    /// Begins to follow a file of which this is in force.
    pub(super) fn begin(path: &Path, config: Config) -> Result<Self> {
        let (sender, events) = mpsc::unbounded_channel();
        let first = sender.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if !event.is_ok_and(|event| event.kind.is_access()) {
                // The other end goes with the watcher.
                let _ = sender.send(());
            }
        })
        .context("--config can't be followed")?;
        // Files are replaced by renaming, and mounted ConfigMaps by renaming the folder behind a symbolic link: both show in
        // the folder. A link to elsewhere shows where it leads.
        let real = path.canonicalize().with_context(|| format!("{} can't be followed", path.display()))?;
        let mut folders: Vec<PathBuf> =
            [path, &real].into_iter().filter_map(Path::parent).map(|dir| Path::new(".").join(dir)).collect();
        folders.dedup();
        for folder in folders {
            watcher.watch(&folder, RecursiveMode::NonRecursive).with_context(|| {
                format!("{} can't be followed; raise fs.inotify.max_user_watches", folder.display())
            })?;
        }
        // What has been written since it was read is looked at first.
        let _ = first.send(());
        Ok(Self { path: path.to_owned(), text: String::new(), config, events, _watcher: watcher })
    }

    /// Waits until the file says something else that is possible.
    pub(super) async fn changed(&mut self, flags: &Flags) {
        loop {
            if self.events.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
            sleep(SETTLED).await;
            while self.events.try_recv().is_ok() {}
            let file = self.path.display();
            let text = match std::fs::read_to_string(&self.path) {
                Ok(text) if text == self.text => continue,
                Ok(text) => text,
                Err(reason) => {
                    error!(%file, %reason, "the configuration can't be read; what it said before stays in force");
                    continue;
                }
            };
            match flags.config(Some(&text)) {
                Ok((config, _)) => {
                    let mut fields = Vec::new();
                    differences(&self.config.to_json(), &config.to_json(), "", &mut fields);
                    self.text = text;
                    if fields.is_empty() {
                        continue;
                    }
                    info!(%file, fields = fields.join(", "), "the configuration has changed; the agent begins anew");
                    return;
                }
                Err(reason) => {
                    let reason = format!("{reason:#}");
                    error!(%file, reason, "the configuration can't be; what it said before stays in force");
                    self.text = text;
                }
            }
        }
    }
}

/// Names of the fields that differ.
fn differences(old: &Value, new: &Value, path: &str, fields: &mut Vec<String>) {
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let null = Value::Null;
            differences(old.get(name).unwrap_or(&null), new.get(name).unwrap_or(&null), &path, fields);
        }
    } else if old != new {
        fields.push(path.to_owned());
    }
}

/// Begins this process anew, with the same arguments; returns only if that can't be.
pub(super) fn begin_anew() -> Result<()> {
    let mut args = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    Err(command.args(args).exec()).context("the agent can't begin anew; restart it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(rest: &str) -> String {
        format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{rest}")
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_a_change_that_is_possible_is_one() {
        let dir = tempfile::tempdir().unwrap();
        // As a mounted ConfigMap has it: config.conf -> ..data/config.conf, ..data -> 1.
        let version = |name: &str, content: &str| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("config.conf"), content).unwrap();
            let next = dir.path().join("..next");
            std::os::unix::fs::symlink(name, &next).unwrap();
            std::fs::rename(next, dir.path().join("..data")).unwrap();
        };
        version("1", &text(""));
        let path = dir.path().join("config.conf");
        std::os::unix::fs::symlink("..data/config.conf", &path).unwrap();
        let flags = Flags::default();
        let config = flags.config(Some(&text(""))).unwrap().0;
        let mut follow = Follow::begin(&path, config).unwrap();
        let mut wait = async |name: &str, content: &str| {
            version(name, content);
            tokio::time::timeout(Duration::from_millis(800), follow.changed(&flags)).await.is_ok()
        };
        assert!(!wait("2", &text("mode: nonsense")).await);
        assert!(!wait("3", &text("# a comment\n")).await);
        assert!(wait("4", &text("mode: nftables\nnftables: {masqueradeAll: true}")).await);
    }

    #[test]
    fn fields_that_differ_are_named() {
        let config = |rest: &str| Config::of_file(&text(rest)).unwrap().0.to_json();
        let mut fields = Vec::new();
        differences(&config(""), &config("mode: ipvs\nconntrack: {min: 5}"), "", &mut fields);
        let want = ["conntrack.min", "iptables.minSyncPeriod", "iptables.syncPeriod", "ipvs.syncPeriod", "mode"];
        assert_eq!(fields, want);
    }
}
