//! Reading: strict first, then lenient with warnings.

use super::*;

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

fn parse(text: &str) -> (KubeProxyConfiguration, String) {
    let (config, warnings) = KubeProxyConfiguration::parse(&format!("{HEAD}{text}")).unwrap();
    (config, warnings.join("; "))
}

#[test]
fn fields_that_do_not_exist_are_named_and_ignored() {
    for (text, want) in [
        ("clusterCidr: x", "field clusterCidr does not exist and is ignored; write clusterCIDR"),
        ("conntrack: {max: null}", "field conntrack.max does not exist and is ignored"),
        ("resourceContainer: /kube-proxy", "field resourceContainer does not exist and is ignored"),
        (
            "logging: {vmodule: [{filePattern: a, verbosity: 1, x: 2}]}",
            "field logging.vmodule[0].x does not exist and is ignored",
        ),
        ("featureGates: {AnyName: true}", ""),
        ("logging: {format: text, options: {text: {splitStream: false}}}\nwindowsRunAsService: false", ""),
    ] {
        assert_eq!(parse(text).1, want, "{text}");
    }
}

#[test]
fn of_a_field_that_is_given_twice_the_last_one_counts() {
    let (config, warnings) = parse("mode: ipvs\nmode: nftables");
    assert_eq!(config.mode, "nftables");
    assert!(
        warnings.starts_with("a field is given twice, and the last one counts") && warnings.contains("mode"),
        "{warnings}"
    );
}

#[test]
fn of_several_documents_the_first_counts() {
    let (config, warnings) = parse("mode: ipvs\n---\nmode: nftables");
    assert_eq!((config.mode.as_str(), warnings.contains("only the first one")), ("ipvs", true));
}

#[test]
fn json_is_read_too() {
    let text = r#"{"apiVersion":"kubeproxy.config.k8s.io/v1alpha1","kind":"KubeProxyConfiguration","mode":"nftables"}"#;
    assert_eq!(KubeProxyConfiguration::parse(text).unwrap().0.mode, "nftables");
}

#[test]
fn another_kind_or_version_or_type_is_an_error_that_says_what_helps() {
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1";
    for (text, want) in [
        (String::new(), "it is empty; begin it with"),
        ("mode: ipvs".to_owned(), "kind is missing; begin it with"),
        (format!("{head}\n"), "kind is missing"),
        ("kind: KubeProxyConfiguration".to_owned(), "apiVersion is missing"),
        (format!("{head}\nkind: KubeletConfiguration"), "`KubeletConfiguration` is not `KubeProxyConfiguration`"),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1beta1\nkind: KubeProxyConfiguration".to_owned(),
            "apiVersion: `kubeproxy.config.k8s.io/v1beta1` is not `kubeproxy.config.k8s.io/v1alpha1`",
        ),
        ("[1]".to_owned(), "it is not a mapping of fields"),
        ("a: [".to_owned(), "it is no YAML"),
        (format!("{HEAD}mode: 5"), "field mode: invalid type: integer `5`"),
        (format!("{HEAD}iptables: {{masqueradeAll: 'true'}}"), "field iptables.masqueradeAll: invalid type: string"),
        (format!("{HEAD}iptables: {{syncPeriod: 30}}"), "field iptables.syncPeriod: 30 has no unit; write it like 30s"),
        (format!("{HEAD}conntrack: {{min: 1.5}}"), "field conntrack.min: invalid type"),
        (format!("{HEAD}conntrack: {{min: 5000000000}}"), "field conntrack.min: invalid value"),
        (format!("{HEAD}nodePortAddresses: primary"), "field nodePortAddresses: invalid type"),
        (format!("{HEAD}logging: {{verbosity: -1}}"), "field logging.verbosity: invalid value"),
    ] {
        let error = format!("{:#}", KubeProxyConfiguration::parse(&text).unwrap_err());
        assert!(error.contains(want), "{text}: {error}");
    }
}
