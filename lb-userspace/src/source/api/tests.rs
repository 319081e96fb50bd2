//! The source against a server that behaves as the real one does, well and badly.

mod server;

use std::time::{Duration, Instant};

use prometheus::core::Collector as _;
use serde_json::{Value, json};
use tokio::time::timeout;

use self::server::{Content, Server};
use super::{Address, ApiServer, Endpoints, Options, Requests};
use crate::{
    model::{Change, Kind, Object},
    source::Update,
};

/// Longer than the longest pause that a test waits for.
const PATIENCE: Duration = Duration::from_secs(20);

fn named(kind: Kind, name: &str, mut object: Value) -> Value {
    object["apiVersion"] = json!(kind.api_version());
    object["kind"] = json!(kind.as_str());
    object["metadata"]["name"] = json!(name);
    if !matches!(kind, Kind::Node | Kind::ServiceCidr) {
        object["metadata"]["namespace"] = json!("default");
    }
    object
}

fn service(name: &str, port: u32) -> Value {
    named(Kind::Service, name, json!({"spec": {"clusterIP": "10.0.0.1", "ports": [{"port": port}]}}))
}

fn slice(name: &str) -> Value {
    named(Kind::EndpointSlice, name, json!({"addressType": "IPv4", "endpoints": [], "ports": []}))
}

fn node(name: &str, address: &str) -> Value {
    let addresses = json!([{"type": "InternalIP", "address": address}]);
    named(Kind::Node, name, json!({"status": {"addresses": addresses}}))
}

/// A server with a Service, a slice and the Node.
async fn server() -> Server {
    let server = Server::start().await;
    let mut content = server.content();
    content.put(Kind::Service, service("a", 1));
    content.put(Kind::EndpointSlice, slice("a-1"));
    content.put(Kind::Node, node("n", "10.0.0.9"));
    drop(content);
    server
}

fn options(server: &Server) -> Options {
    Options {
        address: Address { kubeconfig: None, master: Some(server.url()) },
        endpoints: Endpoints::EndpointSlice,
        node: "n".to_owned(),
        pod_cidrs: false,
    }
}

/// The source, with what it told.
struct Watched {
    source: ApiServer,
    told: Vec<String>,
    problems: Vec<String>,
    begun: bool,
    requests: Requests,
}

impl Watched {
    async fn open(options: &Options) -> Self {
        let requests = Requests::new().unwrap();
        let source = ApiServer::open(options, &requests).await.unwrap();
        Self { source, told: Vec::new(), problems: Vec::new(), begun: false, requests }
    }

    /// How many GET requests ended so.
    fn requests(&self, code: &str) -> u64 {
        let families = self.requests.collector().collect();
        let samples = families.iter().flat_map(|family| family.get_metric());
        let of_code = samples.filter(|sample| {
            let label =
                |name: &str| sample.get_label().iter().find(|label| label.name() == name).map(|label| label.value());
            assert!(label("host").is_some_and(|host| host.starts_with("127.0.0.1:")), "{sample:?}");
            assert_eq!(label("method"), Some("GET"));
            label("code") == Some(code)
        });
        of_code.map(|sample| sample.get_counter().get_value() as u64).sum()
    }

    async fn next(&mut self, patience: Duration) -> bool {
        let Ok(update) = timeout(patience, self.source.next()).await else { return false };
        let Update { changes, problems, first, .. } = update.unwrap();
        self.told.extend(changes.iter().map(short));
        self.problems = problems.iter().map(ToString::to_string).collect();
        self.begun |= first;
        true
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !done(self) {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            assert!(self.next(left).await, "{what}: told {:?}, problems {:?}", self.told, self.problems);
        }
    }

    async fn begin(&mut self) -> Vec<String> {
        self.until("the first list", |watched| watched.begun).await;
        let mut told = std::mem::take(&mut self.told);
        told.sort();
        told
    }

    async fn expect(&mut self, told: &[&str]) {
        self.until(&format!("{told:?}"), |watched| watched.told.len() >= told.len()).await;
        assert_eq!(std::mem::take(&mut self.told), told);
    }

    async fn expect_problem(&mut self, part: &str) {
        let has = |watched: &Self| watched.problems.iter().any(|problem| problem.contains(part));
        self.until(part, has).await;
    }

    async fn expect_no_problem(&mut self) {
        self.until("no problem", |watched| watched.problems.is_empty()).await;
    }

