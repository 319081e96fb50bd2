//! Folders of manifests on a real file system: what is read, when, and what is said about it.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;
use crate::model::{Kind, Object, ObjectName};

fn service_yaml(name: &str, port: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n")
}

/// `+name:port` for a Service that is there, `-name` for one that is gone, `+Kind name` for other kinds.
fn told(update: &Update) -> Vec<String> {
    let tell = |change: &Change| match change {
        Change::Upsert(Object::Service(service)) => {
            let port = service.spec.ports.first().map_or(0, |port| port.port);
            format!("+{}:{port}", service.metadata.name.name())
        }
        Change::Upsert(object) => format!("+{} {}", object.kind(), object.name()),
        Change::Delete(Kind::Service, name) => format!("-{}", name.name()),
        Change::Delete(kind, name) => format!("-{kind} {name}"),
    };
    update.changes.iter().map(tell).collect()
}

fn problems(update: &Update, root: &Path) -> Vec<String> {
    let prefix = format!("{}/", root.display().to_string().trim_end_matches('/'));
    update.problems.iter().map(|problem| problem.to_string().replace(&prefix, "")).collect()
}

fn read_one(name: &str, text: impl AsRef<[u8]>) -> (Vec<String>, Vec<String>, usize) {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join(name), text).unwrap();
    let update = read_all(dir.path()).unwrap();
    assert!(update.first);
    let mut told = told(&update);
    told.sort();
    (told, problems(&update, dir.path()), update.skipped)
}

/// A watched folder, with files in it from the start.
struct Watched {
    dir: TempDir,
    manifests: Manifests,
    first: Update,
    runtime: tokio::runtime::Runtime,
}

impl Watched {
    fn new(files: &[(&str, String)]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join("m").join(name), text).unwrap();
        }
        Self::open(dir)
    }

    fn open(dir: TempDir) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut manifests = Manifests::open(&dir.path().join("m")).unwrap();
        let first = runtime.block_on(manifests.next()).unwrap();
        Self { dir, manifests, first, runtime }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("m").join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).unwrap();
    }

    fn wait(&mut self, time: Duration) -> Option<Update> {
        let next = self.manifests.next();
        self.runtime.block_on(async { tokio::time::timeout(time, next).await.ok().flatten() })
    }

    /// Changes until these have been told, in any number of updates.
    fn expect(&mut self, expected: &[&str]) -> Update {
        let mut all = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let update = self.wait(deadline.saturating_duration_since(Instant::now()));
            let update = update.unwrap_or_else(|| panic!("expected {expected:?}, was told {all:?}"));
            all.extend(told(&update));
            if expected.iter().all(|line| all.iter().any(|told| told == line)) {
                assert_eq!(all.len(), expected.len(), "{all:?}");
                return update;
            }
        }
    }

    fn expect_problem(&mut self, part: &str) -> Update {
        let update = self.wait(Duration::from_secs(5)).expect("a problem");
        let problems = problems(&update, &self.path(""));
        assert!(problems.iter().any(|problem| problem.contains(part)), "{problems:?}");
        update
    }

    fn expect_silence(&mut self) {
        let update = self.wait(Duration::from_millis(100));
        assert!(update.is_none(), "{update:?}");
    }
}

