//! `/statusz` and `/flagz`: text for people, or objects of `config.k8s.io` for those who ask for them by `Accept`.
//!
//! In: the `Accept` header, what there is to say. Out: the response. Never here: where flags come from.

use std::collections::BTreeMap;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    super::{answer::TEXT, metrics},
    KUBERNETES,
};
use crate::config::yaml;

/// The group of the objects.
const GROUP: &str = "config.k8s.io";
/// Its versions, of which the first is deprecated.
const VERSIONS: [&str; 2] = ["v1alpha1", "v1beta1"];
/// The paths that kube-proxy lists.
const PATHS: [&str; 5] = ["/configz", "/flagz", "/healthz", "/metrics", "/proxyMode"];

/// What can be said in text and as an object, whose fields beside kind, version and name are its own.
pub(super) trait Page: Serialize {
    /// `Statusz`, `Flagz`.
    const KIND: &'static str;
    /// What people read.
    fn text(&self) -> String;
}

/// `/statusz`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Statusz {
    #[serde(skip)]
    started: Timestamp,
    start_time: String,
    uptime_seconds: i64,
    go_version: &'static str,
    binary_version: &'static str,
    emulation_version: &'static str,
    paths: [&'static str; 5],
}

impl Statusz {
    /// The process as it is.
    pub(super) fn now() -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "seconds of Unix time")]
        let start = metrics::start_time().unwrap_or_default() as i64;
        let started = Timestamp::from_second(start).unwrap_or_default();
        Self {
            started,
            start_time: started.to_string(),
            uptime_seconds: (Timestamp::now().as_second() - start).max(0),
            // There is no Go here; who parses the field finds it.
            go_version: "",
            binary_version: KUBERNETES,
            emulation_version: "1.37",
            paths: PATHS,
        }
    }
}

impl Page for Statusz {
    const KIND: &'static str = "Statusz";

    fn text(&self) -> String {
        let up = self.uptime_seconds;
        format!(
            "\nStarted: {}\nUp: {} hr {:02} min {:02} sec\nGo version: {}\nBinary version: {}\nEmulation version: {}\nPaths: {}\n",
            self.started.strftime("%a %b %e %H:%M:%S UTC %Y"),
            up / 3600,
            up / 60 % 60,
            up % 60,
            self.go_version,
            self.binary_version,
            self.emulation_version,
            self.paths.join(" ")
        )
    }
}

/// `/flagz`.
#[derive(Debug, Serialize)]
pub(super) struct Flagz<'a> {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    flags: BTreeMap<&'a str, &'a str>,
}

impl<'a> Flagz<'a> {
    /// Flags with their values.
    pub(super) fn new(flags: &'a [(String, String)]) -> Self {
        Self { flags: flags.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect() }
    }
}

impl Page for Flagz<'_> {
    const KIND: &'static str = "Flagz";

    fn text(&self) -> String {
        self.flags.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }
}

/// How a page is wanted.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Text,
    /// Media type and version.
    Object(&'static str, &'static str),
}

/// Answers as the client accepts it, text first; what can't be had is 406.
pub(super) fn respond<P: Page>(headers: &HeaderMap, page: &P) -> Response<Body> {
    let accept = text_of(headers, header::ACCEPT);
    let Some(wanted) = wanted(accept, P::KIND) else { return not_acceptable(headers) };
    let (content_type, body, version) = match wanted {
        Wanted::Text => {
            let text = format!(
                "\nkube-proxy {}\nWarning: This endpoint is not meant to be machine parseable, has no formatting \
                 compatibility guarantees and is for debugging purposes only.\n{}",
                P::KIND.to_lowercase(),
                page.text()
            );
            (TEXT, text, None)
        }
        Wanted::Object(media, version) => {
            let content_type = format!("{media};g={GROUP};v={version};as={}", P::KIND);
            let content_type =
                HeaderValue::from_str(&content_type).unwrap_or(HeaderValue::from_static("application/json"));
            let metadata = [("name", "kube-proxy")].into();
            let object = Object { kind: P::KIND, api_version: format!("{GROUP}/{version}"), metadata, page };
            (content_type, Form::of(media, headers).write(&object), Some(version))
        }
    };
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    if version == Some(VERSIONS[0]) {
        let text = format!(
            "299 - \"This version of the {} endpoint is deprecated. Please use a newer version.\"",
            P::KIND.to_lowercase()
        );
        if let Ok(value) = HeaderValue::from_str(&text) {
            response.headers_mut().insert(header::WARNING, value);
        }
    }
    response
}

/// An object of the group, in the order in which kube-proxy writes it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a, P> {
    kind: &'static str,
    api_version: String,
    metadata: BTreeMap<&'static str, &'static str>,
    #[serde(flatten)]
    page: &'a P,
}

