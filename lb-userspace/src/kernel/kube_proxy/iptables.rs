//! kube-proxy's chains and rules in iptables.
//!
//! In: what `iptables-save` prints. Out: what `iptables-restore --noflush` is to read, so that they go in one step a table.
//! Both programs have to be installed; where they are not, and there are chains, that is an error that says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Write as _},
    process::{Command, Stdio},
};

use super::netfilter;

/// Chains by table, of all modes.
const CHAINS: [(&str, &[&str]); 3] = [
    (
        "nat",
        &[
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-PROXY-CANARY",
            "KUBE-NODE-PORT",
            "KUBE-LOAD-BALANCER",
        ],
    ),
    (
        "filter",
        &[
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        ],
    ),
    ("mangle", &["KUBE-PROXY-CANARY"]),
];

/// How the names of the chains of one Service or endpoint begin, in `nat`.
const PREFIXES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SEP-"];

/// The chains from which kube-proxy jumps into its own.
const BUILTIN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// Removes them for both families, and for both kinds of iptables if both are installed.
pub(super) fn remove(removed: &mut Vec<String>, errors: &mut Vec<String>) {
    for (family, program) in [(libc::AF_INET, "iptables"), (libc::AF_INET6, "ip6tables")] {
        let mut installed = false;
        for program in [program.to_owned(), format!("{program}-nft"), format!("{program}-legacy")] {
            match remove_by(&program) {
                Ok(None) => {}
                Ok(Some(0)) => installed = true,
                Ok(Some(chains)) => {
                    installed = true;
                    removed.push(format!("{chains} chains of {program}"));
                }
                Err(error) => {
                    installed = true;
                    errors.push(format!("{program}: {error}"));
                }
            }
        }
        if !installed && netfilter::has_chain(family, "nat", "KUBE-SERVICES").unwrap_or(false) {
            errors.push(format!(
                "{program} has kube-proxy's chains, and {program}-save and {program}-restore are not installed; install them, or run \
                 `kube-proxy --cleanup`"
            ));
        }
    }
}

/// How many chains were removed; none if the program is not installed.
fn remove_by(program: &str) -> io::Result<Option<usize>> {
    let saved = match Command::new(format!("{program}-save")).stderr(Stdio::null()).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result?,
    };
    if !saved.status.success() {
        // A kernel without this kind of iptables has no rules of it.
        return Ok(Some(0));
    }
    let (input, chains) = removal(&String::from_utf8_lossy(&saved.stdout));
    if chains == 0 {
        return Ok(Some(0));
    }
    // Another process may hold the lock of legacy iptables.
    let mut restore = Command::new(format!("{program}-restore"))
        .args(["-w", "5", "--noflush", "--counters"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = restore.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = restore.wait_with_output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(Some(chains))
}

/// What to feed to `iptables-restore`, and how many chains that removes.
fn removal(saved: &str) -> (String, usize) {
    let mut tables: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut table = "";
    for line in saved.lines() {
        match line.strip_prefix('*') {
            Some(name) => table = name.trim(),
            None => tables.entry(table).or_default().push(line),
        }
    }
    let mut input = String::new();
    let mut count = 0;
    for (table, known) in CHAINS {
        let lines = tables.get(table).map(Vec::as_slice).unwrap_or_default();
        let rules: Vec<Rule> = lines.iter().filter_map(|line| Rule::parse(line)).collect();
        let named = lines.iter().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
        let mut ours: BTreeSet<&str> = named
            .filter(|chain| {
                known.contains(chain) || table == "nat" && PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
            })
            .collect();
        // A chain that someone else's chain still jumps to can't go, and would keep the others from going.
        let foreign = rules.iter().filter(|rule| !ours.contains(rule.chain) && !BUILTIN.contains(&rule.chain));
        let needed: Vec<&str> = foreign.filter_map(|rule| rule.target).collect();
        ours.retain(|chain| !needed.contains(chain));
        if ours.is_empty() {
            continue;
        }
        count += ours.len();
        // Writing to a text can't fail.
        let _ = writeln!(input, "*{table}");
        for chain in &ours {
            let _ = writeln!(input, ":{chain} - [0:0]");
        }
        let jumps = rules.iter().filter(|rule| BUILTIN.contains(&rule.chain));
        for rule in jumps.filter(|rule| rule.target.is_some_and(|target| ours.contains(target))) {
            let _ = writeln!(input, "-D {}", rule.text);
        }
        for chain in &ours {
            let _ = writeln!(input, "-X {chain}");
        }
        input.push_str("COMMIT\n");
    }
    (input, count)
}

/// A line `-A CHAIN … -j TARGET`.
struct Rule<'a> {
    chain: &'a str,
    target: Option<&'a str>,
    /// What stands behind `-A`.
    text: &'a str,
}

impl<'a> Rule<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        // Counters may stand before it.
        let text = line.split_once("-A ").filter(|(before, _)| before.is_empty() || before.starts_with('['))?.1;
        let chain = text.split(' ').next()?;
        let mut words = text.split(' ').skip_while(|word| !["-j", "-g"].contains(word));
        Some(Self { chain, target: words.nth(1), text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `iptables-save` prints it on a node with a kubelet and two network plugins.
    const SAVED: &str = r#"# Generated by iptables-save
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-NWPLCY-ABCDEF - [0:0]
:KUBE-POD-FW-ABCDEF - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kube-router netpol - 4IA2OSFRMVNDXBVV" -j KUBE-ROUTER-FORWARD
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-ROUTER-FORWARD -j KUBE-POD-FW-ABCDEF
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A KUBE-SVC-BBBBBBBBBBBBBBBB -j KUBE-SEP-AAAAAAAAAAAAAAAA
COMMIT
"#;

    #[test]
    fn kube_proxy_s_chains_go_and_those_of_the_kubelet_and_of_network_plugins_stay() {
        let want = r#"*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-D POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-X KUBE-MARK-MASQ
-X KUBE-NODEPORTS
-X KUBE-POSTROUTING
-X KUBE-SEP-AAAAAAAAAAAAAAAA
-X KUBE-SERVICES
-X KUBE-SVC-BBBBBBBBBBBBBBBB
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
-D INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-D FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-D OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-X KUBE-EXTERNAL-SERVICES
-X KUBE-FORWARD
-X KUBE-PROXY-CANARY
-X KUBE-SERVICES
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
-X KUBE-PROXY-CANARY
COMMIT
"#;
        assert_eq!(removal(SAVED), (want.to_owned(), 11));
    }

    #[test]
    fn a_chain_that_someone_else_jumps_to_stays() {
        let saved = "*nat\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SERVICES - [0:0]\n:CNI-X - [0:0]\n[1:2] -A CNI-X -j KUBE-MARK-MASQ\nCOMMIT\n";
        assert_eq!(removal(saved), ("*nat\n:KUBE-SERVICES - [0:0]\n-X KUBE-SERVICES\nCOMMIT\n".to_owned(), 1));
        assert_eq!(removal(""), (String::new(), 0));
        assert_eq!(removal("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), (String::new(), 0));
    }
}
