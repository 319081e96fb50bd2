//! The servers over real sockets: every path, code, header and body.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use super::{
    Options, Serve,
    health::{Family, Moment},
    node_ports::Checks,
};
use crate::{
    events::Events,
    model::ObjectName,
    plan::{HealthCheck, node::ProxyMode},
};

/// A loopback address for each test, so that the usual ports are free.
fn address(test: u8, port: u16) -> SocketAddr {
    (Ipv4Addr::new(127, 0, 77, test), port).into()
}

fn start(test: u8, sync_period: Duration) -> Serve {
    let flags = vec![("proxy-mode".to_owned(), "nftables".to_owned()), ("v".to_owned(), "2".to_owned())];
    let options = Options {
        healthz: Some(address(test, 10256)),
        metrics: Some(address(test, 10249)),
        mode: ProxyMode::Nftables,
        configuration: serde_json::json!({"kind": "KubeProxyConfiguration"}),
        flags,
        sync_period,
        ..Options::default()
    };
    let serve = Serve::start(options, "/nowhere".into(), Events::default()).unwrap();
    serve.health().set_eligible(true);
    serve
}

/// Status line, headers without the date, body.
fn ask(to: SocketAddr, request: &str) -> Option<(String, BTreeMap<String, String>, String)> {
    let mut stream = TcpStream::connect(to).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let (status, headers) = head.split_once("\r\n")?;
    let headers = headers.split("\r\n").filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers = headers.filter(|(name, _)| name != "date" && name != "connection").collect();
    Some((status.to_owned(), headers, body.to_owned()))
}

/// The first answer that satisfies, within five seconds.
fn wait<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(8), "not within eight seconds");
        thread::sleep(Duration::from_millis(5));
    }
}

fn name() -> ObjectName {
    ObjectName::new("shop", "web")
}

fn checks(port: u16, v4: Option<usize>, address: SocketAddr) -> Checks {
    Checks {
        services: [(name(), Some(HealthCheck { port, v4, v6: None }))].into(),
        addresses: Some(vec![address.ip()]),
    }
}