#[test]
fn yaml_and_json_documents_and_lists_are_read() {
    let list = r#"{"kind":"List","apiVersion":"v1","items":[
        {"kind":"Pod","apiVersion":"v1","metadata":{"name":"p"}},
        {"kind":"Node","apiVersion":"v1","metadata":{"name":"n"}},
        {"kind":"ServiceCIDR","apiVersion":"networking.k8s.io/v1","metadata":{"name":"c"},"spec":{"cidrs":["10.96.0.0/12"]}},
        {"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"x"}}]}"#;
    let typed =
        r#"{"kind":"ServiceList","apiVersion":"v1","items":[{"metadata":{"name":"a"},"spec":{"ports":[{"port":1}]}}]}"#;
    let slices =
        r#"{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","metadata":{"name":"e"},"addressType":"IPv4"}"#;
    let expected =
        ["+EndpointSlice default/e", "+Node n", "+Pod default/p", "+ServiceCIDR c", "+a:1"].map(str::to_owned);
    for (file, text) in [
        ("a.json", format!("{list}\n{typed}{slices}")),
        ("a.yaml", format!("# nothing\n---\n{list}\n---\n---\n{typed}\n--- {slices}\n...\n")),
        ("a.yml", format!("%YAML 1.2\n---\n{slices}\n---\r\n{list}\n---\n{typed}")),
    ] {
        assert_eq!(read_one(file, &text), (expected.to_vec(), vec![], 1), "{file}");
    }
}

#[test]
fn null_is_the_empty_value() {
    let text = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"a","namespace":null,"labels":null,"creationTimestamp":null},
        "spec":{"type":null,"clusterIP":null,"ports":[{"port":1,"name":null,"protocol":null,"nodePort":null}],"selector":null,
        "internalTrafficPolicy":null},"status":null}"#;
    assert_eq!(read_one("a.json", text), (vec!["+a:1".to_owned()], vec![], 0));
}

#[test]
fn a_cluster_ip_beyond_the_families_is_no_ones() {
    for (families, expected) in [("[]", 2), (r#"["IPv6"]"#, 1), (r#"["IPv6","IPv4"]"#, 2)] {
        let text = format!(
            r#"{{"kind":"Service","apiVersion":"v1","metadata":{{"name":"a"}},
            "spec":{{"clusterIPs":["fd00::1","10.0.0.1"],"ipFamilies":{families},"ports":[{{"port":1}}]}}}}"#
        );
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("a.json"), text).unwrap();
        let update = read_all(dir.path()).unwrap();
        let [Change::Upsert(Object::Service(service))] = &update.changes[..] else { panic!("{families}: {update:?}") };
        assert_eq!(service.spec.cluster_ips, ["fd00::1", "10.0.0.1"][..expected], "{families}");
    }
}

