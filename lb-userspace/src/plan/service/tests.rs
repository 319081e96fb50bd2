use crate::model::ObjectName;

use super::*;
use crate::model::object::{ClientIpConfig, LoadBalancerIngress, Protocol, SessionAffinityConfig};
use crate::plan::Detected;

fn service(edit: impl FnOnce(&mut Service)) -> Service {
    let mut service = Service::default();
    service.metadata.name = ObjectName::new("shop", "web");
    service.spec.cluster_ip = Some("172.30.0.41".into());
    service.spec.cluster_ips = vec!["172.30.0.41".into()];
    service.spec.ports = vec![ServicePort { name: "http".into(), port: 80, ..ServicePort::default() }];
    edit(&mut service);
    service
}

fn backend(addr: &str, node: &str) -> Backend {
    Backend {
        port_name: "http".into(),
        protocol: Protocol::Tcp,
        addr: addr.parse().unwrap(),
        port: 8080,
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.into()),
        for_zones: Vec::new(),
        for_nodes: Vec::new(),
    }
}

fn node() -> NodeView {
    NodeView { name: "here".into(), detects_local: Detected { v4: true, v6: false }, ..NodeView::default() }
}

/// `address:port` → flags, internal and external indices.
fn frontends(service: &Service, backends: &[Backend], node: &NodeView) -> BTreeMap<String, (u32, Vec<u32>, Vec<u32>)> {
    let plan = plan_service(service, backends, node).0.unwrap();
    let text = |key: &FrontendKey| format!("{} {}", IpAddr::from(key.addr), key.port.number());
    let entry = |frontend: &PlannedFrontend| {
        (text(&frontend.key), (frontend.flags, frontend.internal.to_vec(), frontend.external.to_vec()))
    };
    plan.ports.iter().flat_map(|port| port.frontends.iter().map(entry)).collect()
}

#[test]
fn services_that_are_not_ours_have_no_plan() {
    type Edit = fn(&mut Service);
    let edits: [(&str, Edit); 6] = [
        ("proxy name", |s| s.metadata.labels = [("service.kubernetes.io/service-proxy-name", "")].into()),
        ("headless label", |s| s.metadata.labels = [("service.kubernetes.io/headless", "x")].into()),
        ("ExternalName", |s| s.spec.type_ = ServiceType::ExternalName),
        ("headless", |s| s.spec.cluster_ip = Some("None".into())),
        ("empty", |s| s.spec.cluster_ip = Some(String::new())),
        ("no address yet", |s| (s.spec.cluster_ip, s.spec.cluster_ips) = (None, Vec::new())),
    ];
    for (name, edit) in edits {
        assert_eq!(plan_service(&service(edit), &[], &node()), (None, Vec::new()), "{name}");
    }
}

#[test]
fn each_address_becomes_a_frontend_with_the_flags_of_its_kind() {
    let service = service(|s| {
        s.spec.external_ips = vec!["192.168.99.22".into()];
        s.spec.ports[0].node_port = 30001;
        s.spec.load_balancer_source_ranges = vec![" 203.0.113.000/025".into()];
        let ingress =
            |ip: &str, mode: Option<&str>| LoadBalancerIngress { ip: Some(ip.into()), ip_mode: mode.map(Into::into) };
        s.status.load_balancer.ingress =
            vec![ingress("1.2.3.4", Some("VIP")), ingress("5.6.7.8", None), ingress("9.9.9.9", Some("Proxy"))];
    });
    let found = frontends(&service, &[backend("10.0.0.1", "here"), backend("10.0.0.2", "there")], &node());
    let all = || vec![0, 1];
    let masquerade = frontend_flags::MASQUERADE;
    let restricted = masquerade | frontend_flags::SOURCE_RANGES;
    let want = [
        ("172.30.0.41 80", frontend_flags::CLUSTER_IP | frontend_flags::MASQUERADE_UNDETECTED),
        ("192.168.99.22 80", masquerade),
        ("1.2.3.4 80", restricted),
        ("5.6.7.8 80", restricted),
        ("0.0.0.0 30001", masquerade | frontend_flags::NODE_PORT),
    ];
    assert_eq!(found, want.map(|(key, flags)| (key.to_owned(), (flags, all(), all()))).into());
}

