//! Files as people have them, and what they mean.

use super::*;
use crate::plan::node::{LocalDetector, NodeOptions};

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
const KUBEADM: &str = include_str!("../../tests/data/config/kubeadm.conf");
const KIND: &str = include_str!("../../tests/data/config/kind.conf");

fn config(text: &str) -> Config {
    Config::of_file(&format!("{HEAD}{text}")).unwrap_or_else(|error| panic!("{text}: {error:#}")).0
}

fn fields(text: &str) -> String {
    config(text).problems().into_iter().map(|problem| problem.field).collect::<Vec<_>>().join(" ")
}

#[test]
fn what_kubeadm_and_kind_write_means_the_defaults() {
    for (text, min) in [(KUBEADM, Some(32_768)), (KIND, Some(0))] {
        let (found, warnings) = Config::of_file(text).unwrap();
        assert_eq!((warnings, found.problems()), (Vec::new(), Vec::new()));
        let mut want = Config::of_nothing();
        want.fields.conntrack.max_per_core = min;
        want.fields.client_connection.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf".to_owned();
        want.fields.cluster_cidr.clone_from(&found.fields.cluster_cidr);
        assert_eq!(found, want);
    }
    let nets = ["10.244.0.0/16", "fd00:10:244::/56"].map(|net| net.parse().unwrap());
    let detector = LocalDetector::ClusterCidr(nets.into());
    let want = NodeOptions { detector, localhost_node_ports: true, ..NodeOptions::default() };
    assert_eq!(Config::of_file(KUBEADM).unwrap().0.node_options(), want);
}

#[test]
fn null_and_nothing_and_zero_are_the_default() {
    let text = "
bindAddress: null
healthzBindAddress: ''
metricsBindAddress: \"\"
mode: null
iptables: null
nftables: {syncPeriod: 0, minSyncPeriod: ''}
ipvs: {syncPeriod: null, excludeCIDRs: null}
conntrack: {maxPerCore: null, tcpCloseWaitTimeout: null}
clientConnection: {qps: 0, burst: 0, contentType: null}
configSyncPeriod: 0s
featureGates: null
logging: {format: '', flushFrequency: 0s}
nodePortAddresses: null
oomScoreAdj: null
";
    assert_eq!(config(text), Config::of_nothing());
    assert_eq!(config(""), Config::of_nothing());
    let nothing = Config::of_nothing();
    assert_eq!(nothing.healthz_address(), Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(nothing.metrics_address(), Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!(nothing.mode(), ProxyMode::Iptables);
}

#[test]
fn an_ipv6_address_moves_the_other_two_addresses() {
    for (text, healthz, metrics) in [
        ("bindAddress: '::'", "[::]:10256", "[::1]:10249"),
        ("bindAddress: 192.168.0.2", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("bindAddress: '::ffff:192.168.0.2'", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("bindAddress: fd00::1\nmetricsBindAddress: 0.0.0.0", "[::]:10256", "0.0.0.0:10249"),
        ("healthzBindAddress: 127.0.0.1:1\nmetricsBindAddress: '::1'", "127.0.0.1:1", "[::1]:10249"),
    ] {
        let fields = config(text).fields;
        assert_eq!(
            (fields.healthz_bind_address.as_str(), fields.metrics_bind_address.as_str()),
            (healthz, metrics),
            "{text}"
        );
    }
}

#[test]
fn what_the_modes_share_is_read_from_the_section_of_the_mode() {
    for (mode, all, sync, min) in
        [("iptables", true, 10, 2), ("ipvs", true, 20, 3), ("nftables", false, 40, 4), ("''", true, 10, 2)]
    {
        let found = config(&format!(
            "mode: {mode}
iptables: {{masqueradeAll: true, syncPeriod: 10s, minSyncPeriod: 2s}}
ipvs: {{syncPeriod: 20s, minSyncPeriod: 3s}}
nftables: {{masqueradeAll: false, syncPeriod: 40s, minSyncPeriod: 4s}}"
        ));
        assert_eq!(
            (found.masquerade_all, found.sync_period, found.min_sync_period),
            (all, GoDuration::from_secs(sync), GoDuration::from_secs(min)),
            "{mode}"
        );
        assert_eq!(found.node_options().masquerade_all, all);
    }
    assert_eq!(config("mode: ipvs").min_sync_period, GoDuration::ZERO);
    assert_eq!(config("mode: nftables").min_sync_period, GoDuration::from_secs(1));
}

#[test]
fn node_ports_of_nftables_are_primary_where_nothing_is_said() {
    for (text, want) in [
        ("mode: nftables", &["primary"][..]),
        ("mode: nftables\nnodePortAddresses: []", &["primary"]),
        ("mode: nftables\nnodePortAddresses: [all]", &["all"]),
        ("mode: iptables", &[]),
        ("mode: ipvs", &[]),
    ] {
        assert_eq!(config(text).node_options().node_port_addresses, want, "{text}");
    }
}

#[test]
fn detectors_are_named_by_their_mode() {
    for (text, want) in [
        ("detectLocalMode: NodeCIDR", LocalDetector::NodeCidr),
        ("detectLocalMode: NodeCIDR\nclusterCIDR: nonsense", LocalDetector::NodeCidr),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
            LocalDetector::BridgeInterface("cni0".into()),
        ),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}",
            LocalDetector::InterfaceNamePrefix("veth".into()),
        ),
        ("detectLocalMode: ClusterCIDR", LocalDetector::None),
        ("clusterCIDR: 010.0.0.0/8", LocalDetector::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()])),
    ] {
        assert_eq!((fields(text).as_str(), config(text).node_options().detector), ("", want), "{text}");
    }
}