fn text_of(headers: &HeaderMap, name: header::HeaderName) -> &str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// How an object is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Line,
    Indented,
    Yaml,
}

impl Form {
    /// As a media type asks, and as people like it whose browsers and tools the API server's library knows.
    fn of(media: &str, headers: &HeaderMap) -> Self {
        let agent = text_of(headers, header::USER_AGENT);
        match media {
            "application/yaml" => Self::Yaml,
            "application/json" if !["curl", "Wget", "Mozilla/5.0"].iter().any(|name| agent.starts_with(name)) => {
                Self::Line
            }
            _ => Self::Indented,
        }
    }

    fn write(self, object: &impl Serialize) -> String {
        match self {
            Self::Line => serde_json::to_string(object).unwrap_or_default() + "\n",
            Self::Indented => serde_json::to_string_pretty(object).unwrap_or_default(),
            Self::Yaml => yaml(&serde_json::to_value(object).unwrap_or_default()),
        }
    }
}

/// The first of the accepted types that there is. Objects have to be asked for by group, version and kind.
fn wanted(accept: &str, kind: &str) -> Option<Wanted> {
    if accept.trim().is_empty() {
        return Some(Wanted::Text);
    }
    accept.split(',').find_map(|clause| {
        let mut parts = clause.split(';').map(str::trim);
        let media = parts.next()?;
        let parameters: BTreeMap<&str, &str> = parts.filter_map(|part| part.split_once('=')).collect();
        let version = VERSIONS.into_iter().find(|version| parameters.get("v") == Some(version));
        let object = parameters.get("g") == Some(&GROUP) && parameters.get("as") == Some(&kind);
        match (media, version.filter(|_| object)) {
            ("application/json" | "application/*" | "*/*", Some(version)) => {
                Some(Wanted::Object("application/json", version))
            }
            ("application/yaml", Some(version)) => Some(Wanted::Object("application/yaml", version)),
            ("text/plain" | "text/*" | "*/*", _) if !parameters.contains_key("as") => Some(Wanted::Text),
            _ => None,
        }
    })
}

/// An object of the API, as its library writes one.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Refusal {
    kind: &'static str,
    api_version: &'static str,
    metadata: BTreeMap<&'static str, &'static str>,
    status: &'static str,
    message: &'static str,
    reason: &'static str,
    code: u16,
}

fn not_acceptable(headers: &HeaderMap) -> Response<Body> {
    let refusal = Refusal {
        kind: "Status",
        api_version: "v1",
        metadata: BTreeMap::new(),
        status: "Failure",
        message: "only the following media types are accepted: application/json, application/yaml, text/plain",
        reason: "NotAcceptable",
        code: 406,
    };
    let medias = text_of(headers, header::ACCEPT).split(',').filter_map(|clause| clause.split(';').next());
    let media = medias.map(str::trim).find_map(|media| match media {
        "application/json" | "application/*" | "*/*" => Some("application/json"),
        "application/yaml" => Some("application/yaml"),
        _ => None,
    });
    let form = Form::of(media.unwrap_or_default(), headers);
    let mut response = Response::new(Body::from(form.write(&refusal)));
    *response.status_mut() = StatusCode::NOT_ACCEPTABLE;
    let content_type = if form == Form::Yaml { "application/yaml" } else { "application/json" };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_had_by_their_full_name_only() {
        for (accept, want) in [
            ("", Some(Wanted::Text)),
            ("*/*", Some(Wanted::Text)),
            ("text/plain", Some(Wanted::Text)),
            ("text/html, text/*;q=0.5", Some(Wanted::Text)),
            ("application/json", None),
            (
                "application/json;v=v1beta1;g=config.k8s.io;as=Statusz",
                Some(Wanted::Object("application/json", "v1beta1")),
            ),
            (
                "application/json; v=v1alpha1; g=config.k8s.io; as=Statusz",
                Some(Wanted::Object("application/json", "v1alpha1")),
            ),
            (
                "application/yaml;v=v1beta1;g=config.k8s.io;as=Statusz",
                Some(Wanted::Object("application/yaml", "v1beta1")),
            ),
            ("*/*;v=v1beta1;g=config.k8s.io;as=Statusz", Some(Wanted::Object("application/json", "v1beta1"))),
            ("application/json;v=v1beta1;g=config.k8s.io;as=Flagz", None),
            ("application/json;v=v2;g=config.k8s.io;as=Statusz,text/plain", Some(Wanted::Text)),
        ] {
            assert_eq!(wanted(accept, "Statusz"), want, "{accept}");
        }
    }
}
