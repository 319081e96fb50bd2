//! The differences between how Go's pflag and how clap read arguments.
//!
//! In: the process's arguments. Out: arguments that clap reads as pflag would, and names of flags that older kube-proxys had
//! and that mean nothing any more.

use std::ffi::OsString;

/// Flags that kube-proxy had once, and whether a value follows them. DaemonSets and units still have them.
const GONE: [(&str, bool); 20] = [
    ("add-dir-header", false),
    ("alsologtostderr", false),
    ("boot-id-file", true),
    ("cleanup-ipvs", false),
    ("ip-masq", false),
    ("log-backtrace-at", true),
    ("log-dir", true),
    ("log-file", true),
    ("log-file-max-size", true),
    ("logtostderr", false),
    ("machine-id-file", true),
    ("one-output", false),
    ("proxy-port-range", true),
    ("resource-container", true),
    ("skip-headers", false),
    ("skip-log-headers", false),
    ("stderrthreshold", true),
    ("udp-timeout", true),
    ("userspace", false),
    ("windows-service", false),
];

/// What is left to clap.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// The arguments, the program's name first.
    pub all: Vec<OsString>,
    /// Flags without meaning that were among them.
    pub gone: Vec<String>,
}

impl Arguments {
    /// Of a process: called as `kube-proxy`, or without a subcommand, it is `run`.
    pub fn of_process(given: impl IntoIterator<Item = OsString>) -> Self {
        let mut given = given.into_iter();
        let Some(program) = given.next() else { return Self::default() };
        let name = std::path::Path::new(&program).file_name().map(ToOwned::to_owned).unwrap_or_default();
        let as_kube_proxy = name.to_string_lossy().starts_with("kube-proxy");
        let rest: Vec<OsString> = given.collect();
        let first = rest.first().map(|arg| arg.to_string_lossy().into_owned());
        let own = ["-h", "--help", "-V", "--version"];
        let implied = as_kube_proxy
            || first.as_deref().is_none_or(|first| first.starts_with('-') && !own.contains(&first) || first.is_empty());
        let mut arguments = Self { all: vec![program], gone: Vec::new() };
        if implied && first.as_deref() != Some("run") {
            arguments.all.push("run".into());
        }
        if implied || first.as_deref() == Some("run") {
            arguments.take(rest);
        } else {
            arguments.all.extend(rest);
        }
        arguments
    }

    fn take(&mut self, given: Vec<OsString>) {
        let mut given = given.into_iter();
        while let Some(arg) = given.next() {
            let Some(flag) = arg.to_str().and_then(|text| text.strip_prefix("--")).filter(|flag| !flag.is_empty())
            else {
                let last = arg == "--";
                self.all.push(arg);
                if last {
                    self.all.extend(given);
                    return;
                }
                continue;
            };
            let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
            let name = name.replace('_', "-");
            match GONE.iter().find(|(gone, _)| *gone == name) {
                Some((_, has_value)) => {
                    if *has_value && value.is_none() {
                        given.next();
                    }
                    self.gone.push(name);
                }
                None => self.all.push(match value {
                    Some(value) => format!("--{name}={value}").into(),
                    None => format!("--{name}").into(),
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(text: &str) -> (String, String) {
        let Arguments { all, gone } = Arguments::of_process(text.split(' ').map(OsString::from));
        let all: Vec<_> = all.iter().map(|arg| arg.to_string_lossy()).collect();
        (all.join(" "), gone.join(" "))
    }

    #[test]
    fn without_a_subcommand_or_as_kube_proxy_it_is_run() {
        for (given, want) in [
            ("fairlead", "fairlead run"),
            ("fairlead --config x", "fairlead run --config x"),
            ("fairlead -v=2", "fairlead run -v=2"),
            ("fairlead --help", "fairlead --help"),
            ("fairlead --version", "fairlead --version"),
            ("fairlead status", "fairlead status"),
            ("fairlead run --config x", "fairlead run --config x"),
            ("/usr/local/bin/kube-proxy --config=x", "/usr/local/bin/kube-proxy run --config=x"),
            ("kube-proxy", "kube-proxy run"),
            ("kube-proxy --version", "kube-proxy run --version"),
            ("kube-proxy run --v=2", "kube-proxy run --v=2"),
        ] {
            assert_eq!(arguments(given), (want.to_owned(), String::new()), "{given}");
        }
    }

    #[test]
    fn underscores_are_dashes_and_flags_without_meaning_are_left_out() {
        for (given, want, gone) in [
            ("kube-proxy --proxy_mode=ip_vs", "kube-proxy run --proxy-mode=ip_vs", ""),
            ("fairlead run --oom_score_adj -5", "fairlead run --oom-score-adj -5", ""),
            ("kube-proxy --logtostderr --log_dir /var/log --v=2", "kube-proxy run --v=2", "logtostderr log-dir"),
            ("kube-proxy --stderrthreshold=2 --logtostderr=true", "kube-proxy run", "stderrthreshold logtostderr"),
            ("kube-proxy --proxy-port-range 1-2 --cleanup", "kube-proxy run --cleanup", "proxy-port-range"),
            ("fairlead explain --log_dir x", "fairlead explain --log_dir x", ""),
        ] {
            assert_eq!(arguments(given), (want.to_owned(), gone.to_owned()), "{given}");
        }
    }
}
