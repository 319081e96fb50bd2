//! Command lines, and what they make.

use std::ffi::OsString;

use clap::Parser;

use super::*;

#[derive(Parser)]
#[command(args_override_self = true)]
struct Line {
    #[command(flatten)]
    flags: Flags,
}

/// The flags of a command line as the binary reads it.
fn flags(line: &str) -> Flags {
    try_flags(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn try_flags(line: &str) -> Result<Flags> {
    let given = std::iter::once("run").chain(line.split(' ').filter(|arg| !arg.is_empty()));
    let Arguments { mut all, .. } = Arguments::of_process(given.map(OsString::from));
    if all.get(1).is_some_and(|arg| arg == "run") {
        all.remove(1);
    }
    Ok(Line::try_parse_from(all)?.flags)
}

fn config(line: &str) -> Config {
    flags(line).config(None).unwrap_or_else(|error| panic!("{line}: {error:#}")).0
}

#[test]
fn no_flags_are_an_empty_file() {
    assert_eq!(config(""), Config::of_nothing());
}

#[test]
fn values_are_written_as_go_s_pflag_takes_them() {
    for lines in [
        &[
            "--masquerade-all",
            "--masquerade-all=true",
            "--masquerade_all=T",
            "--masquerade-all=false --masquerade-all=1",
        ][..],
        &["--iptables-localhost-nodeports=false", "--iptables-localhost-nodeports=0"],
        &["-v=2", "-v 2", "-v2", "--v=2", "--v 2", "-v=5 --v=2"],
        &["--oom-score-adj -5", "--oom-score-adj=-5", "--oom_score_adj -0x5"],
        &["--nodeport-addresses 10.0.0.0/8,primary", "--nodeport-addresses=10.0.0.0/8 --nodeport-addresses=primary"],
        &["--feature-gates A=true,B=false", "--feature-gates A=false --feature-gates=B=0,A=1"],
        &["--conntrack-min=131_073", "--conntrack-min 0x20001"],
        &["--iptables-sync-period 90s", "--iptables-sync-period=1m30s"],
    ] {
        let all: Vec<Config> = lines.iter().map(|line| config(line)).collect();
        assert!(all.iter().all(|one| *one == all[0]), "{lines:?}");
        assert_ne!(all[0], Config::of_nothing(), "{lines:?}");
    }
}

#[test]
fn each_flag_has_its_field() {
    for (line, text) in [
        ("--proxy-mode nftables", "mode: nftables"),
        ("--kubeconfig /k", "clientConnection: {kubeconfig: /k}"),
        ("--kube-api-qps 7.5 --kube-api-burst 9", "clientConnection: {qps: 7.5, burst: 9}"),
        ("--kube-api-content-type application/json", "clientConnection: {contentType: application/json}"),
        ("--hostname-override Node1", "hostnameOverride: node1"),
        ("--bind-address 192.168.0.2", "bindAddress: 192.168.0.2"),
        ("--healthz-bind-address 127.0.0.1", "healthzBindAddress: 127.0.0.1:10256"),
        ("--healthz-bind-address [::1]:80", "healthzBindAddress: '[::1]:80'"),
        ("--metrics-bind-address ::", "metricsBindAddress: '[::]:10249'"),
        ("--healthz-bind-address 127.0.0.1 --healthz-port 81", "healthzBindAddress: 127.0.0.1:81"),
        ("--bind-address-hard-fail --profiling", "bindAddressHardFail: true\nenableProfiling: true"),
        ("--show-hidden-metrics-for-version 1.36", "showHiddenMetricsForVersion: '1.36'"),
        ("--feature-gates A=true", "featureGates: {A: true}"),
        ("--detect-local-mode NodeCIDR", "detectLocalMode: NodeCIDR"),
        ("--cluster-cidr 10.244.0.0/16,fd00::/56", "clusterCIDR: 10.244.0.0/16,fd00::/56"),
        (
            "--detect-local-mode BridgeInterface --pod-bridge-interface cni0",
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
        ),
        (
            "--detect-local-mode InterfaceNamePrefix --pod-interface-name-prefix veth",
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}",
        ),
        ("--nodeport-addresses=primary,all", "nodePortAddresses: [primary, all]"),
        ("--masquerade-all", "iptables: {masqueradeAll: true}"),
        ("--masquerade-all --proxy-mode nftables", "mode: nftables\nnftables: {masqueradeAll: true}"),
        ("--iptables-masquerade-bit 5", "iptables: {masqueradeBit: 5}"),
        ("--iptables-localhost-nodeports=false", "iptables: {localhostNodePorts: false}"),
        ("--iptables-sync-period 9s --iptables-min-sync-period 2s", "iptables: {syncPeriod: 9s, minSyncPeriod: 2s}"),
        ("--iptables-sync-period 9s --proxy-mode nftables", "mode: nftables\nnftables: {syncPeriod: 9s}"),
        (
            "--ipvs-sync-period 9s --ipvs-min-sync-period 2s --proxy-mode ipvs",
            "mode: ipvs\nipvs: {syncPeriod: 9s, minSyncPeriod: 2s}",
        ),
        (
            "--ipvs-scheduler rr --ipvs-strict-arp --ipvs-exclude-cidrs 10.0.0.0/8",
            "ipvs: {scheduler: rr, strictARP: true, excludeCIDRs: [10.0.0.0/8]}",
        ),
        (
            "--ipvs-tcp-timeout 1s --ipvs-tcpfin-timeout 2s --ipvs-udp-timeout 3s",
            "ipvs: {tcpTimeout: 1s, tcpFinTimeout: 2s, udpTimeout: 3s}",
        ),
        ("--oom-score-adj=0", "oomScoreAdj: 0"),
        ("--conntrack-max-per-core 0 --conntrack-min 5", "conntrack: {maxPerCore: 0, min: 5}"),
        (
            "--conntrack-tcp-timeout-established 0 --conntrack-tcp-timeout-close-wait 2s",
            "conntrack: {tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 2s}",
        ),
        (
            "--conntrack-tcp-be-liberal --conntrack-udp-timeout 3s --conntrack-udp-timeout-stream 4s",
            "conntrack: {tcpBeLiberal: true, udpTimeout: 3s, udpStreamTimeout: 4s}",
        ),
        ("--config-sync-period 5m", "configSyncPeriod: 5m"),
        ("-v 4 --logging-format json", "logging: {verbosity: 4, format: json}"),
        ("--vmodule a=1,b=2", "logging: {vmodule: [{filePattern: a, verbosity: 1}, {filePattern: b, verbosity: 2}]}"),
        ("--log-flush-frequency 1s", "logging: {flushFrequency: 1s}"),
    ] {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let want = Config::of_file(&format!("{head}{text}")).unwrap().0;
        assert_eq!(config(line), want, "{line}");
        assert_ne!(want, Config::of_nothing(), "{line}");
    }
}

#[test]
fn an_address_that_is_empty_or_has_port_0_is_off() {
    for line in ["--metrics-bind-address= --healthz-bind-address=", "--metrics-port 0 --healthz-port=0"] {
        let found = config(line);
        assert_eq!((found.metrics_address(), found.healthz_address()), (None, None), "{line}");
    }
    assert_eq!(config("--bind-address=").fields.bind_address, "0.0.0.0");
}

#[test]
fn beside_a_file_only_few_flags_count() {
    let file = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: in-file
logging: {verbosity: 1, format: text, vmodule: [{filePattern: b, verbosity: 2}]}
";
    let beside = |line: &str| flags(line).config(Some(file)).unwrap();
    let (plain, warnings) = beside("");
    assert_eq!((plain.node_name().as_deref(), warnings.len()), (Some("in-file"), 1));
    let (found, warnings) = beside("--proxy-mode ipvs --masquerade-all --oom-score-adj 0");
    assert_eq!(found, plain);
    assert!(warnings.iter().any(|warning| warning.starts_with("--config is given")), "{warnings:?}");
    let (found, warnings) =
        beside("--hostname-override= --master https://x -v=3 --vmodule a=1 --hostname-override Flag");
    assert!(!warnings.iter().any(|warning| warning.starts_with("--config is given")), "{warnings:?}");
    assert_eq!(found.node_name().as_deref(), Some("flag"));
    let logging = &found.fields.logging;
    let patterns: Vec<&str> = logging.vmodule.iter().map(|item| item.file_pattern.as_str()).collect();
    assert_eq!((logging.verbosity, patterns), (3, vec!["a", "b"]));
}

#[test]
fn what_can_t_be_is_refused() {
    for (line, want) in [
        ("--bind-address here", "write an IP address"),
        ("--metrics-bind-address 1.2.3.4:x", "write an IP address"),
        ("--masquerade-all=maybe", "write true or false"),
        ("--oom-score-adj=low", "write a whole number"),
        ("--iptables-sync-period=5", "is no duration"),
        ("--no-such-flag", "no-such-flag"),
    ] {
        let error = try_flags(line).unwrap_err().to_string();
        assert!(error.contains(want), "{line}: {error}");
    }
    for (line, want) in [
        ("--feature-gates A", "--feature-gates: `A` has no `=`"),
        ("--feature-gates A=maybe", "write true or false"),
        ("--vmodule a=b", "write a level"),
        ("--proxy-mode userspace", "mode"),
        ("--oom-score-adj 1001 --iptables-masquerade-bit 99", "oomScoreAdj"),
        ("--iptables-min-sync-period 1m", "minSyncPeriod"),
    ] {
        let error = format!("{:#}", flags(line).config(None).unwrap_err());
        assert!(error.contains(want), "{line}: {error}");
    }
    let blank = Flags { hostname_override: Some("  ".to_owned()), ..Flags::default() };
    assert!(blank.config(None).unwrap_err().to_string().contains("only spaces"));
}