#[test]
fn what_kube_proxy_refuses_is_named_with_its_field() {
    for (text, want) in [
        ("mode: userspace", "mode"),
        ("mode: kernelspace", "mode"),
        ("mode: ipvs\nfeatureGates: {KubeProxyIPVS: false}", "mode"),
        ("bindAddress: here", "bindAddress"),
        ("healthzBindAddress: 1.2.3.4:0", "healthzBindAddress"),
        ("healthzBindAddress: localhost:10256", "healthzBindAddress"),
        ("metricsBindAddress: '1.2.3.4:70000'", "metricsBindAddress"),
        ("metricsBindAddress: '::1:80:90:'", "metricsBindAddress"),
        ("oomScoreAdj: -1001", "oomScoreAdj"),
        ("conntrack: {maxPerCore: -1, min: -1}", "conntrack.maxPerCore conntrack.min"),
        (
            "conntrack: {tcpEstablishedTimeout: -1s, udpTimeout: -1s}",
            "conntrack.tcpEstablishedTimeout conntrack.udpTimeout",
        ),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit"),
        ("nftables: {masqueradeBit: 32}", ""),
        ("mode: nftables\nnftables: {masqueradeBit: -1}", "nftables.masqueradeBit"),
        ("iptables: {syncPeriod: 1s, minSyncPeriod: 2s}", "iptables.minSyncPeriod"),
        ("nftables: {syncPeriod: 1s, minSyncPeriod: 2s}", ""),
        ("mode: nftables\nnftables: {syncPeriod: 1s, minSyncPeriod: 2s}", "nftables.minSyncPeriod"),
        ("iptables: {syncPeriod: -1s, minSyncPeriod: -2s}", "iptables.syncPeriod iptables.minSyncPeriod"),
        ("configSyncPeriod: -1s", "configSyncPeriod"),
        ("mode: ipvs\nipvs: {tcpTimeout: -1s, excludeCIDRs: [x]}", "ipvs.tcpTimeout ipvs.excludeCIDRs[0]"),
        ("ipvs: {tcpTimeout: -1s, excludeCIDRs: [x]}", ""),
        ("clientConnection: {burst: -1}", "clientConnection.burst"),
        ("nodePortAddresses: [primary, 10.0.0.0/8, primary, 10.0.0.1]", "nodePortAddresses[2] nodePortAddresses[3]"),
        ("clusterCIDR: 10.0.0.0", "clusterCIDR[0]"),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", "clusterCIDR"),
        ("clusterCIDR: '10.0.0.0/8,fd00::/8,fd01::/16'", "clusterCIDR"),
        ("detectLocalMode: Magic", "detectLocalMode"),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface"),
        ("detectLocalMode: InterfaceNamePrefix", "detectLocal.interfaceNamePrefix"),
        ("showHiddenMetricsForVersion: next", "showHiddenMetricsForVersion"),
        ("logging: {format: xml}", "logging.format"),
        ("logging: {flushFrequency: -1s}", "logging.flushFrequency"),
        ("logging: {format: json, vmodule: [{filePattern: a, verbosity: 1}]}", "logging.vmodule"),
        ("logging: {vmodule: [{filePattern: '', verbosity: 1}]}", "logging.vmodule[0]"),
        (
            "logging: {options: {text: {splitStream: true}, json: {infoBufferSize: 1Ki}}}",
            "logging.options.json.infoBufferSize logging.options.text.splitStream",
        ),
        ("featureGates: {LoggingAlphaOptions: true}\nlogging: {options: {text: {splitStream: true}}}", ""),
    ] {
        assert_eq!(fields(text), want, "{text}");
    }
}

