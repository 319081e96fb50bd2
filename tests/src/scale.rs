//! A large cluster as a folder of manifests. In: how many Services, how many endpoints each. Out: `List` files of 100 Services and their Pods.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::manifest::{PodObject, Service, write_by_rename};

/// Services in one file.
const PER_FILE: u32 = 100;

/// Writes the folder, which may exist; returns the number of files.
pub fn write(folder: &Path, services: u32, endpoints: u32) -> Result<u32> {
    ensure!(services <= 1 << 16, "at most 65536 Services fit into 10.96.0.0/12 the way they are numbered here");
    let pods = u64::from(services) * u64::from(endpoints);
    ensure!(pods <= 1 << 22, "at most 4194304 endpoints fit into 10.128.0.0/9 the way they are numbered here");
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let files = services.div_ceil(PER_FILE);
    for file in 0..files {
        let mut items = Vec::new();
        for service in file * PER_FILE..((file + 1) * PER_FILE).min(services) {
            items.push(service_object(service));
            items.extend((0..endpoints).map(|endpoint| pod_object(service, service * endpoints + endpoint)));
        }
        let path = folder.join(format!("services-{file:04}.json"));
        write_by_rename(&path, &list(&items)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(files)
}

/// Gives one Pod another label `app`, by rewriting the file that it is in. `endpoints` is what the folder was written with.
/// Returns the moment before the file was there.
pub fn relabel(folder: &Path, endpoint: u32, endpoints: u32, app: &str) -> Result<SystemTime> {
    let path = folder.join(format!("services-{:04}.json", endpoint / endpoints / PER_FILE));
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut items: Vec<Value> = serde_json::from_str::<Value>(&text)?["items"].as_array().cloned().unwrap_or_default();
    let name = format!("pod-{endpoint}");
    let pod = items.iter_mut().find(|item| item["kind"] == "Pod" && item["metadata"]["name"] == name.as_str());
    let pod = pod.with_context(|| format!("{} has no Pod {name}", path.display()))?;
    pod["metadata"]["labels"]["app"] = app.into();
    write_by_rename(&path, &list(&items)?).with_context(|| format!("writing {}", path.display()))
}

/// The ClusterIP of the Service with this number.
pub fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + service + 1)
}

/// The address of the endpoint with this number.
pub fn endpoint_v4(endpoint: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 0)) + endpoint + 1)
}

fn service_object(service: u32) -> Value {
    let v6 = Ipv6Addr::from(u128::from(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0)) + u128::from(service) + 1);
    Service::new(&format!("service-{service}"))
        .selector("app", &format!("app-{service}"))
        .cluster_ips(&[cluster_ip(service).into(), v6.into()])
        .port("http", "TCP", 80, 8080)
        .into()
}

fn pod_object(service: u32, endpoint: u32) -> Value {
    let v6 = Ipv6Addr::from(u128::from(Ipv6Addr::new(0xfd00, 0x10, 0x128, 0, 0, 0, 0, 0)) + u128::from(endpoint) + 1);
    let node = format!("node{}", endpoint % 100 + 1);
    let mut pod = Value::from(
        PodObject::new(&format!("pod-{endpoint}"), &node, &[endpoint_v4(endpoint).into(), v6.into()])
            .label("app", &format!("app-{service}")),
    );
    pod["spec"]["containers"] = json!([{"name": "server", "ports": [{"name": "http", "containerPort": 8080}]}]);
    pod
}

/// One object a line, so that one Pod can be found and edited.
fn list(items: &[Value]) -> Result<String> {
    let mut text = String::from("{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[\n");
    for (index, item) in items.iter().enumerate() {
        let comma = if index + 1 < items.len() { "," } else { "" };
        writeln!(text, "{item}{comma}")?;
    }
    text.push_str("]}\n");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_and_endpoint_is_in_the_folder_once() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(write(folder.path(), 250, 3).unwrap(), 3);
        let (mut services, mut pods) = (0, 0);
        for entry in fs::read_dir(folder.path()).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            let list: Value = serde_json::from_str(&text).unwrap();
            for item in list["items"].as_array().unwrap() {
                if item["kind"] == "Service" { services += 1 } else { pods += 1 }
            }
        }
        assert_eq!((services, pods), (250, 750));
    }

    #[test]
    fn a_pod_is_relabelled_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 150, 2).unwrap();
        let read = || {
            ["services-0000.json", "services-0001.json"]
                .map(|file| fs::read_to_string(folder.path().join(file)).unwrap())
        };
        let before = read();
        relabel(folder.path(), 201, 2, "none").unwrap();
        let after = read();
        assert_eq!(before[0], after[0]);
        let changed: Vec<_> =
            before[1].lines().zip(after[1].lines()).filter(|(before, after)| before != after).collect();
        assert!(matches!(changed[..], [(_, after)] if after.contains("\"pod-201\"") && after.contains("\"none\"")));
        relabel(folder.path(), 201, 2, "app-100").unwrap();
        assert_eq!(before, read());
    }
}