    async fn expect_silence(&mut self) {
        assert!(!self.next(Duration::from_millis(300)).await, "{:?} {:?}", self.told, self.problems);
    }
}

fn short(change: &Change) -> String {
    match change {
        Change::Upsert(Object::Service(service)) => {
            let ports: Vec<String> = service.spec.ports.iter().map(|port| port.port.to_string()).collect();
            format!("+{}:{}", service.metadata.name.name(), ports.join(","))
        }
        Change::Upsert(object) => format!("+{} {}", object.kind(), object.name().name()),
        Change::Delete(kind, name) => format!("-{kind} {}", name.name()),
    }
}

fn count(content: &Content, part: &str) -> usize {
    content.asked.iter().filter(|uri| uri.contains(part)).count()
}

#[tokio::test]
async fn requests_are_counted_by_how_they_ended() {
    let server = server().await;
    let mut watched = Watched::open(&options(&server)).await;
    watched.begin().await;
    assert!(watched.requests("200") >= 3, "Services, EndpointSlices and Nodes: {}", watched.requests("200"));
    assert_eq!(watched.requests("<error>"), 0);
    let address = Address { master: Some("http://127.0.0.1:1".to_owned()), ..Address::default() };
    let mut watched = Watched::open(&Options { address, ..options(&server) }).await;
    watched.expect_problem("can't be reached").await;
    assert!(watched.requests("<error>") >= 1);
    assert_eq!(watched.requests("200"), 0);
}

#[tokio::test]
async fn a_first_list_is_followed_by_changes() {
    let server = server().await;
    let mut watched = Watched::open(&options(&server)).await;
    assert_eq!(watched.begin().await, ["+EndpointSlice a-1", "+Node n", "+a:1"]);
    server.content().put(Kind::Service, service("a", 2));
    watched.expect(&["+a:2"]).await;
    server.content().put(Kind::EndpointSlice, slice("a-2"));
    watched.expect(&["+EndpointSlice a-2"]).await;
    server.content().delete(Kind::Service, "a");
    watched.expect(&["-Service a"]).await;
    assert_eq!(watched.problems, Vec::<String>::new());
}

#[tokio::test]
async fn the_selectors_are_those_of_kube_proxy() {
    for (endpoints, asked) in [
        (
            Endpoints::EndpointSlice,
            &[
                "/api/v1/nodes?fieldSelector=metadata.name%3Dn",
                "/api/v1/services?fieldSelector=spec.clusterIP%21%3DNone&labelSelector=%21service.kubernetes.io%2Fservice-proxy-name",
                "/apis/discovery.k8s.io/v1/endpointslices?labelSelector=%21service.kubernetes.io%2Fheadless",
                "/apis/networking.k8s.io/v1/servicecidrs?",
            ][..],
        ),
        (
            Endpoints::PodSelector,
            &[
                "/api/v1/nodes?",
                "/api/v1/pods?",
                "/api/v1/services?fieldSelector=spec.clusterIP%21%3DNone&labelSelector=%21service.kubernetes.io%2Fservice-proxy-name",
                "/apis/discovery.k8s.io/v1/endpointslices?labelSelector=%21service.kubernetes.io%2Fheadless%2Cendpointslice.kubernetes.io%2Fmanaged-by%21%3Dendpointslice-controller.k8s.io",
                "/apis/networking.k8s.io/v1/servicecidrs?",
            ],
        ),
    ] {
        let server = server().await;
        server.content().old = true;
        let mut watched = Watched::open(&Options { endpoints, ..options(&server) }).await;
        watched.begin().await;
        watched.expect_silence().await;
        let content = server.content();
        let lists = content.asked.iter().filter(|uri| !uri.contains("watch=true"));
        let mut lists: Vec<String> =
            lists.map(|uri| uri.trim_end_matches("limit=500").trim_end_matches('&').to_owned()).collect();
        lists.sort();
        assert_eq!(lists, asked);
        // The watch that goes on from the list has the same selectors.
        for list in asked {
            let (path, query) = list.split_once('?').unwrap();
            let goes_on =
                |uri: &&String| uri.starts_with(path) && uri.contains(query) && uri.contains("resourceVersion=");
            assert!(content.asked.iter().filter(|uri| uri.contains("watch=true")).any(|uri| goes_on(&uri)), "{list}");
        }
    }
}

