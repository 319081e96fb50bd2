//! Programs at devices.

use super::*;
use crate::kernel::links::Mechanism;

#[test]
fn programs_are_attached_by_the_mechanism_that_was_asked_for() {
    for (attach, mechanism) in
        [(Attach::Auto, Mechanism::Tcx), (Attach::Tcx, Mechanism::Tcx), (Attach::Clsact, Mechanism::Clsact)]
    {
        lab(move |lab| {
            run("ip link add d0 type bridge");
            run("ip tuntap add t0 mode tun");
            let mut kernel = Kernel::open(Options { attach, ..lab.options() }).unwrap();
            kernel.attach_devices(&ports()).unwrap();
            let status = kernel.status().unwrap();
            assert_eq!(status.len(), 4);
            assert!(status.iter().all(|attached| attached.mechanism == Some(mechanism) && attached.live), "{status:?}");
        });
    }
}

#[test]
fn ours_is_first_on_the_way_in_and_last_on_the_way_out() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        let mut other = Programs::load_for_test(lab);
        let port = ports().remove(0);
        for (hook, at) in [("ingress", sys::attach_type::TCX_INGRESS), ("egress", sys::attach_type::TCX_EGRESS)] {
            let program = other.classifier_fd(hook, true).unwrap();
            let link = sys::link_create(program.as_fd(), sys::Target::Device(port.ifindex), at, 0).unwrap();
            sys::pin(link.as_fd(), &lab.bpffs().join(format!("foreign-{hook}"))).unwrap();
        }
        drop(other);
        let mut kernel = lab.open();
        kernel.attach_devices(&ports()).unwrap();
        let mut status = kernel.status().unwrap().into_iter().map(|a| (a.program, a.before));
        let (program, before) = status.next().unwrap();
        assert_eq!((program.as_str(), before.len()), ("egress", 1));
        assert!(before[0].starts_with("egress (program "), "{before:?}");
        assert_eq!(status.next(), Some(("ingress".into(), Vec::new())));
    });
}

impl Programs {
    /// Programs of someone else.
    fn load_for_test(lab: &Lab) -> Self {
        lab.open().take_programs()
    }
}

#[test]
fn a_stale_link_is_replaced_by_one_of_the_new_device() {
    lab(|lab| {
        run("ip link add d0 index 77 type bridge");
        let mut kernel = lab.open();
        kernel.attach_devices(&ports()).unwrap();
        let before = kernel.status().unwrap();
        drop(kernel);
        run("ip link delete d0");
        run("ip link add d0 index 77 type bridge");
        let mut kernel = lab.open();
        assert!(kernel.status().unwrap().iter().all(|attached| !attached.live));
        kernel.attach_devices(&ports()).unwrap();
        let after = kernel.status().unwrap();
        assert_eq!(after.len(), 2);
        for (before, after) in before.iter().zip(&after) {
            assert_ne!(before.link, after.link);
            assert!(after.live);
        }
    });
}

#[test]
fn links_of_devices_that_are_gone_are_unpinned_at_the_next_start() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        let mut kernel = lab.open();
        kernel.attach_devices(&ports()).unwrap();
        assert_eq!(lab.links().len(), 2);
        drop(kernel);
        run("ip link delete d0");
        lab.open().attach_devices(&ports()).unwrap();
        assert_eq!(lab.links(), Vec::<String>::new());
    });
}

#[test]
fn a_change_of_mechanism_leaves_one_of_each_program() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        for attach in [Attach::Clsact, Attach::Clsact, Attach::Tcx, Attach::Clsact, Attach::Tcx] {
            let mut kernel = Kernel::open(Options { attach, ..lab.options() }).unwrap();
            kernel.attach_devices(&ports()).unwrap();
            assert_eq!(kernel.status().unwrap().len(), 2, "{attach:?}");
            let clsact = run("tc filter show dev d0 ingress").contains("ingress");
            assert_eq!(clsact, attach == Attach::Clsact);
        }
        assert!(!run("tc qdisc show dev d0").contains("clsact"));
    });
}

#[test]
fn a_qdisc_of_someone_else_stays() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        run("tc qdisc add dev d0 clsact");
        let mut kernel = Kernel::open(Options { attach: Attach::Clsact, ..lab.options() }).unwrap();
        kernel.attach_devices(&ports()).unwrap();
        drop(kernel);
        cleanup::cleanup(&lab.bpffs()).unwrap();
        assert!(run("tc qdisc show dev d0").contains("clsact"));
        assert!(!run("tc filter show dev d0 ingress").contains("bpf"));
    });
}

#[test]
fn egress_is_behind_the_clsact_filters_of_others() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        run("tc qdisc add dev d0 clsact");
        run("tc filter add dev d0 egress prio 7 protocol all u32 match u32 0 0 classid 1:1");
        let mut kernel = lab.open();
        kernel.attach_devices(&ports()).unwrap();
        let kinds = |kernel: &Kernel| {
            kernel.status().unwrap().into_iter().map(|a| (a.program, a.mechanism, a.live)).collect::<Vec<_>>()
        };
        let (egress, ingress) = (String::from("egress"), String::from("ingress"));
        assert_eq!(
            kinds(&kernel),
            [(egress.clone(), Some(Mechanism::Clsact), true), (ingress.clone(), Some(Mechanism::Tcx), true)]
        );
        run("tc filter delete dev d0 egress prio 7 protocol all u32");
        drop(kernel);
        let mut kernel = lab.open();
        kernel.attach_devices(&ports()).unwrap();
        assert_eq!(kinds(&kernel), [(egress, Some(Mechanism::Tcx), true), (ingress, Some(Mechanism::Tcx), true)]);
    });
}

#[test]
fn a_filter_that_someone_removed_is_attached_anew() {
    lab(|lab| {
        run("ip link add d0 type bridge");
        for _ in 0..2 {
            let mut kernel = Kernel::open(Options { attach: Attach::Clsact, ..lab.options() }).unwrap();
            kernel.attach_devices(&ports()).unwrap();
            assert!(kernel.status().unwrap().iter().all(|attached| attached.live));
            run("tc qdisc delete dev d0 clsact");
            assert!(kernel.status().unwrap().iter().all(|attached| !attached.live));
        }
    });
}

#[test]
fn this_kernel_takes_every_program_without_a_folder_of_pins() {
    let found = preflight::preflight().unwrap();
    let refused: Vec<_> = found.trials.iter().filter(|trial| trial.result.is_err()).collect();
    assert!(refused.is_empty(), "{refused:?}");
    assert_eq!(found.trials.len(), 4 + object::SOCKET_HOOKS.len());
}

#[test]
fn the_kernel_says_whether_it_knows_the_checksum_flag() {
    let flag = sys::ipv6_checksum_flag().unwrap();
    let version = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    if (numbers.next(), numbers.next()) >= (Some(6), Some(16)) {
        assert_eq!(flag, 0x80);
    }
}