#[test]
fn local_policies_split_the_ranges_and_drop_where_others_have_endpoints() {
    let service = service(|s| {
        s.spec.internal_traffic_policy = TrafficPolicy::Local;
        s.spec.external_traffic_policy = TrafficPolicy::Local;
        s.spec.ports[0].node_port = 30001;
    });
    let inside = frontend_flags::CLUSTER_IP | frontend_flags::MASQUERADE_UNDETECTED;
    let outside = frontend_flags::EXTERNAL_LOCAL | frontend_flags::NODE_PORT;
    let (drop_in, drop_out) = (frontend_flags::INTERNAL_DROP, frontend_flags::EXTERNAL_DROP);
    let remote = backend("10.0.0.2", "there");
    for (backends, cluster, local, has_any) in [
        (vec![], vec![], vec![], false),
        (vec![remote.clone()], vec![0], vec![], true),
        (vec![backend("10.0.0.1", "here"), remote], vec![0, 1], vec![0], true),
    ] {
        let found = frontends(&service, &backends, &node());
        let drops = |flag| if has_any { flag } else { 0 };
        assert_eq!(
            found["172.30.0.41 80"],
            (inside | frontend_flags::INTERNAL_LOCAL | drops(drop_in), local.clone(), local.clone())
        );
        assert_eq!(found["0.0.0.0 30001"], (outside | drops(drop_out), cluster, local));
    }
}

#[test]
fn families_have_their_own_addresses_endpoints_and_ranges() {
    let service = service(|s| {
        s.spec.cluster_ips = vec!["172.30.0.41".into(), "fd00:172:30::41".into()];
        s.spec.ports[0].node_port = 30001;
        s.spec.load_balancer_source_ranges = vec!["2001:db8::/32".into()];
        let ingress = |ip: &str| LoadBalancerIngress { ip: Some(ip.into()), ip_mode: None };
        s.status.load_balancer.ingress = vec![ingress("1.2.3.4"), ingress("2001:db8:1::4")];
    });
    let node = NodeView { primary: vec!["2001:db8::1".parse().unwrap()], ..node() };
    let backends = [backend("fd00:10::2", "there"), backend("10.0.0.1", "here")];
    let found = frontends(&service, &backends, &node);
    let restricted = |key: &str| found[key].0 & frontend_flags::SOURCE_RANGES != 0;
    assert_eq!((&found["172.30.0.41 80"].1, &found["fd00:172:30::41 80"].1), (&vec![0], &vec![1]));
    assert_eq!((&found["0.0.0.0 30001"].1, &found[":: 30001"].1), (&vec![0], &vec![1]));
    let cluster_ip = frontend_flags::CLUSTER_IP;
    let flags = (cluster_ip | frontend_flags::MASQUERADE_UNDETECTED, cluster_ip);
    assert_eq!((found["172.30.0.41 80"].0, found["fd00:172:30::41 80"].0), flags);
    assert!(!restricted("1.2.3.4 80") && restricted("2001:db8:1::4 80"));
    let plan = plan_service(&service, &backends, &node).0.unwrap();
    let ranges = plan.ports[0].source_ranges.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        ranges,
        ["0:0:0:6::/128", "2001:db8::/32", "2001:db8:1::4/128"],
        "the node may speak to the load balancer's address, bound to it or not"
    );
    assert_eq!(plan.any_port.len(), 2);
    assert_eq!(plan.local_ready, 1);
}

#[test]
fn only_a_load_balancer_with_policy_local_has_a_health_check_and_each_family_its_count() {
    let backends = [
        backend("10.0.0.1", "here"),
        backend("10.0.0.1", "here"),
        backend("10.0.0.2", "there"),
        backend("fd00:10::2", "here"),
    ];
    for (type_, policy, port, cluster_ips, want) in [
        (
            ServiceType::LoadBalancer,
            TrafficPolicy::Local,
            30301,
            &["172.30.0.41", "fd00::41"][..],
            Some((Some(1), Some(1))),
        ),
        (ServiceType::LoadBalancer, TrafficPolicy::Local, 30301, &["172.30.0.41"], Some((Some(1), None))),
        (ServiceType::LoadBalancer, TrafficPolicy::Local, 0, &["172.30.0.41"], None),
        (ServiceType::LoadBalancer, TrafficPolicy::Cluster, 30301, &["172.30.0.41"], None),
        (ServiceType::NodePort, TrafficPolicy::Local, 30301, &["172.30.0.41"], None),
    ] {
        let service = service(|s| {
            s.spec.type_ = type_;
            s.spec.external_traffic_policy = policy;
            s.spec.health_check_node_port = port;
            s.spec.cluster_ips = cluster_ips.iter().map(|ip| (*ip).to_owned()).collect();
        });
        let check = plan_service(&service, &backends, &node()).0.unwrap().health_check;
        assert_eq!(check.map(|check| (check.v4, check.v6)), want, "{type_:?} {policy:?} {port} {cluster_ips:?}");
    }
}

