//! What kube-proxy left goes, and what stands beside it stays.

use super::*;

fn nft(rules: &str) {
    rules.split(';').for_each(|rule| drop(run(&format!("nft add {rule}"))));
}

#[test]
fn tables_sets_and_devices_of_kube_proxy_go_and_others_stay() {
    lab(|_| {
        assert_eq!(super::super::kube_proxy::remove().unwrap(), Vec::<String>::new());
        nft("table ip kube-proxy; table ip6 kube-proxy; chain ip kube-proxy services; chain ip kube-proxy nat");
        run("nft add rule ip kube-proxy nat jump services");
        nft(
            "table inet kube-proxy; table ip kube-router; table ip kube-proxy-2; table ip nat; chain ip nat KUBE-KUBELET-CANARY",
        );
        run("ip link add kube-ipvs0 type bridge");
        run("ip link add kube-ipvs1 type bridge");
        let mut removed = super::super::kube_proxy::remove().unwrap();
        removed.sort();
        assert_eq!(removed, ["device kube-ipvs0", "nftables table ip kube-proxy", "nftables table ip6 kube-proxy"]);
        let tables = run("nft list tables");
        let left: Vec<&str> = tables.lines().collect();
        let want = ["table inet kube-proxy", "table ip kube-router", "table ip kube-proxy-2", "table ip nat"];
        assert_eq!(left.iter().collect::<BTreeSet<_>>(), want.iter().collect());
        assert!(run("nft list table ip nat").contains("KUBE-KUBELET-CANARY"));
        assert!(run("ip link").contains("kube-ipvs1"));
    });
}

#[test]
fn chains_of_iptables_are_removed_by_its_own_programs_or_named() {
    lab(|_| {
        nft("table ip nat; chain ip nat KUBE-SERVICES; chain ip nat KUBE-FIREWALL");
        let result = super::super::kube_proxy::remove();
        if Command::new("iptables-save").output().is_ok() {
            assert_eq!(result.unwrap(), ["1 chains of iptables"]);
            assert!(!run("nft list table ip nat").contains("KUBE-SERVICES"));
        } else {
            assert!(result.unwrap_err().to_string().contains("not installed"));
        }
        assert!(run("nft list table ip nat").contains("KUBE-FIREWALL"));
    });
}
