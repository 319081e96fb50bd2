//! The agent as a DaemonSet's container: of kubeadm's `kube-proxy`, in which the image's name is another and nothing else, or of its own
//! from `deploy/`, with kubeadm's ConfigMap. In: a control plane, kubelets that have the image. Out: Ready pods, one a node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};
use tests::ControlPlane;
use tests::cgroup;
use tests::kube_proxy::CLUSTER_CIDR;
use tests::kubelet::image;

use super::Mode;
use crate::workspace;

/// What the image is called, and its tag.
const IMAGE: [&str; 2] = ["registry.example/fairlead", "conformance"];

/// A DaemonSet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DaemonSet {
    /// kubeadm's, of kube-proxy
    Kubeadm,
    /// The one in `deploy/`
    Own,
}

impl DaemonSet {
    /// The name of the object.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kubeadm => "kube-proxy",
            Self::Own => "fairlead",
        }
    }
}

/// The image that `deploy/Containerfile` describes, as an archive in a folder.
pub fn build_image(folder: &Path, binary: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    for place in ["usr/bin/fairlead", "usr/local/bin/kube-proxy"] {
        let file = root.join(place);
        fs::create_dir_all(file.parent().context("a file is in a folder")?).context("making the image's folders")?;
        fs::copy(binary, &file).with_context(|| format!("copying {}", binary.display()))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    let configuration = json!({
        "Entrypoint": ["/usr/bin/fairlead"],
        "Env": ["PATH=/usr/local/bin:/usr/bin"],
    });
    image::pack(folder, &root, &IMAGE.join(":"), configuration)
}

/// What `kubeadm init` makes for kube-proxy (its phase `addon/kube-proxy`): the account, its role, the ConfigMap with configuration and
/// kubeconfig, the DaemonSet.
fn objects(mode: Mode, server: &str) -> Result<Value> {
    let kubeadm = workspace::root().join("lb-userspace/tests/data/config/kubeadm.conf");
    let text = fs::read_to_string(&kubeadm).with_context(|| format!("reading {}", kubeadm.display()))?;
    let lines = text.lines().map(|line| match line.split_once(':') {
        Some(("clusterCIDR", _)) => format!("clusterCIDR: {CLUSTER_CIDR}\n"),
        Some(("mode", _)) => format!("mode: {}\n", mode.name()),
        _ => format!("{line}\n"),
    });
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "default", "cluster": {"server": server, "certificate-authority": format!("{account}/ca.crt")}}],
        "contexts": [{"name": "default", "context": {"cluster": "default", "namespace": "default", "user": "default"}}],
        "current-context": "default",
        "users": [{"name": "default", "user": {"tokenFile": format!("{account}/token")}}],
    });
    let named = json!({"name": "kube-proxy", "namespace": "kube-system", "labels": {"k8s-app": "kube-proxy"}});
    let volume =
        |name: &str, path: &str, read_only: bool| json!({"name": name, "mountPath": path, "readOnly": read_only});
    let container = json!({
        "name": "kube-proxy",
        "image": IMAGE.join(":"),
        "imagePullPolicy": "IfNotPresent",
        "command": ["/usr/local/bin/kube-proxy", "--config=/var/lib/kube-proxy/config.conf", "--hostname-override=$(NODE_NAME)"],
        "securityContext": {"privileged": true},
        "volumeMounts": [
            volume("kube-proxy", "/var/lib/kube-proxy", false),
            volume("xtables-lock", "/run/xtables.lock", false),
            volume("lib-modules", "/lib/modules", true),
        ],
        "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
    });
    let pod = json!({
        "priorityClassName": "system-node-critical",
        "containers": [container],
        "hostNetwork": true,
        "serviceAccountName": "kube-proxy",
        "volumes": [
            {"name": "kube-proxy", "configMap": {"name": "kube-proxy"}},
            {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
            {"name": "lib-modules", "hostPath": {"path": "/lib/modules", "type": ""}},
        ],
        "tolerations": [{"operator": "Exists"}],
        "nodeSelector": {"kubernetes.io/os": "linux"},
    });
    Ok(json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kubeadm:node-proxier"},
            "subjects": [{"kind": "ServiceAccount", "name": "kube-proxy", "namespace": "kube-system"}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": named,
            "data": {"config.conf": lines.collect::<String>(), "kubeconfig.conf": kubeconfig.to_string()},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": named,
            "spec": {
                "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
                "updateStrategy": {"type": "RollingUpdate"},
                "template": {"metadata": {"labels": {"k8s-app": "kube-proxy"}}, "spec": pod},
            },
        },
    ]}))
}

/// Makes the objects. Pods come once there are nodes.
pub fn apply(plane: &ControlPlane, daemon_set: DaemonSet, mode: Mode, folder: &Path) -> Result<()> {
    let mut objects = objects(mode, &plane.server())?;
    if daemon_set == DaemonSet::Own {
        objects["items"].as_array_mut().context("a list")?.retain(|object| object["kind"] == "ConfigMap");
    }
    kubectl(plane, &["apply", "-f", "-"], &objects.to_string())?;
    if daemon_set == DaemonSet::Own {
        let overlay = overlay(folder)?;
        kubectl(plane, &["apply", "-k", &overlay.display().to_string()], "")?;
    }
    Ok(())
}

/// `deploy/kustomize` as a user makes it theirs: the image's name, kubeadm's ConfigMap, and where cgroup v2 is, if not where the
/// DaemonSet expects it. Kustomize takes what is in folders beside its own.
fn overlay(folder: &Path) -> Result<PathBuf> {
    let (base, overlay) = (folder.join("kustomize"), folder.join("overlay"));
    for folder in [&base, &overlay] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let from = workspace::root().join("deploy/kustomize");
    for entry in fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))?.flatten() {
        fs::copy(entry.path(), base.join(entry.file_name())).context("copying deploy/kustomize")?;
    }
    let text = fs::read_to_string(base.join("daemonset.yaml")).context("reading the DaemonSet")?;
    let cgroup = cgroup::mount_point().context("cgroup v2 is not mounted")?;
    fs::write(base.join("daemonset.yaml"), text.replace("/sys/fs/cgroup", &cgroup.display().to_string()))
        .context("writing the DaemonSet")?;
    let [name, tag] = IMAGE;
    let volume = json!([
        {"op": "test", "path": "/spec/template/spec/volumes/3/name", "value": "config"},
        {"op": "replace", "path": "/spec/template/spec/volumes/3/configMap/name", "value": "kube-proxy"},
    ]);
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../kustomize"],
        "images": [{"name": "fairlead", "newName": name, "newTag": tag}],
        "patches": [{"target": {"kind": "DaemonSet"}, "patch": volume.to_string()}],
    });
    fs::write(overlay.join("kustomization.yaml"), kustomization.to_string()).context("writing the overlay")?;
    Ok(overlay)
}

/// Waits until each node has its pod Ready.
pub fn wait_ready(plane: &ControlPlane, daemon_set: DaemonSet) -> Result<()> {
    let daemon_set = format!("daemonset/{}", daemon_set.name());
    kubectl(plane, &["rollout", "status", "--namespace=kube-system", "--timeout=90s", &daemon_set], "").with_context(
        || {
            let pods = plane.kubectl(&["describe", "pods", "--namespace=kube-system"], "");
            pods.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
        },
    )
}

fn kubectl(plane: &ControlPlane, arguments: &[&str], input: &str) -> Result<()> {
    let output = plane.kubectl(arguments, input)?;
    ensure!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