#[test]
fn flows_may_stay_with_everything_that_serves() {
    let unready = Backend { ready: false, ..backend("10.0.0.3", "there") };
    let dead = Backend { ready: false, serving: false, ..backend("10.0.0.4", "there") };
    let going = Backend { ready: false, terminating: true, ..backend("10.0.0.2", "there") };
    let twice = Backend { terminating: true, ready: false, ..backend("10.0.0.1", "here") };
    let backends = [unready, dead, going, twice, backend("10.0.0.1", "here"), backend("10.0.0.1", "here")];
    let port = plan_service(&service(|_| ()), &backends, &node()).0.unwrap().ports.remove(0);
    let stay: Vec<_> = port.endpoints.iter().map(|endpoint| endpoint.addr.to_string()).collect();
    assert_eq!(stay, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    assert_eq!(*port.frontends[0].internal, [0], "a ready entry beats a terminating one of the same endpoint");
}

#[test]
fn what_cannot_be_read_is_reported_and_the_rest_is_planned() {
    let service = service(|s| {
        s.spec.external_ips = vec!["nonsense".into(), "192.168.99.022".into(), "2001:db8::9".into()];
        s.spec.load_balancer_source_ranges = vec!["10.0.0.0/40".into(), "10.0.0.0/8".into()];
        s.status.load_balancer.ingress =
            vec![LoadBalancerIngress { ip: Some("1.2.3".into()), ip_mode: None }, LoadBalancerIngress::default()];
    });
    let (plan, problems) = plan_service(&service, &[], &node());
    assert_eq!(plan.unwrap().ports[0].frontends.len(), 2);
    let fields: Vec<_> = problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "spec.externalIPs[0]",
            "status.loadBalancer.ingress[0]",
            "spec.loadBalancerSourceRanges[0]",
            "spec.externalIPs[2]"
        ]
    );
    assert!(problems.iter().all(|problem| problem.object == "Service shop/web"));
}

#[test]
fn clients_stay_for_three_hours_or_as_long_as_the_service_says() {
    let config = |seconds| {
        let client_ip = Some(ClientIpConfig { timeout_seconds: seconds });
        Some(SessionAffinityConfig { client_ip })
    };
    for (affinity, config, expected, problems) in [
        (SessionAffinity::None, config(Some(10)), 0, 0),
        (SessionAffinity::ClientIP, None, 10_800, 0),
        (SessionAffinity::ClientIP, Some(SessionAffinityConfig::default()), 10_800, 0),
        (SessionAffinity::ClientIP, config(None), 10_800, 0),
        (SessionAffinity::ClientIP, config(Some(1)), 1, 0),
        (SessionAffinity::ClientIP, config(Some(86_400)), 86_400, 0),
        (SessionAffinity::ClientIP, config(Some(0)), 10_800, 1),
        (SessionAffinity::ClientIP, config(Some(86_401)), 10_800, 1),
    ] {
        let service = service(|s| {
            (s.spec.session_affinity, s.spec.session_affinity_config) = (affinity, config.clone());
        });
        let (plan, found) = plan_service(&service, &[], &node());
        assert_eq!((plan.unwrap().ports[0].affinity, found.len()), (expected, problems), "{affinity:?} {config:?}");
    }
}

#[test]
fn endpoints_know_the_sets_that_affinity_asks_for() {
    let backends = [
        backend("10.0.0.1", "here"),
        Backend { ready: false, terminating: true, ..backend("10.0.0.2", "here") },
        backend("10.0.0.3", "there"),
        Backend { ready: false, ..backend("fd00::1", "here") },
        Backend { ready: false, terminating: true, ..backend("fd00::2", "there") },
    ];
    let sets = |affinity| {
        let service = service(|s| {
            s.spec.session_affinity = affinity;
            s.spec.cluster_ips.push("fd00:30::41".into());
        });
        let plan = plan_service(&service, &backends, &node()).0.unwrap();
        plan.ports[0].endpoints.iter().map(|it| (it.eligible.cluster, it.eligible.local)).collect::<Vec<_>>()
    };
    let (both, cluster, none) = ((true, true), (true, false), (false, false));
    assert_eq!(
        sets(SessionAffinity::ClientIP),
        [both, none, cluster, none, cluster],
        "also by the terminating fallback"
    );
    assert_eq!(sets(SessionAffinity::None), [none; 5]);
}

#[test]
fn each_port_whose_endpoints_are_all_elsewhere_lacks_local_ones() {
    let service = service(|s| {
        s.spec.internal_traffic_policy = TrafficPolicy::Local;
        s.spec.ports.push(ServicePort { name: "admin".into(), port: 81, ..ServicePort::default() });
        s.spec.ports.push(ServicePort { name: "dead".into(), port: 82, ..ServicePort::default() });
    });
    let admin = |node| Backend { port_name: "admin".into(), ..backend("10.1.1.2", node) };
    for (http, admin, expected) in [("far", admin("far"), 2), ("here", admin("far"), 1), ("here", admin("here"), 0)] {
        let plan = plan_service(&service, &[backend("10.1.1.1", http), admin], &node()).0.unwrap();
        assert_eq!(plan.ports_without_local_endpoints(true), (expected, 0));
        assert_eq!(plan.ports_without_local_endpoints(false), (0, 0));
    }
}