#[test]
fn bad_fields_are_reported_with_their_place_and_a_remedy() {
    let service =
        |spec: &str| format!(r#"{{"kind":"Service","apiVersion":"v1","metadata":{{"name":"a"}},"spec":{spec}}}"#);
    let list = format!(r#"{{"kind":"List","apiVersion":"v1","items":[{}]}}"#, service(r#"{"ports":[{"port":"x"}]}"#));
    for (text, expected) in [
        (service(r#"{"ports":[{"port":70000}]}"#), "Service default/a, spec.ports[0].port: "),
        (service(r#"{"ports":[{"port":0}]}"#), "Service default/a, spec.ports[0].port: "),
        (service(r#"{"ports":[{"port":1,"protocol":"ICMP"}]}"#), "Service default/a, spec.ports[0].protocol: "),
        (service(r#"{"ports":[{"port":1,"targetPort":70000}]}"#), "Service default/a, spec.ports[0].targetPort: "),
        (service(r#"{"ports":[{"port":1},{"port":2}]}"#), "Service default/a, spec.ports[1].name: "),
        (service(r#"{"clusterIP":"10.0.0.256"}"#), "Service default/a, spec.clusterIP: "),
        (service(r#"{"externalIPs":["10.0.0.1","x"]}"#), "Service default/a, spec.externalIPs[1]: "),
        (
            service(r#"{"loadBalancerSourceRanges":["10.0.0.0/33"]}"#),
            "Service default/a, spec.loadBalancerSourceRanges[0]: ",
        ),
        (service(r#"{"type":"Cluster"}"#), "Service default/a, spec.type: "),
        (service(r#"{"selector":{"a":1}}"#), "Service default/a, spec.selector"),
        (list, "Service default/a, items[0].spec.ports[0].port: "),
        (r#"{"kind":"Service","apiVersion":"v2","metadata":{"name":"a"}}"#.into(), "Service default/a, apiVersion: "),
        (r#"{"kind":"Service","apiVersion":"v1","metadata":{}}"#.into(), "metadata.name: "),
        (
            service(r#"{"ports":[{"port":1,"name":"a/b"}]}"#),
            r#"Service default/a, spec.ports[0].name: "a/b" is no name; "#,
        ),
        (
            r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"a\u001b[2J"}}"#.into(),
            r#"Service default/a\u{1b}[2J, metadata.name: "a\u{1b}[2J" is no name; "#,
        ),
        (
            r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"a","namespace":"b:c"}}"#.into(),
            r#"metadata.namespace: "b:c" is no name; "#,
        ),
        (r#"{"metadata":{"name":"a"}}"#.into(), "kind or apiVersion is missing"),
        (r#"{"kind":"#.into(), "correct the "),
        (r"[1]".into(), "document 1"),
    ] {
        for file in ["a.json", "a.yaml"] {
            let (told, problems, _) = read_one(file, &text);
            assert!(told.is_empty(), "{told:?}");
            assert_eq!(problems.len(), 1, "{text}: {problems:?}");
            assert!(problems[0].starts_with(&format!("{file}, document 1")), "{problems:?}");
            assert!(problems[0].contains(expected), "{problems:?}");
        }
    }
}

#[test]
fn kinds_of_other_groups_are_only_counted() {
    let text = r#"{"kind":"Service","apiVersion":"serving.knative.dev/v1","metadata":{"name":"a"}}"#;
    assert_eq!(read_one("a.json", text), (vec![], vec![], 1));
}

#[test]
fn bad_addresses_cost_an_endpoint_and_not_its_slice() {
    let text = r#"{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","metadata":{"name":"e"},"addressType":"IPv4",
        "endpoints":[{"addresses":["x"]},{"addresses":["10.0.0.1"]}]}"#;
    let (told, problems, _) = read_one("a.json", text);
    assert_eq!(told, ["+EndpointSlice default/e"]);
    assert!(problems[0].contains("EndpointSlice default/e, endpoints[0].addresses[0]: \"x\""), "{problems:?}");
}

#[test]
fn a_syntax_error_has_its_line_in_the_file() {
    let text = format!("{}---\na: [1\n---\n{}", service_yaml("a", "1"), service_yaml("b", "2"));
    let (told, problems, _) = read_one("a.yaml", &text);
    assert_eq!(told, ["+a:1", "+b:2"]);
    assert_eq!(problems, ["a.yaml, document 2: unclosed bracket '[' (line 9, column 4); correct the YAML"]);
}

#[test]
fn what_stands_too_deep_costs_its_document_and_no_more() {
    let json = |open: &str, close: &str| format!("{}{}", open.repeat(20_000), close.repeat(20_000));
    let service = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"a"},"spec":{"ports":[{"port":1}]}}"#;
    for (text, expected) in [
        (
            json(r#"{"kind":"List","apiVersion":"v1","items":["#, "]}"),
            "lists in one another; write the objects into one list",
        ),
        (json(r#"{"kind":"ServiceList","apiVersion":"v1","items":["#, "]}"), "lists in one another"),
        (json("[", "]"), "; "),
        (json(r#"{"a":"#, "}").replace(":}", ":1}"), "; "),
    ] {
        for (file, text) in [("a.json", format!("{text}{service}")), ("a.yaml", format!("{text}\n---\n{service}"))] {
            let (told, problems, _) = read_one(file, &text);
            assert_eq!(told, ["+a:1"], "{file} {}", &text[..20]);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].starts_with(&format!("{file}, document 1")), "{problems:?}");
            assert!(file == "a.yaml" || problems[0].contains(expected), "{problems:?}");
        }
    }
    let nested = |lists| {
        let (open, close) = (r#"{"kind":"List","apiVersion":"v1","items":["#, "]}");
        format!("{}{service}{}", open.repeat(lists), close.repeat(lists))
    };
    assert_eq!(read_one("a.json", nested(8)), (vec!["+a:1".to_owned()], vec![], 0), "some may");
}

#[test]
fn yaml_that_says_a_thing_a_billion_times_costs_its_document() {
    let aliases = |count: usize| vec!["*a"; count].join(",");
    let ten_times = |levels: u8| {
        let line = |level: u8| {
            let (this, last) = (char::from(b'a' + level), char::from(b'a' + level - 1));
            format!("{this}: &{this} [{}]\n", vec![format!("*{last}"); 10].join(","))
        };
        format!("a: &a [x,x,x,x,x,x,x,x,x,x]\n{}", (1..levels).map(line).collect::<String>())
    };
    let merged: String = (0..20_000).map(|index| format!("k{index}:\n  <<: *a\n")).collect();
    for (name, text) in [
        ("lists of lists", ten_times(9)),
        ("many small things", format!("a: &a [{}]\nb: [{}]\n", vec!["1"; 1000].join(","), aliases(1000))),
        ("much text", format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), aliases(9_000))),
        ("many times", format!("a: &a {}\nb: [{}]\n", "x".repeat(1000), aliases(1 << 20))),
        (
            "much within much",
            format!("a: &a {}\nb: &b [{}]\nc: [{}]\n", "x".repeat(1000), aliases(1000), vec!["*b"; 1000].join(",")),
        ),
        (
            "merged maps",
            format!(
                "a: &a {{{}}}\n{merged}",
                (0..500).map(|index| format!("a{index}: 1")).collect::<Vec<_>>().join(",")
            ),
        ),
    ] {
        let (told, problems, _) =
            read_one("a.yaml", format!("{}---\n{text}---\n{}", service_yaml("a", "1"), service_yaml("b", "2")));
        assert_eq!(told, ["+a:1", "+b:2"], "{name}");
        assert_eq!(problems.len(), 1, "{name}: {problems:?}");
        assert!(problems[0].starts_with("a.yaml, document 2"), "{name}: {problems:?}");
        assert!(problems[0].contains("`*` says too much again"), "{name}: {problems:?}");
    }
    let text = "apiVersion: v1\nkind: List\nitems:\n".to_owned()
        + &(0..500)
            .map(|index| {
                let labels = if index == 0 { "&labels {app: web, tier: front}" } else { "*labels" };
                format!("- apiVersion: v1\n  kind: Service\n  metadata:\n    name: s{index}\n    labels: {labels}\n")
            })
            .collect::<String>();
    let (told, problems, _) = read_one("a.yaml", text);
    assert_eq!((told.len(), problems), (500, vec![]), "what people write is read");
}

#[test]
fn a_document_that_is_not_utf_8_costs_itself() {
    let text =
        [service_yaml("a", "1").as_bytes(), b"---\nkind: \xff\n---\n", service_yaml("b", "2").as_bytes()].concat();
    let (told, problems, _) = read_one("a.yaml", &text);
    assert_eq!(told, ["+a:1", "+b:2"]);
    assert_eq!(problems, ["a.yaml, document 2: no UTF-8 (line 9); save the file as UTF-8"]);
    let marked = [b"\xef\xbb\xbf", service_yaml("a", "1").as_bytes()].concat();
    assert_eq!(read_one("a.yaml", marked).0, ["+a:1"], "some editors mark what they save");
}

#[test]
fn hidden_and_temporary_files_are_not_read() {
    let dir = TempDir::new().unwrap();
    for name in [".a.yaml", "a.yaml~", ".a.yaml.swp", "#a.yaml#", "4913", "a.txt", "a", "#a.yaml"] {
        fs::write(dir.path().join(name), service_yaml("a", "1")).unwrap();
    }
    fs::create_dir_all(dir.path().join("..2024/sub")).unwrap();
    fs::write(dir.path().join("..2024/sub/a.yaml"), service_yaml("a", "1")).unwrap();
    fs::create_dir_all(dir.path().join("sub/sub.yaml")).unwrap();
    fs::write(dir.path().join("sub/sub.yaml/b.yml"), service_yaml("b", "2")).unwrap();
    symlink("..", dir.path().join("sub/circle")).unwrap();
    assert_eq!(told(&read_all(dir.path()).unwrap()), ["+b:2"]);
}

#[test]
fn a_folder_that_is_missing_is_an_error_with_a_remedy() {
    let error = read_all(Path::new("/nowhere/at/all")).unwrap_err();
    assert!(format!("{error:#}").contains("create it"), "{error:#}");
}

#[test]
fn a_change_tells_only_what_differs() {
    let two = |port| format!("{}---\n{}", service_yaml("a", "1"), service_yaml("b", port));
    let mut watched = Watched::new(&[("a.yaml", two("2"))]);
    assert!(watched.first.first);
    assert_eq!(told(&watched.first), ["+a:1", "+b:2"]);
    watched.write("a.yaml", two("3"));
    let update = watched.expect(&["+b:3"]);
    assert!(!update.first);
    watched.write("a.yaml", two("3"));
    watched.expect_silence();
    watched.write("a.yaml", service_yaml("b", "3"));
    watched.expect(&["-a"]);
    fs::remove_file(watched.path("a.yaml")).unwrap();
    watched.expect(&["-b"]);
}

#[test]
fn a_file_is_not_read_while_it_is_written() {
    let mut watched = Watched::new(&[("a.yaml", service_yaml("a", "1"))]);
    let text = format!("{}---\n{}", service_yaml("a", "2"), service_yaml("b", "3"));
    let (start, rest) = text.split_at(service_yaml("a", "2").len());
    for name in ["a.yaml", "new.yaml"] {
        let mut file = File::create(watched.path(name)).unwrap();
        file.write_all(start.as_bytes()).unwrap();
        watched.expect_silence();
        // Neither does a walk through the whole folder read it.
        fs::create_dir(watched.path(&format!("{name}.d"))).unwrap();
        watched.expect_silence();
        file.write_all(rest.as_bytes()).unwrap();
        drop(file);
        if name == "a.yaml" {
            watched.expect(&["+a:2", "+b:3"]);
        } else {
            watched.expect_problem("new.yaml, document 1, Service default/a");
        }
    }
}

#[test]
fn a_reader_never_hinders_a_writer() {
    let mut watched = Watched::new(&[]);
    for round in 0..200 {
        watched.write("a.yaml", service_yaml("a", "1"));
        watched.write("a.yaml", service_yaml("a", &(round + 2).to_string()));
        while let Some(update) = watched.wait(Duration::from_secs(5)) {
            if told(&update) == [format!("+a:{}", round + 2)] {
                break;
            }
        }
    }
}

#[test]
fn files_that_come_by_rename_or_link_are_read() {
    let mut watched = Watched::new(&[("a.yaml", service_yaml("a", "1"))]);
    let outside = watched.dir.path().join("outside");
    fs::write(&outside, service_yaml("a", "2")).unwrap();
    fs::rename(&outside, watched.path("a.yaml")).unwrap();
    watched.expect(&["+a:2"]);
    fs::write(watched.path(".a.yaml.tmp"), service_yaml("a", "3")).unwrap();
    fs::rename(watched.path(".a.yaml.tmp"), watched.path("a.yaml")).unwrap();
    watched.expect(&["+a:3"]);
    fs::write(&outside, service_yaml("b", "4")).unwrap();
    fs::hard_link(&outside, watched.path("b.yaml")).unwrap();
    watched.expect(&["+b:4"]);
    fs::rename(watched.path("b.yaml"), watched.path("c.yaml")).unwrap();
    watched.expect_silence();
    fs::rename(watched.path("c.yaml"), watched.path("c.txt")).unwrap();
    watched.expect(&["-b"]);
}

#[test]
fn an_editor_that_moves_the_old_file_away_changes_one_object() {
    let mut watched = Watched::new(&[("a.yaml", service_yaml("a", "1"))]);
    fs::write(watched.path("4913"), "").unwrap();
    fs::remove_file(watched.path("4913")).unwrap();
    fs::rename(watched.path("a.yaml"), watched.path("a.yaml~")).unwrap();
    watched.write("a.yaml", service_yaml("a", "2"));
    watched.expect(&["+a:2"]);
}

#[test]
fn a_mounted_config_map_is_followed_through_its_swap() {
    let dir = TempDir::new().unwrap();
    let mount = dir.path().join("m");
    let version = |name: &str, a: &str, b: &str| {
        fs::create_dir_all(mount.join(name)).unwrap();
        fs::write(mount.join(name).join("a.yaml"), service_yaml("a", a)).unwrap();
        fs::write(mount.join(name).join("b.yaml"), service_yaml("b", b)).unwrap();
    };
    version("..2024_1", "1", "2");
    symlink("..2024_1", mount.join("..data")).unwrap();
    symlink("..data/a.yaml", mount.join("a.yaml")).unwrap();
    symlink("..data/b.yaml", mount.join("b.yaml")).unwrap();
    let mut watched = Watched::open(dir);
    assert_eq!(told(&watched.first), ["+a:1", "+b:2"]);
    let mount = watched.path("");
    for port in ["3", "4"] {
        let name = format!("..2024_{port}");
        fs::create_dir_all(mount.join(&name)).unwrap();
        fs::write(mount.join(&name).join("a.yaml"), service_yaml("a", port)).unwrap();
        fs::write(mount.join(&name).join("b.yaml"), service_yaml("b", "2")).unwrap();
        symlink(&name, mount.join("..data_tmp")).unwrap();
        fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
        watched.expect(&[&format!("+a:{port}")]);
    }
}

#[test]
fn sub_folders_come_and_go() {
    let mut watched = Watched::new(&[]);
    fs::create_dir_all(watched.path("x/y")).unwrap();
    watched.write("x/y/a.yaml", service_yaml("a", "1"));
    watched.expect(&["+a:1"]);
    watched.write("x/y/a.yaml", service_yaml("a", "2"));
    watched.expect(&["+a:2"]);
    fs::rename(watched.path("x"), watched.path("z")).unwrap();
    watched.expect_silence();
    watched.write("z/y/a.yaml", service_yaml("a", "3"));
    watched.expect(&["+a:3"]);
    fs::remove_dir_all(watched.path("z")).unwrap();
    watched.expect(&["-a"]);
    for round in 1..20 {
        fs::create_dir_all(watched.path("x/y")).unwrap();
        watched.write("x/y/a.yaml", service_yaml("a", &round.to_string()));
        watched.expect(&[&format!("+a:{round}")]);
        fs::remove_dir_all(watched.path("x")).unwrap();
        watched.expect(&["-a"]);
    }
}

#[test]
fn a_folder_that_is_replaced_keeps_its_objects_until_it_is_back() {
    let mut watched = Watched::new(&[("a.yaml", service_yaml("a", "1"))]);
    let away = watched.dir.path().join("away");
    fs::rename(watched.path(""), &away).unwrap();
    let update = watched.expect_problem("the folder can't be read");
    assert!(update.changes.is_empty());
    fs::create_dir(watched.path("")).unwrap();
    watched.expect(&["-a"]);
    watched.write("b.yaml", service_yaml("b", "2"));
    let update = watched.expect(&["+b:2"]);
    assert!(update.problems.is_empty());
}

#[test]
fn a_bad_document_keeps_what_its_object_said() {
    let mut watched = Watched::new(&[("a.yaml", format!("{}---\n{}", service_yaml("a", "1"), service_yaml("b", "2")))]);
    watched.write("a.yaml", format!("{}---\n{}", service_yaml("a", "none"), service_yaml("b", "3")));
    let update = watched.expect(&["+b:3"]);
    assert!(
        problems(&update, &watched.path("")).concat().contains("document 1, Service default/a, spec.ports[0].port")
    );
    // Which object this is can't be told, so none may go.
    watched.write("a.yaml", format!("kind: [\n---\n{}", service_yaml("b", "4")));
    watched.expect(&["+b:4"]);
    watched.write("a.yaml", "\u{0}");
    watched.expect_problem("a.yaml");
    watched.write("a.yaml", service_yaml("b", "4"));
    let update = watched.expect(&["-a"]);
    assert!(update.problems.is_empty());
}

#[test]
fn the_first_file_that_names_an_object_has_it() {
    let mut watched = Watched::new(&[("b.yaml", service_yaml("a", "2")), ("c.yaml", service_yaml("a", "3"))]);
    assert_eq!(told(&watched.first), ["+a:2"]);
    assert!(problems(&watched.first, &watched.path(""))[0].starts_with("c.yaml, document 1, Service default/a: "));
    watched.write("a.yaml", service_yaml("a", "1"));
    let update = watched.expect(&["+a:1"]);
    assert_eq!(update.problems.len(), 2);
    fs::remove_file(watched.path("b.yaml")).unwrap();
    watched.expect_problem("c.yaml");
    fs::remove_file(watched.path("a.yaml")).unwrap();
    let update = watched.expect(&["+a:3"]);
    assert!(update.problems.is_empty());
    watched.write("c.yaml", format!("{}---\n{}", service_yaml("a", "3"), service_yaml("a", "4")));
    watched.expect_problem("c.yaml, document 2, Service default/a: document 1 has the same object");
}

#[test]
fn a_file_that_cannot_be_read_keeps_what_it_said() {
    let mut watched = Watched::new(&[("a.yaml", service_yaml("a", "1"))]);
    fs::remove_file(watched.path("a.yaml")).unwrap();
    symlink("nowhere", watched.path("a.yaml")).unwrap();
    let update = watched.expect_problem("a.yaml: can't be read");
    // The removal and the link may have been seen one after the other.
    assert!(told(&update).is_empty() || told(&update) == ["-a"]);
}

#[test]
fn an_appending_writer_is_waited_for() {
    let mut watched = Watched::new(&[("a.yaml", service_yaml("a", "1"))]);
    let mut file = OpenOptions::new().append(true).open(watched.path("a.yaml")).unwrap();
    write!(file, "---\n{}", service_yaml("b", "2")).unwrap();
    watched.expect_silence();
    drop(file);
    watched.expect(&["+b:2"]);
}

#[test]
fn a_file_behind_a_link_is_watched_where_it_is() {
    let mut watched = Watched::new(&[]);
    let elsewhere = watched.dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    for (folder, port) in [(elsewhere, 1), (watched.dir.path().to_owned(), 3), (watched.path("sub"), 5)] {
        fs::create_dir_all(&folder).unwrap();
        let target = folder.join("target");
        fs::write(&target, service_yaml("a", &port.to_string())).unwrap();
        symlink(&target, watched.path("a.yaml")).unwrap();
        watched.expect(&[&format!("+a:{port}")]);
        fs::write(&target, service_yaml("a", &(port + 1).to_string())).unwrap();
        watched.expect(&[&format!("+a:{}", port + 1)]);
        fs::remove_file(watched.path("a.yaml")).unwrap();
        watched.expect(&["-a"]);
    }
}

#[test]
fn a_file_that_is_being_written_at_the_start_is_named_and_then_read() {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("m")).unwrap();
    let mut file = File::create(dir.path().join("m/a.yaml")).unwrap();
    file.write_all(service_yaml("a", "1").as_bytes()).unwrap();
    let mut watched = Watched::open(dir);
    assert!(watched.first.changes.is_empty());
    assert!(watched.first.problems[0].message.contains("open for writing"));
    drop(file);
    assert!(watched.expect(&["+a:1"]).problems.is_empty());
}

#[test]
fn names_show_in_full() {
    let problem = Problem {
        file: "a.yaml".into(),
        document: Some(2),
        object: Some(format!("{} {}", Kind::Pod, ObjectName::new("x", "y"))),
        field: Some("spec".into()),
        message: "no".into(),
    };
    assert_eq!(problem.to_string(), "a.yaml, document 2, Pod x/y, spec: no");
}
