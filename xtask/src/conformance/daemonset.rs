//! The agent as the container of kubeadm's DaemonSet `kube-proxy`, in which the image's name is another and nothing else. In: a control
//! plane, kubelets that have the image. Out: Ready pods, one a node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::ControlPlane;
use tests::kube_proxy::CLUSTER_CIDR;
use tests::kubelet::image;

use super::Mode;
use crate::workspace;

/// What the image is called.
const IMAGE: &str = "registry.example/fairlead:conformance";

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
    image::pack(folder, &root, IMAGE, configuration)
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
        "image": IMAGE,
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
pub fn apply(plane: &ControlPlane, mode: Mode) -> Result<()> {
    kubectl(plane, &["apply", "-f", "-"], &objects(mode, &plane.server())?.to_string())
}

/// Waits until each node has its pod Ready.
pub fn wait_ready(plane: &ControlPlane) -> Result<()> {
    kubectl(plane, &["rollout", "status", "--namespace=kube-system", "--timeout=90s", "daemonset/kube-proxy"], "")
        .with_context(|| {
            let pods = plane.kubectl(&["describe", "pods", "--namespace=kube-system"], "");
            pods.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
        })
}

fn kubectl(plane: &ControlPlane, arguments: &[&str], input: &str) -> Result<()> {
    let output = plane.kubectl(arguments, input)?;
    ensure!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