#[tokio::test]
async fn nothing_is_first_before_everything_needed_is_listed() {
    for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
        let server = server().await;
        server.content().refused.insert(kind, 403);
        let mut watched = Watched::open(&options(&server)).await;
        watched.expect_problem(&format!("grant verbs `list` and `watch` on {}", kind.plural())).await;
        watched.until("the others", |watched| watched.told.len() == 2).await;
        assert!(!watched.begun, "{kind}");
        server.content().refused.clear();
        watched.begin().await;
        watched.expect_no_problem().await;
    }
}

#[tokio::test]
async fn an_unfinished_list_is_not_complete() {
    let server = server().await;
    server.content().endless.insert(Kind::Service);
    let mut watched = Watched::open(&options(&server)).await;
    watched.until("what there is", |watched| watched.told.len() == 3).await;
    watched.expect_silence().await;
    assert!(!watched.begun);
}

#[tokio::test]
async fn service_cidrs_are_never_waited_for() {
    for code in [403, 404] {
        let server = server().await;
        server.content().refused.insert(Kind::ServiceCidr, code);
        let mut watched = Watched::open(&options(&server)).await;
        watched.begin().await;
        watched.expect_problem("everything else works without").await;
        assert!(watched.problems[0].starts_with("ServiceCIDRs: "), "{:?}", watched.problems);
    }
}

