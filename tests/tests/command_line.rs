//! The command line, as people and scripts use it: what it lists, what it leaves out, and how it ends.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tests::agent::find_binary;
use tests::cluster::{Cluster, TARGET, addressed, cluster_ips};
use tests::manifest::{PodObject, Service};
use tests::{Protocol, Topology};

/// `web` in two namespaces, `other`, one that stands for a name outside, and a headless one.
fn cluster() -> Cluster {
    Cluster::new(Topology { nodes: 1, ..Topology::default() }, &[], |lab| {
        let manifests = lab.manifests();
        manifests.write("web.json", addressed(Service::new("web").selector("app", "web"), 10));
        let other = Service::new("other").selector("app", "web").dual_stack(11).port("tcp", "TCP", 80, TARGET);
        manifests.write("other.json", other);
        let far = Service::new("web").namespace("far").selector("app", "far").dual_stack(12);
        manifests.write("far.json", far.port("tcp", "TCP", 80, TARGET));
        let named = Service::new("named").spec("type", "ExternalName").spec("externalName", "db.example.org");
        manifests.write("named.json", named);
        manifests.write("headless.json", Service::new("headless").spec("clusterIP", "None"));
        let pod = lab.pod(1, 1);
        manifests.write("pod.json", PodObject::of(pod).label("app", "web"));
        let far = PodObject::new("far", "node1", &[pod.v4.into(), pod.v6.into()]).namespace("far").label("app", "far");
        manifests.write("far-pod.json", far);
    })
}

/// The Services that a list names, as namespace and name.
fn named(list: &Value) -> BTreeSet<String> {
    let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
    let rows = list.as_array().unwrap().iter();
    rows.map(|row| format!("{}/{}", text(row, "namespace"), text(row, "name"))).collect()
}

#[test]
fn lists_hold_what_was_asked_for_and_nothing_else() {
    let cluster = cluster();
    let agent = &cluster.agents[0];
    let client = cluster.lab.client(cluster.lab.pod(1, 2));
    for number in [10, 11, 12] {
        for to in cluster_ips(number) {
            client.ask(Protocol::Tcp, to).unwrap();
        }
    }
    let all = ["default/headless", "default/named", "default/other", "default/web", "far/web"];
    let served = ["default/other", "default/web", "far/web"];
    for (filter, wanted) in [
        (&[][..], &served[..]),
        (&["-n", "far"], &["far/web"]),
        (&["--namespace", "default"], &["default/other", "default/web"]),
        (&["web"], &["default/web", "far/web"]),
        (&["-n", "default", "web"], &["default/web"]),
        (&["-n", "far", "other"], &[]),
        (&["nobody"], &[]),
    ] {
        for list in ["services", "endpoints", "flows"] {
            let wanted = if list == "services" && filter.is_empty() { &all } else { wanted };
            let mut wanted: BTreeSet<String> = wanted.iter().map(|&name| name.to_owned()).collect();
            if list == "services" && filter == ["--namespace", "default"] {
                wanted.extend(["default/headless", "default/named"].map(str::to_owned));
            }
            let found = named(&agent.cli_json(&[&[list], filter].concat()));
            assert_eq!(found, wanted, "{list} {filter:?}");
            let table = agent.cli(&[&[list], filter].concat());
            assert!(table.status.success());
            let table = String::from_utf8(table.stdout).unwrap();
            for name in all {
                let (namespace, name) = name.split_once('/').unwrap();
                let has = table.lines().any(|line| {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    words.contains(&namespace) && words.contains(&name)
                });
                assert_eq!(
                    has,
                    wanted.contains(&format!("{namespace}/{name}")),
                    "{list} {filter:?}: {name} in\n{table}"
                );
            }
        }
    }
    let rows = agent.cli_json(&["services", "named"]);
    assert_eq!((&rows[0]["type"], &rows[0]["note"]), (&"ExternalName".into(), &"stands for db.example.org".into()));
    let rows = agent.cli_json(&["services", "headless"]);
    assert_eq!(rows[0]["note"], "no frontends");
}

