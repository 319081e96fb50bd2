//! An API server that says what a test wants: lists, streamed lists, watches, refusals.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use futures::stream;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};

use crate::model::Kind;

/// What it serves, and what it was asked.
#[derive(Default)]
pub(super) struct Content {
    version: u64,
    objects: BTreeMap<Kind, BTreeMap<String, Value>>,
    watches: Vec<(Kind, mpsc::UnboundedSender<Bytes>)>,
    /// Everything that watches were told, with the version that it led to.
    history: Vec<(u64, Kind, Bytes)>,
    /// Status codes for kinds, instead of anything else.
    pub refused: BTreeMap<Kind, u16>,
    /// Whether it knows no streamed lists.
    pub old: bool,
    /// Kinds of which a list never ends.
    pub endless: BTreeSet<Kind>,
    /// Paths and queries of all requests.
    pub asked: Vec<String>,
}

/// A server on a port of its own.
pub(super) struct Server {
    pub port: u16,
    content: Arc<Mutex<Content>>,
    task: JoinHandle<()>,
}

impl Server {
    pub(super) async fn start() -> Self {
        let content = Arc::new(Mutex::new(Content { version: 1, ..Content::default() }));
        let (port, task) = serve("127.0.0.1:0", &content).await;
        Self { port, content, task }
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    /// Ends the server with all its connections.
    pub(super) async fn stop(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.content().watches.clear();
    }

    /// Starts it again on the same port.
    pub(super) async fn restart(&mut self) {
        let (_, task) = serve(&format!("127.0.0.1:{}", self.port), &self.content.clone()).await;
        self.task = task;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Content {
    /// Creates or replaces an object.
    pub(super) fn put(&mut self, kind: Kind, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let old = self.objects.entry(kind).or_default().insert(name, object.clone());
        self.tell(kind, if old.is_some() { "MODIFIED" } else { "ADDED" }, object);
    }

    /// Deletes an object.
    pub(super) fn delete(&mut self, kind: Kind, name: &str) {
        self.version += 1;
        let mut object = self.objects.get_mut(&kind).unwrap().remove(name).unwrap();
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.tell(kind, "DELETED", object);
    }

    /// Deletes an object without a word, as if nobody had watched just then.
    pub(super) fn delete_unseen(&mut self, kind: Kind, name: &str) {
        self.objects.get_mut(&kind).unwrap().remove(name).unwrap();
    }

    /// Tells a kind's watches that they are too old to go on.
    pub(super) fn expire(&mut self, kind: Kind) {
        self.tell(kind, "ERROR", status(410, "too old resource version"));
        self.watches.retain(|(watched, _)| *watched != kind);
    }

    fn tell(&mut self, kind: Kind, what: &str, object: Value) {
        let line = line(what, &object);
        if what != "ERROR" {
            self.history.push((self.version, kind, line.clone()));
        }
        self.watches.retain(|(watched, sender)| *watched != kind || sender.send(line.clone()).is_ok());
    }
}

async fn serve(address: &str, content: &Arc<Mutex<Content>>) -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = Router::new().fallback(answer).with_state(content.clone());
    (port, tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }))
}

async fn answer(State(content): State<Arc<Mutex<Content>>>, uri: Uri) -> Response {
    let mut content = content.lock().unwrap();
    content.asked.push(uri.to_string().replace("?&", "?"));
    let Some(kind) = Kind::ALL.into_iter().find(|kind| uri.path().ends_with(kind.plural())) else {
        return refusal(404, "no such path");
    };
    let query = uri.query().unwrap_or_default();
    if let Some(code) = content.refused.get(&kind) {
        return refusal(*code, &format!("{} is forbidden: nobody may", kind.plural()));
    }
    let streamed = query.contains("sendInitialEvents=true");
    if streamed && content.old {
        return refusal(422, "sendInitialEvents is forbidden for watch");
    }
    let version = content.version.to_string();
    let objects: Vec<Value> = content.objects.get(&kind).into_iter().flat_map(|of| of.values()).cloned().collect();
    if !query.contains("watch=true") {
        let list = json!({"kind": format!("{kind}List"), "apiVersion": kind.api_version(),
            "metadata": {"resourceVersion": version}, "items": objects});
        return list.to_string().into_response();
    }
    let (sender, receiver) = mpsc::unbounded_channel();
    if streamed {
        objects.iter().for_each(|object| sender.send(line("ADDED", object)).unwrap());
        if !content.endless.contains(&kind) {
            let end = json!({"k8s.io/initial-events-end": "true"});
            let mark = json!({"kind": kind.as_str(), "apiVersion": kind.api_version(),
                "metadata": {"resourceVersion": version, "annotations": end}});
            sender.send(line("BOOKMARK", &mark)).unwrap();
        }
    }
    let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok());
    if let Some(from) = from.filter(|_| !streamed) {
        let missed = content.history.iter().filter(|(version, of, _): &&(u64, _, _)| *version > from && *of == kind);
        missed.for_each(|(_, _, line)| sender.send(line.clone()).unwrap());
    }
    content.watches.push((kind, sender));
    let lines = stream::unfold(receiver, |mut receiver| async {
        let line = receiver.recv().await?;
        Some((Ok::<_, Infallible>(line), receiver))
    });
    Body::from_stream(lines).into_response()
}

fn line(what: &str, object: &Value) -> Bytes {
    // The API server writes the type first.
    format!("{{\"type\":{what:?},\"object\":{object}}}\n").into()
}

fn refusal(code: u16, message: &str) -> Response {
    (StatusCode::from_u16(code).unwrap(), status(code, message).to_string()).into_response()
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": if code == 410 { "Expired" } else { "Forbidden" }, "code": code})
}
