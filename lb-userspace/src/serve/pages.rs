//! The pages of the metrics server (`kube-proxy.md` §9): every path that kube-proxy serves there with default feature gates,
//! apart from the profiler (`/debug/pprof`, off by default), which is Go's.
//!
//! In: metrics, configuration, flags. Out: text and JSON. Never here: what is counted.

mod status;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::{RawQuery, State},
    http::{HeaderMap, HeaderValue, Response, StatusCode},
    routing::any,
};

use self::status::{Flagz, Statusz};
use super::{
    answer::{JSON, TEXT, answer, not_found},
    metrics::{self, Metrics},
};
use crate::plan::node::ProxyMode;

/// The release of kube-proxy whose behaviour this is.
const KUBERNETES: &str = "1.37.2";
/// Prometheus' text format.
const METRICS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8; escaping=underscores");

/// What the pages show.
#[derive(Debug)]
pub struct Pages {
    /// Everything that is counted.
    pub metrics: Arc<Metrics>,
    /// What the configuration says, for `/proxyMode`.
    pub mode: ProxyMode,
    /// The configuration in force as JSON, for `/configz`.
    pub configuration: serde_json::Value,
    /// Flags with their values, for `/flagz`.
    pub flags: Vec<(String, String)>,
    /// How often `/healthz` was asked for.
    pub pings: AtomicU64,
}

type Shared = State<Arc<Pages>>;

/// The version that metrics and `/statusz` name.
#[must_use]
pub fn git_version() -> String {
    format!("v{KUBERNETES}+fairlead-{}", env!("CARGO_PKG_VERSION"))
}

/// The platform in Go's words.
#[must_use]
pub fn platform() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{arch}")
}

/// All pages, for any method.
pub fn router(pages: Arc<Pages>) -> Router {
    Router::new()
        .route("/metrics", any(metrics))
        .route("/metrics/slis", any(slis))
        .route("/healthz", any(healthz))
        .route("/healthz/ping", any(ping))
        .route(
            "/proxyMode",
            any(|State(pages): Shared| async move { answer(StatusCode::OK, TEXT, pages.mode.as_str()) }),
        )
        .route("/configz", any(configz))
        .route("/statusz", any(statusz))
        .route("/flagz", any(flagz))
        .fallback(not_found)
        .with_state(pages)
}

async fn metrics(State(pages): Shared) -> Response<Body> {
    with_start(answer_metrics(pages.metrics.text()))
}

/// The result of the one check that this server knows: that it answers.
async fn slis(State(pages): Shared) -> Response<Body> {
    let count = pages.pings.load(Ordering::Relaxed);
    let start = metrics::start_time().unwrap_or_default();
    let mut text = String::new();
    if count != 0 {
        text = format!(
            "# HELP kubernetes_healthcheck [STABLE] This metric records the result of a single healthcheck.\n\
             # TYPE kubernetes_healthcheck gauge\n\
             kubernetes_healthcheck{{name=\"ping\",type=\"healthz\"}} 1\n\
             # HELP kubernetes_healthchecks_total [STABLE] This metric records the results of all healthcheck.\n\
             # TYPE kubernetes_healthchecks_total counter\n\
             kubernetes_healthchecks_total{{name=\"ping\",status=\"success\",type=\"healthz\"}} {count}\n"
        );
    }
    text += &format!(
        "# HELP process_start_time_seconds [ALPHA] Start time of the process since unix epoch in seconds.\n\
         # TYPE process_start_time_seconds gauge\n\
         process_start_time_seconds {start}\n"
    );
    with_start(answer_metrics(text))
}

fn answer_metrics(text: String) -> Response<Body> {
    let mut response = answer(StatusCode::OK, METRICS, text);
    response.headers_mut().remove(axum::http::header::X_CONTENT_TYPE_OPTIONS);
    response
}

/// Prometheus can reset counters by it.
fn with_start(mut response: Response<Body>) -> Response<Body> {
    if let Some(start) = metrics::start_time()
        && let Ok(value) = HeaderValue::from_str(&format!("{start:.0}"))
    {
        response.headers_mut().insert("process-start-time-unix", value);
    }
    response
}

async fn healthz(State(pages): Shared, RawQuery(query): RawQuery) -> Response<Body> {
    pages.pings.fetch_add(1, Ordering::Relaxed);
    let query = query.unwrap_or_default();
    let asks = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    let excluded = query.split('&').any(|pair| pair == "exclude=ping");
    let text = match (asks("verbose"), excluded) {
        (false, _) => "ok",
        (true, false) => "[+]ping ok\nhealthz check passed\n",
        (true, true) => "[+]ping excluded: ok\nhealthz check passed\n",
    };
    answer(StatusCode::OK, TEXT, text)
}

async fn ping() -> Response<Body> {
    let mut response = answer(StatusCode::OK, TEXT, "ok");
    response.headers_mut().remove(axum::http::header::X_CONTENT_TYPE_OPTIONS);
    response
}

async fn configz(State(pages): Shared) -> Response<Body> {
    let body = serde_json::json!({ "kubeproxy.config.k8s.io": pages.configuration });
    answer(StatusCode::OK, JSON, body.to_string())
}

async fn statusz(headers: HeaderMap) -> Response<Body> {
    status::respond(&headers, &Statusz::now())
}

async fn flagz(State(pages): Shared, headers: HeaderMap) -> Response<Body> {
    status::respond(&headers, &Flagz::new(&pages.flags))
}
