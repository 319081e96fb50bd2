//! What is in `deploy/`, before a real API server: it takes every object without a warning, and what it grants to the agent is what the
//! agent asks for.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tests::control_plane::parts;
use tests::{Agent, ControlPlane, Lab, Topology};

/// Values of the chart that change what it renders, besides the defaults.
const VALUES: [&[&str]; 2] = [
    &[],
    &[
        "--set=apiServer.host=192.0.2.1",
        "--set=existingConfigMap=kube-proxy",
        "--set=endpoints=pod-selector",
        "--set=extraArgs={--socket-lb=all}",
        "--set=imagePullSecrets[0].name=registry",
        "--set=image.tag=1.2.3",
        "--set=config.conntrack.maxPerCore=0",
    ],
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Every way to the objects, by name: the files as they are, kustomize's and Helm's output.
fn rendered(plane: &ControlPlane) -> Vec<(String, String)> {
    let kustomize = deploy().join("kustomize");
    let mut files: Vec<PathBuf> =
        fs::read_dir(&kustomize).expect("deploy/kustomize").map(|entry| entry.expect("a file").path()).collect();
    files.retain(|file| file.file_name().is_some_and(|name| name != "kustomization.yaml"));
    files.sort();
    let text: Vec<String> = files.iter().map(|file| fs::read_to_string(file).expect("a file")).collect();
    let mut all = vec![("plain files".to_owned(), text.join("\n---\n"))];
    let output = plane.kubectl(&["kustomize", &kustomize.display().to_string()], "").expect("kubectl");
    all.push(("kustomize".to_owned(), printed("kubectl kustomize", &output)));
    let output = plane.kubectl(&["kustomize", &deploy().join("pod-selector").display().to_string()], "");
    all.push(("kustomize, of Pods".to_owned(), printed("kubectl kustomize", &output.expect("kubectl"))));
    for values in VALUES {
        let mut command = Command::new(parts::ensure(&parts::HELM).expect("helm"));
        command.args(["template", "fairlead"]).arg(deploy().join("helm/fairlead")).args(["--namespace", "kube-system"]);
        let output = command.args(values).output().expect("helm");
        all.push((format!("Helm {values:?}"), printed("helm template", &output)));
    }
    all
}

/// What a program printed, which has nothing to warn of.
fn printed(what: &str, output: &std::process::Output) -> String {
    let warnings = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && warnings.is_empty(), "{what}: {} {warnings}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a user may do, as `verb group/resource`.
fn rights(plane: &ControlPlane, account: &str) -> BTreeSet<String> {
    let kubeconfig = plane.kubeconfig_of_account("kube-system", account).expect("a token");
    let api = tests::control_plane::Api::new(plane.netns(), &kubeconfig);
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": "kube-system"}});
    let answer = api.create("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", &review).expect("a review");
    rights_in(&answer["status"]["resourceRules"])
}

/// The same of a list of rules.
fn rights_in(rules: &Value) -> BTreeSet<String> {
    let words = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut rights = BTreeSet::new();
    for rule in rules.as_array().expect("rules") {
        for verb in words(&rule["verbs"]) {
            for group in words(&rule["apiGroups"]) {
                for resource in words(&rule["resources"]) {
                    rights.insert(format!("{verb} {group}/{resource}"));
                }
            }
        }
    }
    rights
}

#[test]
fn the_api_server_takes_every_object_without_a_warning() {
    let lab = Lab::new(Topology { nodes: 1, pods_per_node: 0, ..Topology::default() });
    let plane = ControlPlane::start(&lab);
    for (name, text) in rendered(&plane) {
        let apply = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename=-"];
        let output = plane.kubectl(&apply, &text).unwrap();
        let said = printed(&name, &output);
        for object in ["serviceaccount/", "clusterrolebinding.rbac.authorization.k8s.io/", "daemonset.apps/"] {
            let line = format!("{object}fairlead serverside-applied (server dry run)");
            assert!(said.lines().any(|said| said == line), "{name}: no {line} in\n{said}");
        }
    }
    // A field that isn't there is refused, so that the above means something.
    let (_, text) = &rendered(&plane)[1];
    let wrong = text.replace("hostNetwork:", "hostNetwrk:");
    assert_ne!(&wrong, text);
    let output =
        plane.kubectl(&["apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename=-"], &wrong);
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("hostNetwrk"), "{} {said}", output.status);
}

#[test]
fn kubeadms_config_map_finds_its_kubeconfig_in_the_daemon_set() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-userspace/tests/data/config/kubeadm.conf");
    let text = fs::read_to_string(data).expect("kubeadm's configuration");
    let kubeconfig = text.lines().find_map(|line| line.trim().strip_prefix("kubeconfig: ")).expect("a kubeconfig");
    let folder = Path::new(kubeconfig.trim()).parent().expect("a folder").display();
    for file in ["kustomize/daemonset.yaml", "helm/fairlead/templates/daemonset.yaml"] {
        let text = fs::read_to_string(deploy().join(file)).expect("a DaemonSet");
        let mounts = text.matches(&format!("{{name: config, mountPath: {folder}, readOnly: true}}")).count();
        let flags = text.matches(&format!("--config={folder}/config.conf")).count();
        assert_eq!((mounts, flags), (2, 2), "{file}: the container that begins, and the one that stays");
    }
}

#[test]
fn what_is_granted_is_kube_proxys_role_and_enough_for_the_agent() {
    let lab = Lab::new(Topology { nodes: 1, pods_per_node: 0, ..Topology::default() });
    let plane = ControlPlane::start(&lab);
    let api = plane.api();
    let nobody = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": "kube-system"}});
    api.put(nobody);
    let of_everyone = rights(&plane, "nobody");
    let role = api.get("/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node-proxier").unwrap();
    for (name, text) in rendered(&plane) {
        printed(&name, &plane.kubectl(&["apply", "--server-side", "--filename=-"], &text).unwrap());
        let granted: BTreeSet<String> = rights(&plane, "fairlead").difference(&of_everyone).cloned().collect();
        // What the DaemonSet asks for is what its agents are tried with.
        let of_pods = text.contains("--endpoints=pod-selector");
        let mut wanted = rights_in(&role["rules"]);
        if of_pods {
            wanted.extend(["list /pods", "watch /pods"].map(str::to_owned));
        }
        assert_eq!(granted, wanted, "{name}");

        let kubeconfig = plane.kubeconfig_of_account("kube-system", "fairlead").unwrap();
        let flags: &[&str] = if of_pods { &["--endpoints=pod-selector"] } else { &[] };
        let mut agent = Agent::start_on_api_server(&lab, lab.node(1), &kubeconfig, flags);
        let events = "/apis/events.k8s.io/v1/namespaces/default/events";
        let started = |list: &Value| list["items"].as_array().is_some_and(|events| !events.is_empty());
        api.until(events, started);
        assert_eq!(agent.cli_json(&["status"])["problems"], json!([]), "{name}");
        agent.terminate();
        agent.cleanup();
        printed(&name, &plane.kubectl(&["delete", "--filename=-"], &text).unwrap());
        for event in api.get(events).unwrap()["items"].as_array().unwrap() {
            api.delete(&format!("{events}/{}", event["metadata"]["name"].as_str().unwrap()));
        }
    }
}
