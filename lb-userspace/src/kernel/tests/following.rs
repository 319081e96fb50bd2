//! Devices that come, change and go.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use super::*;
use crate::kernel::devices::{Snapshot, watch::Watch};

/// Waits until the snapshot is as expected, attaching at every change as the agent does.
async fn until(watch: &mut Watch, kernel: &mut Kernel, expected: impl Fn(&Snapshot) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let ports = watch.snapshot().ports();
        // A device may have gone since; the next change says so.
        let _ = kernel.attach_devices(&ports);
        if expected(watch.snapshot()) {
            return;
        }
        assert!(Instant::now() < deadline, "{:?}", watch.snapshot());
        let _ = tokio::time::timeout(Duration::from_secs(1), watch.changed()).await;
    }
}

fn link<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a devices::Link> {
    snapshot.links.values().find(|link| link.name == name)
}

#[test]
fn devices_are_followed_from_creation_to_deletion() {
    lab(|lab| {
        let mut kernel = lab.open();
        runtime().block_on(async {
            let mut watch = Watch::open().unwrap();
            until(&mut watch, &mut kernel, |_| true).await;
            assert_eq!(lab.links().len(), 0);
            run("ip link add d0 type bridge");
            until(&mut watch, &mut kernel, |s| link(s, "d0").is_some()).await;
            assert_eq!(lab.links().len(), 2);
            let ids: Vec<_> = kernel.status().unwrap().iter().map(|a| a.link).collect();
            run("ip link set d0 name d1");
            until(&mut watch, &mut kernel, |s| link(s, "d1").is_some()).await;
            assert_eq!(kernel.status().unwrap().iter().map(|a| a.link).collect::<Vec<_>>(), ids);
            run("ip link delete d1");
            until(&mut watch, &mut kernel, |s| link(s, "d1").is_none()).await;
            assert_eq!(lab.links().len(), 0);
        });
    });
}

#[test]
fn a_device_that_leaves_takes_no_program_along() {
    lab(|lab| {
        let other = lab.namespace();
        let mut kernel = lab.open();
        runtime().block_on(async {
            let mut watch = Watch::open().unwrap();
            run("ip tuntap add d0 mode tap");
            until(&mut watch, &mut kernel, |s| link(s, "d0").is_some()).await;
            run(&format!("ip link set d0 netns {other}"));
            until(&mut watch, &mut kernel, |s| link(s, "d0").is_none()).await;
            assert_eq!(lab.links().len(), 0);
        });
        runtime().block_on(async {
            enter(&other);
            let ifindex = Watch::open().unwrap().snapshot().ports()[0].ifindex;
            assert_eq!(sys::query_tcx(ifindex, sys::attach_type::TCX_INGRESS).unwrap(), []);
            assert_eq!(sys::query_tcx(ifindex, sys::attach_type::TCX_EGRESS).unwrap(), []);
        });
    });
}

#[test]
fn a_pair_is_attached_to_when_its_other_end_has_left() {
    lab(|lab| {
        let pod = lab.namespace();
        let mut kernel = lab.open();
        runtime().block_on(async {
            let mut watch = Watch::open().unwrap();
            run("ip link add v0 type veth peer name v1");
            until(&mut watch, &mut kernel, |s| link(s, "v1").is_some()).await;
            assert_eq!(lab.links().len(), 0);
            run(&format!("ip link set v1 netns {pod}"));
            until(&mut watch, &mut kernel, |s| link(s, "v1").is_none()).await;
            assert_eq!(lab.links().len(), 2);
            run(&format!("ip link add v2 type veth peer name v3 netns {pod}"));
            until(&mut watch, &mut kernel, |s| link(s, "v2").is_some()).await;
            assert_eq!(lab.links().len(), 4);
        });
    });
}

#[test]
fn a_new_device_is_told_and_its_programs_attached() {
    lab(|lab| {
        let mut kernel = lab.open();
        let mut programs = kernel.take_programs();
        runtime().block_on(async {
            let mut watch = Watch::open().unwrap();
            for number in 0..5 {
                let name = format!("d{number}");
                run(&format!("ip tuntap add {name} mode tap"));
                let start = Instant::now();
                while link(watch.snapshot(), &name).is_none() {
                    watch.changed().await.unwrap();
                }
                let told = start.elapsed();
                let port = watch.snapshot().ports().into_iter().find(|port| port.name == name).unwrap();
                kernel.links.attach(&mut programs, &port).unwrap();
                // The kernel waits for a grace period of RCU in each attachment, but behind the point from which it counts.
                println!(
                    "{name} is told after {told:?}, both of its programs are attached after {:?}",
                    start.elapsed()
                );
            }
        });
        assert_eq!(lab.links().len(), 10);
    });
}

#[test]
fn bridges_ports_and_addresses_are_told() {
    lab(|_| {
        runtime().block_on(async {
            run("ip link add br0 type bridge nf_call_iptables 1 nf_call_ip6tables 0");
            run("ip tuntap add d0 mode tap");
            run("ip link set d0 master br0");
            run("ip address add 10.9.0.1/24 dev br0");
            run("ip -6 address add 2001:db8::9/64 dev br0 nodad");
            let mut watch = Watch::open().unwrap();
            let snapshot = watch.snapshot().clone();
            let bridge = link(&snapshot, "br0").unwrap();
            assert_eq!(bridge.nf_call, [true, false]);
            let row = snapshot.device_rows(&[], |_| false)[&link(&snapshot, "d0").unwrap().ifindex];
            assert_eq!(row.bridge, bridge.ifindex);
            assert_eq!(row.bridge_mac[..6], bridge.mac.unwrap());
            assert_eq!(IpAddr::from(row.masquerade_v4).to_string(), "10.9.0.1");
            assert_eq!(IpAddr::from(row.masquerade_v6).to_string(), "2001:db8::9");
            let addresses = snapshot.node_addresses();
            for (device, addr) in [("lo", "127.0.0.1"), ("lo", "::1"), ("br0", "10.9.0.1")] {
                assert!(addresses.contains(&(device.into(), addr.parse().unwrap())), "{addresses:?}");
            }
            run("ip address delete 10.9.0.1/24 dev br0");
            run("ip link set d0 nomaster");
            while watch.snapshot().links.values().any(|link| link.master.is_some())
                || watch.snapshot().node_addresses().iter().any(|(_, addr)| addr.to_string() == "10.9.0.1")
            {
                watch.changed().await.unwrap();
            }
            assert!(link(watch.snapshot(), "d0").is_some(), "a port that leaves its bridge is still there");
        });
    });
}

#[test]
fn lost_events_mean_a_new_list() {
    lab(|_| {
        runtime().block_on(async {
            let mut watch = Watch::with_buffer(4096).unwrap();
            // Nobody reads meanwhile: far more events than the buffer holds.
            let mut batch = String::new();
            for number in 0..60 {
                batch += &format!("link add d{number} type bridge\n");
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), batch).unwrap();
            run(&format!("ip -batch {}", file.path().display()));
            let deadline = Instant::now() + Duration::from_secs(20);
            while watch.snapshot().links.len() < 61 && Instant::now() < deadline {
                let _ = tokio::time::timeout(Duration::from_secs(1), watch.changed()).await;
            }
            assert_eq!(watch.snapshot().links.len(), 61);
        });
    });
}