#[test]
fn how_it_ends_says_what_went_wrong() {
    let cluster = cluster();
    let agent = &cluster.agents[0];
    let empty = cluster.lab.folder().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let empty = empty.display().to_string();
    for (arguments, code, says) in [
        (&["services", "--bpffs", &empty][..], 3, "nothing is pinned in"),
        (&["status", "--bpffs", &empty], 3, "nothing is pinned in"),
        (&["flows", "--bpffs", &empty], 3, "nothing is pinned in"),
        (&["explain", "--bpffs", &empty, "tcp", "10.244.1.7:40000", "10.96.0.10:80"], 3, "nothing is pinned in"),
        (&["services", "--nonsense"], 2, "--nonsense"),
        (&["explain", "tcp", "here", "there"], 2, "here"),
        (&["run", "--hostname-override", "node1", "--manifests", "/nowhere"], 1, "/nowhere"),
        (&["version"], 0, ""),
    ] {
        let mut command = Command::new(agent.binary());
        command.args(arguments);
        // A folder and a network of its own: what starts by mistake must find no device of the machine.
        if arguments[0] == "run" {
            command.args(["--bpffs", &empty, "--cgroup"]).arg(cluster.lab.cgroup());
            cluster.lab.pod(1, 2).netns.apply(&mut command).unwrap();
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
        assert!(told.contains(says), "{arguments:?}: {told}");
    }
}

#[test]
fn completions_know_every_subcommand() {
    let binary = find_binary().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = Command::new(&binary).args(["completions", shell]).output().unwrap();
        assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        for subcommand in
            ["run", "status", "services", "endpoints", "flows", "explain", "preflight", "drain", "cleanup"]
        {
            assert!(text.contains(subcommand), "{shell} doesn't know {subcommand}");
        }
    }
    // What bash completes.
    let script = r#"
        eval "$("$1" completions bash)"
        COMP_WORDS=("$1" serv) COMP_CWORD=1
        _fairlead "$1" serv "$1"
        echo "${COMPREPLY[*]}"
    "#;
    let output = Command::new("bash").args(["-c", script, "bash"]).arg(&binary).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "services",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// In a mount namespace without bpffs and cgroup v2: runs the agent until it is ready, stops it and cleans up; says before and after
/// which mounts there are.
const WITHOUT_MOUNTS: &str = r#"
mounts() { awk '$3 == "cgroup2" || $3 == "bpf" { print "'$1'", $3, $2 }' /proc/mounts; }
binary=$1 manifests=$2
mount -t tmpfs tmpfs /run
for mounted in $(awk '$3 == "cgroup2" || $3 == "bpf" { print $2 }' /proc/mounts); do umount -l "$mounted"; done
mounts before
"$binary" run --hostname-override node1 --manifests "$manifests" --bpffs /run/pins >/run/log 2>&1 &
for try in $(seq 200); do
    "$binary" status --bpffs /run/pins --output json 2>/dev/null | tr -d '\n' >/run/status
    grep -q '"ready": *true' /run/status && break
    sleep 0.1
done
printf 'status '
cat /run/status
echo
mounts during
kill $! && timeout 10 tail --pid=$! -f /dev/null
"$binary" status --bpffs /run/pins >/dev/null 2>&1 && echo left
"$binary" cleanup --bpffs /run/pins && echo clean
mounts after
cat /run/log >&2
"#;

#[test]
fn bpffs_and_cgroup_v2_are_mounted_where_they_are_missing_and_unmounted_by_cleanup() {
    let cluster = cluster();
    let node = cluster.lab.node(1);
    let mut agents = cluster.agents;
    agents[0].terminate();
    agents[0].cleanup();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", WITHOUT_MOUNTS, "sh"]);
    command.arg(agents[0].binary()).arg(cluster.lab.manifests().path());
    node.netns.apply(&mut command).unwrap();
    let output = command.output().unwrap();
    let (said, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = said.lines().collect();
    let mounted = |when: &str| -> BTreeSet<&str> {
        lines.iter().filter_map(|line| line.strip_prefix(when)?.split_whitespace().next()).collect()
    };
    assert_eq!(mounted("before"), BTreeSet::new(), "{said}");
    assert_eq!(mounted("during"), BTreeSet::from(["bpf", "cgroup2"]), "{said}{log}");
    let status = lines.iter().find_map(|line| line.strip_prefix("status ")).unwrap_or_else(|| panic!("{said}{log}"));
    let status: Value = serde_json::from_str(status).unwrap_or_else(|error| panic!("{error}: {said}{log}"));
    assert_eq!(status["ready"], true, "{log}");
    let attached = status["attached"].as_array().unwrap();
    let of_sockets = attached.iter().filter(|program| program["program"].as_str().unwrap().ends_with(['4', '6']));
    assert_eq!(of_sockets.count(), 8, "{status}");
    assert!(lines.contains(&"left") && lines.contains(&"clean"), "{said}{log}");
    assert_eq!(mounted("after"), BTreeSet::new(), "{said}");
    // A datagram that no hook translates gets no answer.
    let client = cluster.lab.host_client(node).with_timeout(Duration::from_millis(200));
    assert!(client.ask(Protocol::Udp, cluster_ips(10)[0]).is_err());
}
