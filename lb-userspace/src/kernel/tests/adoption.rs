//! A new agent takes over from the one before.

use super::*;

fn map_ids(lab: &Lab) -> Vec<(String, u32)> {
    let mut ids = Vec::new();
    for dir in ["v1/maps/1", "v1/flows"] {
        for name in folder::names(&lab.bpffs().join(dir)).unwrap() {
            let map = sys::Map::open(&lab.bpffs().join(dir).join(&name)).unwrap();
            ids.push((name, map.shape().id));
        }
    }
    ids
}

#[test]
fn a_start_adopts_maps_and_links_and_replaces_programs() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        let mut kernel = lab.open();
        kernel.apply(&[Write::NodeAddress(lb_common::addr::Addr::UNSPECIFIED_V6, 3)]).unwrap();
        kernel.attach_devices(&ports()).unwrap();
        kernel.attach_sockets().unwrap();
        let (memory, maps, before) = (kernel.memory().unwrap(), map_ids(lab), kernel.status().unwrap());
        assert_eq!(before.len(), 2 + 8);
        drop(kernel);

        let mut kernel = lab.open();
        assert_eq!(kernel.memory().unwrap(), memory);
        assert_eq!(kernel.status().unwrap(), before, "nothing changes before the caller says so");
        kernel.attach_devices(&ports()).unwrap();
        kernel.attach_sockets().unwrap();
        let after = kernel.status().unwrap();
        assert_eq!(map_ids(lab), maps);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before.link, after.link);
            assert_ne!(before.program_id, after.program_id);
            assert!(after.live);
        }
    });
}

#[test]
fn a_second_agent_is_told_who_has_the_folder() {
    lab(|lab| {
        let _kernel = lab.open();
        let error = Kernel::open(lab.options()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {} (", std::process::id())), "{error}");
        assert!(error.contains("stop it first"), "{error}");
    });
}

#[test]
fn a_map_of_another_shape_is_refused_with_a_remedy() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.attach_sockets().unwrap();
        drop(kernel);
        let path = lab.bpffs().join("v1/maps/1/DEVICES");
        fs::remove_file(&path).unwrap();
        let shape = sys::MapShape {
            map_type: sys::map_type::HASH,
            id: 0,
            key_size: 4,
            value_size: 52,
            max_entries: 8,
            flags: sys::NO_PREALLOC,
        };
        sys::pin(sys::Map::create("DEVICES", shape).unwrap().fd(), &path).unwrap();
        let error = Kernel::open(lab.options()).unwrap_err().to_string();
        assert!(error.contains("DEVICES") && error.contains("4 + 52 bytes"), "{error}");
        assert!(error.contains("fairlead cleanup"), "{error}");
    });
}

#[test]
fn an_unfinished_generation_is_cleared_away_and_an_old_one_after_attachment() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        let mut kernel = lab.open();
        kernel.attach_devices(&ports()).unwrap();
        drop(kernel);
        let maps = lab.bpffs().join("v1/maps");
        // As if an agent had ended between the completion of generation 2 and the last link.
        fs::create_dir(maps.join("2")).unwrap();
        for name in folder::names(&maps.join("1")).unwrap() {
            let map = sys::Map::open(&maps.join("1").join(&name)).unwrap();
            sys::pin(map.fd(), &maps.join("2").join(&name)).unwrap();
        }
        fs::create_dir(maps.join("new-3")).unwrap();
        let mut kernel = lab.open();
        assert_eq!(folder::names(&maps).unwrap(), ["1", "2"]);
        kernel.attach_devices(&ports()).unwrap();
        assert_eq!(folder::names(&maps).unwrap(), ["2"]);
    });
}

#[test]
fn cleanup_leaves_nothing() {
    for attach in [Attach::Tcx, Attach::Clsact] {
        lab(move |lab| {
            run("ip link add d0 type bridge");
            let mut kernel = Kernel::open(Options { attach, ..lab.options() }).unwrap();
            kernel.attach_devices(&ports()).unwrap();
            kernel.attach_sockets().unwrap();
            drop(kernel);
            assert_eq!(run("tc qdisc show dev d0").contains("clsact"), attach == Attach::Clsact);
            cleanup::cleanup(&lab.bpffs()).unwrap();
            assert!(!lab.bpffs().exists());
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(lab.bpffs().to_str().unwrap()));
            let qdiscs = run("tc qdisc show dev d0");
            assert!(!qdiscs.contains("clsact"), "{qdiscs}");
            for hook in [sys::attach_type::TCX_INGRESS, sys::attach_type::TCX_EGRESS] {
                assert_eq!(sys::query_tcx(ports()[0].ifindex, hook).unwrap(), []);
            }
            // Nothing to remove is no error.
            cleanup::cleanup(&lab.bpffs()).unwrap();
        });
    }
}

#[test]
fn socket_programs_are_detached_where_they_are_off() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.attach_sockets().unwrap();
        assert_eq!(kernel.status().unwrap().len(), 8);
        drop(kernel);
        let mut kernel = Kernel::open(Options { socket_lb: SocketLb::Off, ..lab.options() }).unwrap();
        kernel.attach_sockets().unwrap();
        assert_eq!(kernel.status().unwrap(), []);
    });
}