#[test]
fn healthz_and_livez_answer_every_method_and_nothing_else_is_there() {
    let serve = start(1, Duration::from_secs(30));
    let to = address(1, 10256);
    for request in ["GET /healthz", "POST /livez", "DELETE /healthz?a=b", "GET /livez"] {
        let (status, headers, body) = wait(|| ask(to, request));
        assert_eq!(status, "HTTP/1.1 200 OK", "{request}");
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["content-length"], body.len().to_string());
        assert_eq!(body.contains(r#""nodeEligible":true"#), request.contains("healthz"), "{body}");
    }
    for path in ["/", "/healthz/", "/metrics"] {
        let (status, headers, body) = ask(to, &format!("GET {path}")).unwrap();
        assert_eq!((status.as_str(), body.as_str()), ("HTTP/1.1 404 Not Found", "404 page not found\n"), "{path}");
        assert_eq!(headers["content-type"], "text/plain; charset=utf-8");
    }
    serve.health().set_eligible(false);
    assert_eq!(ask(to, "GET /healthz").unwrap().0, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(ask(to, "GET /livez").unwrap().0, "HTTP/1.1 200 OK");
}

#[test]
fn health_checks_answer_any_path_and_turn_with_the_count_and_with_this_node() {
    let serve = start(2, Duration::from_millis(50));
    let to = address(2, 30301);
    serve.set_checks(checks(30301, Some(2), to));
    let (status, headers, body) = wait(|| ask(to, "GET /any/path"));
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["x-content-type-options"], "nosniff");
    assert_eq!(headers["x-load-balancing-endpoint-weight"], "2");
    assert_eq!(
        body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\
         \t\"serviceProxyHealthy\": true\n}"
    );
    serve.set_checks(checks(30301, Some(0), to));
    let (_, headers, body) = wait(|| ask(to, "POST /").filter(|(status, ..)| status.contains("503")));
    assert_eq!(headers["x-load-balancing-endpoint-weight"], "0");
    assert!(body.contains("\"localEndpoints\": 0,\n\t\"serviceProxyHealthy\": true"), "{body}");
    serve.set_checks(checks(30301, Some(1), to));
    wait(|| ask(to, "GET /").filter(|(status, ..)| status.contains("200")));
    serve.health().set_eligible(false);
    assert!(ask(to, "GET /").unwrap().0.contains("200"), "a Node that goes still has its endpoints");
    serve.health().queued(&[Family::V6], Moment::now());
    let (_, headers, body) = wait(|| ask(to, "GET /").filter(|(status, ..)| status.contains("503")));
    assert_eq!(headers["x-load-balancing-endpoint-weight"], "1");
    assert!(body.contains("\"serviceProxyHealthy\": false"), "{body}");
    serve.health().updated(&[Family::V6], Moment::now());
    assert!(ask(to, "GET /").unwrap().0.contains("200"));
}

#[test]
fn health_checks_follow_their_service_to_another_port_and_end_with_it() {
    let serve = start(3, Duration::from_secs(30));
    let (first, second) = (address(3, 30301), address(3, 30302));
    serve.set_checks(checks(30301, Some(1), first));
    wait(|| ask(first, "GET /"));
    serve.set_checks(checks(30302, Some(1), first));
    wait(|| ask(second, "GET /"));
    assert!(ask(first, "GET /").is_none());
    // The port goes from one Service to another that is named before it.
    let other = ObjectName::new("a", "a");
    let services = [(other, Some(HealthCheck { port: 30302, v4: Some(3), v6: None })), (name(), None)].into();
    serve.set_checks(Checks { services, addresses: None });
    wait(|| ask(second, "GET /").filter(|(_, headers, _)| headers["x-load-balancing-endpoint-weight"] == "3"));
    assert!(serve.troubles().is_empty());
    serve.set_checks(Checks { services: [(ObjectName::new("a", "a"), None)].into(), addresses: None });
    wait(|| ask(second, "GET /").is_none().then_some(()));
}

#[test]
fn families_are_counted_and_served_for_themselves() {
    let serve = start(4, Duration::from_secs(30));
    let v6 = SocketAddr::new(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), 30477);
    let v4 = address(4, 30477);
    let check = HealthCheck { port: 30477, v4: Some(1), v6: Some(0) };
    let addresses = Some(vec![v4.ip(), v6.ip()]);
    serve.set_checks(Checks { services: [(name(), Some(check))].into(), addresses });
    assert!(wait(|| ask(v4, "GET /")).0.contains("200"));
    assert!(wait(|| ask(v6, "GET /")).0.contains("503"));
}

#[test]
fn a_port_that_is_taken_is_reported_and_served_once_it_is_free() {
    let (to, check) = (address(5, 10256), address(5, 30301));
    let taken = (TcpListener::bind(to).unwrap(), TcpListener::bind(check).unwrap());
    let serve = start(5, Duration::from_secs(30));
    serve.set_checks(checks(30301, Some(1), check));
    let troubles = wait(|| Some(serve.troubles()).filter(|troubles| troubles.len() == 2));
    let reasons: Vec<_> = troubles.iter().map(|trouble| (trouble.reason, trouble.service.clone())).collect();
    assert_eq!(reasons, [("FailedToStartServiceHealthcheck", Some(name())), ("FailedToStartProxierHealthcheck", None)]);
    drop(taken);
    assert!(wait(|| ask(to, "GET /healthz")).0.contains("200"));
    assert!(wait(|| ask(check, "GET /")).0.contains("200"));
    wait(|| serve.troubles().is_empty().then_some(()));
}

#[tokio::test]
async fn bind_address_hard_fail_ends_the_agent() {
    let to = address(6, 10256);
    let _taken = TcpListener::bind(to).unwrap();
    let mut serve = Serve::start(
        Options { healthz: Some(to), metrics: None, hard_fail: true, ..Options::default() },
        "/nowhere".into(),
        Events::default(),
    )
    .unwrap();
    assert_eq!(serve.fatal().await.reason, "FailedToStartProxierHealthcheck");
}