#[tokio::test]
async fn what_is_pinned_of_service_cidrs_stays_until_their_list_is_complete_or_does_not_come() {
    let server = server().await;
    server.content().endless.insert(Kind::ServiceCidr);
    let mut watched = Watched::open(&options(&server)).await;
    watched.until("the others", |watched| watched.told.len() == 3).await;
    watched.expect_silence().await;
    assert!(!watched.begun);
    let start = Instant::now();
    watched.begin().await;
    assert!(start.elapsed() > Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn slices_made_by_hand_are_waited_for_where_endpoints_come_from_pods() {
    let server = server().await;
    server.content().endless.insert(Kind::EndpointSlice);
    let mut watched = Watched::open(&Options { endpoints: Endpoints::PodSelector, ..options(&server) }).await;
    watched.until("the others", |watched| watched.told.len() == 3).await;
    watched.expect_silence().await;
    assert!(!watched.begun);
}

#[tokio::test]
async fn a_server_without_streamed_lists_is_asked_for_pages() {
    let server = server().await;
    server.content().old = true;
    let mut watched = Watched::open(&options(&server)).await;
    assert_eq!(watched.begin().await, ["+EndpointSlice a-1", "+Node n", "+a:1"]);
    assert_eq!(watched.problems, Vec::<String>::new());
    server.content().put(Kind::Service, service("b", 2));
    watched.expect(&["+b:2"]).await;
    assert_eq!(
        count(
            &server.content(),
            "services?watch=true&timeoutSeconds=290&fieldSelector=spec.clusterIP%21%3DNone&labelSelector=%21service.kubernetes.io%2Fservice-proxy-name&allowWatchBookmarks=true&sendInitialEvents=true"
        ),
        1
    );
}

#[tokio::test]
async fn what_a_new_list_lacks_is_gone() {
    let server = server().await;
    let mut watched = Watched::open(&options(&server)).await;
    watched.begin().await;
    server.content().put(Kind::Service, service("b", 2));
    watched.expect(&["+b:2"]).await;
    server.content().delete_unseen(Kind::Service, "a");
    server.content().expire(Kind::Service);
    watched.expect(&["+b:2", "-Service a"]).await;
    // An object that came with the new list counts as part of it.
    server.content().expire(Kind::Service);
    watched.expect(&["+b:2"]).await;
    assert_eq!(watched.problems, Vec::<String>::new());
}

#[tokio::test]
async fn while_the_server_is_away_nothing_changes() {
    let mut server = server().await;
    let mut watched = Watched::open(&options(&server)).await;
    watched.begin().await;
    server.stop().await;
    watched.expect_problem("can't be reached: Connection refused").await;
    assert_eq!(watched.problems.len(), 1, "{:?}", watched.problems);
    assert_eq!(watched.told, Vec::<String>::new());
    server.restart().await;
    watched.expect_no_problem().await;
    assert_eq!(watched.told, Vec::<String>::new());
    let lists = count(&server.content(), "services?watch=true&timeoutSeconds=290");
    assert!(lists >= 2, "the watch goes on");
    server.content().put(Kind::Service, service("a", 5));
    watched.expect(&["+a:5"]).await;
}

#[tokio::test]
async fn an_object_that_cannot_be_read_costs_itself_alone() {
    let server = server().await;
    server.content().put(Kind::Service, service("bad", 70_000));
    let mut watched = Watched::open(&options(&server)).await;
    assert_eq!(watched.begin().await, ["+EndpointSlice a-1", "+Node n", "+a:1"]);
    assert_eq!(watched.problems.len(), 1);
    assert!(watched.problems[0].starts_with("Service default/bad, spec.ports[0].port: "), "{:?}", watched.problems);
    server.content().put(Kind::Service, service("bad", 7));
    watched.expect(&["+bad:7"]).await;
    watched.expect_no_problem().await;
    // Broken again, it stays as it was, through a new list too.
    server.content().put(Kind::Service, service("bad", 70_000));
    watched.expect_problem("Service default/bad").await;
    server.content().expire(Kind::Service);
    watched.expect(&["+a:1"]).await;
    server.content().delete(Kind::Service, "bad");
    watched.expect(&["-Service bad"]).await;
    watched.expect_no_problem().await;
}

#[tokio::test]
async fn the_own_node_is_waited_for() {
    let server = server().await;
    server.content().delete(Kind::Node, "n");
    let mut watched = Watched::open(&options(&server)).await;
    watched.expect_problem("Node n: the cluster has no such Node").await;
    watched.until("the rest", |watched| watched.told.len() == 2).await;
    watched.expect_silence().await;
    server.content().put(Kind::Node, named(Kind::Node, "n", json!({})));
    watched.expect_problem("Node n: has no InternalIP").await;
    assert!(!watched.begun);
    server.content().put(Kind::Node, node("n", "10.0.0.9"));
    watched.begin().await;
    watched.expect_no_problem().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_come_is_not_waited_for_longer_than_kube_proxy_does() {
    let mut source = super::fold::Fold::new("n");
    source.take(Kind::Node, kube::runtime::watcher::Event::Init);
    source.take(Kind::Node, kube::runtime::watcher::Event::InitDone);
    let (_sender, signals) = tokio::sync::mpsc::channel(1);
    let watches = tokio::task::JoinSet::new();
    let started = tokio::time::Instant::now();
    let node = super::NodeWait { name: "n".to_owned(), pod_cidrs: false, since: Some(started) };
    let (needed, optional) = (vec![Kind::Node], Vec::new());
    let (fold, troubles, told) = (source, Default::default(), Vec::new());
    let mut server =
        ApiServer { signals, _watches: watches, needed, optional, fold, troubles, node, begun: false, told };
    let update = server.next().await.unwrap();
    assert!(update.first && update.problems.len() == 1, "{update:?}");
    assert_eq!(started.elapsed().as_secs(), 30);
}

#[tokio::test]
async fn pod_networks_are_waited_for_where_they_tell_what_is_local() {
    let server = server().await;
    let mut watched = Watched::open(&Options { pod_cidrs: true, ..options(&server) }).await;
    watched.expect_problem("has no spec.podCIDRs").await;
    watched.expect_silence().await;
    assert!(!watched.begun);
    let mut with = node("n", "10.0.0.9");
    with["spec"] = json!({"podCIDRs": ["10.1.0.0/24"]});
    server.content().put(Kind::Node, with);
    watched.begin().await;
    watched.expect_no_problem().await;
}

#[tokio::test]
async fn credentials_are_read_again_when_they_are_refused() {
    let server = server().await;
    server.content().refused.insert(Kind::Service, 401);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kubeconfig");
    let kubeconfig = |url: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: '{url}'}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    kubeconfig(&server.url());
    let address = Address { kubeconfig: Some(file.clone()), master: None };
    let mut watched = Watched::open(&Options { address, ..options(&server) }).await;
    watched.expect_problem("doesn't accept our credentials").await;
    assert!(!watched.begun);
    let other = self::server().await;
    kubeconfig(&other.url());
    watched.begin().await;
    watched.expect_no_problem().await;
}

#[tokio::test]
async fn what_no_waiting_helps_against_is_an_error() {
    for (address, part) in [
        (Address { kubeconfig: Some("/nowhere/at/all".into()), master: None }, "/nowhere/at/all: the kubeconfig"),
        (Address { kubeconfig: None, master: Some("::".to_owned()) }, "--master ::: no URL"),
        (Address::default(), "name a --kubeconfig"),
    ] {
        let server = Server::start().await;
        let error =
            ApiServer::open(&Options { address, ..options(&server) }, &Requests::new().unwrap()).await.err().unwrap();
        assert!(format!("{error:#}").contains(part), "{error:#}");
    }
}