#[test]
fn settings_without_effect_are_named() {
    let text = format!(
        "{HEAD}portRange: 1-2\nwinkernel: {{enableDSR: true}}\nipvs: {{scheduler: rr}}\nfeatureGates: {{SomeGate: true}}"
    );
    let (found, warnings) = Config::of_file(&text).unwrap();
    assert_eq!(warnings, ["without effect here: portRange, ipvs.scheduler, winkernel, featureGates.SomeGate"]);
    assert_eq!(found.fields.port_range, "");
}

#[test]
fn the_configuration_in_force_is_written_as_kube_proxy_writes_it() {
    let want = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: '::'
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: \"\"
  burst: 10
  contentType: application/vnd.kubernetes.protobuf
  kubeconfig: \"\"
  qps: 2.5
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 15m0s
conntrack:
  maxPerCore: 32768
  min: 131072
  tcpBeLiberal: false
  tcpCloseWaitTimeout: 1h0m0s
  tcpEstablishedTimeout: 24h0m0s
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: \"\"
  interfaceNamePrefix: \"\"
detectLocalMode: ClusterCIDR
enableProfiling: false
featureGates:
  A: true
healthzBindAddress: '[::]:10256'
hostnameOverride: \"12\"
iptables:
  localhostNodePorts: true
  masqueradeAll: false
  masqueradeBit: 14
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: \"\"
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 5s
  format: text
  options:
    json:
      infoBufferSize: \"0\"
    text:
      infoBufferSize: \"0\"
  verbosity: 2
  vmodule:
  - filePattern: a
    verbosity: 3
metricsBindAddress: '[::1]:10249'
mode: nftables
nftables:
  masqueradeAll: true
  masqueradeBit: 14
  minSyncPeriod: 1s
  syncPeriod: 30s
nodePortAddresses:
- primary
oomScoreAdj: -999
portRange: \"\"
showHiddenMetricsForVersion: \"\"
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: \"\"
  rootHnsEndpointName: \"\"
  sourceVip: \"\"
";
    let found = config(
        "bindAddress: '::'\nclusterCIDR: 10.244.0.0/16\nmode: nftables\nnftables: {masqueradeAll: true}\nfeatureGates: {A: true}
clientConnection: {qps: 2.5}\nhostnameOverride: '12'\nlogging: {verbosity: 2, vmodule: [{filePattern: a, verbosity: 3}]}",
    );
    assert_eq!(found.to_yaml(), want);
    assert_eq!(Config::of_file(want).unwrap().0, found);
    assert_eq!(found.to_json()["nftables"]["masqueradeAll"], true);
}