/// kube-proxy 1.37.2 was asked the same: codes, types and bodies are its.
#[test]
fn every_page_of_the_metrics_server_answers_as_kube_proxy_s() {
    let _serve = start(7, Duration::from_secs(30));
    let to = address(7, 10249);
    wait(|| ask(to, "GET /healthz"));
    let text = "text/plain; charset=utf-8";
    for (request, want, content_type, body) in [
        ("GET /healthz", 200, text, Some("ok")),
        ("GET /healthz?verbose", 200, text, Some("[+]ping ok\nhealthz check passed\n")),
        ("GET /healthz?verbose&exclude=ping", 200, text, Some("[+]ping excluded: ok\nhealthz check passed\n")),
        ("GET /healthz/ping", 200, text, Some("ok")),
        ("GET /proxyMode", 200, text, Some("nftables")),
        ("POST /proxyMode", 200, text, Some("nftables")),
        (
            "GET /configz",
            200,
            "application/json",
            Some(r#"{"kubeproxy.config.k8s.io":{"kind":"KubeProxyConfiguration"}}"#),
        ),
        ("GET /metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", None),
        ("GET /metrics/slis", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", None),
        ("GET /statusz", 200, text, None),
        ("GET /flagz", 200, text, None),
        ("GET /", 404, text, Some("404 page not found\n")),
        ("GET /livez", 404, text, Some("404 page not found\n")),
        ("GET /debug/pprof/", 404, text, Some("404 page not found\n")),
    ] {
        let (status, headers, found) = ask(to, request).unwrap();
        assert_eq!(status.split(' ').nth(1), Some(want.to_string().as_str()), "{request}");
        assert_eq!(headers["content-type"], content_type, "{request}");
        if let Some(body) = body {
            assert_eq!(found, body, "{request}");
        }
    }
    let slis = ask(to, "GET /metrics/slis").unwrap();
    assert!(slis.1.contains_key("process-start-time-unix"));
    assert!(
        slis.2.contains("\nkubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 4\n"),
        "{}",
        slis.2
    );
    let text = ask(to, "GET /metrics").unwrap().2;
    assert!(
        text.contains("\nkubeproxy_sync_proxy_rules_service_changes_total 0\n") && !text.contains("# EOF"),
        "{text}"
    );
}

#[test]
fn status_and_flags_are_text_or_objects() {
    let _serve = start(8, Duration::from_secs(30));
    let to = address(8, 10249);
    let text = wait(|| ask(to, "GET /statusz")).2;
    assert!(text.starts_with("\nkube-proxy statusz\nWarning: This endpoint"), "{text}");
    assert!(text.contains("\nPaths: /configz /flagz /healthz /metrics /proxyMode\n"), "{text}");
    assert!(ask(to, "GET /flagz").unwrap().2.ends_with("\nproxy-mode=nftables\nv=2\n"));
    let accept = |page: &str, accept: &str| {
        let mut stream = TcpStream::connect(to).unwrap();
        let request = format!("GET {page} HTTP/1.1\r\nHost: node\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    };
    let (head, body) = accept("/flagz", "application/json;v=v1beta1;g=config.k8s.io;as=Flagz");
    assert!(head.contains("content-type: application/json;g=config.k8s.io;v=v1beta1;as=Flagz"), "{head}");
    let want = "{\"kind\":\"Flagz\",\"apiVersion\":\"config.k8s.io/v1beta1\",\"metadata\":{\"name\":\"kube-proxy\"},\
                \"flags\":{\"proxy-mode\":\"nftables\",\"v\":\"2\"}}\n";
    assert_eq!(body, want);
    let (head, body) = accept("/statusz", "application/json;v=v1alpha1;g=config.k8s.io;as=Statusz");
    assert!(head.contains("warning: 299 - \"This version of the statusz endpoint is deprecated."), "{head}");
    let object: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&object["kind"], &object["binaryVersion"]), (&"Statusz".into(), &"1.37.2".into()));
    let (head, body) = accept("/statusz", "application/json");
    assert!(head.starts_with("HTTP/1.1 406 Not Acceptable"), "{head}");
    assert!(
        body.contains("only the following media types are accepted: application/json, application/yaml, text/plain")
    );
}
