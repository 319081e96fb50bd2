//! Events in the cluster, as kube-proxy records them (`events.k8s.io/v1`; `kube-proxy.md` §7, §12).
//!
//! In: what happened to the Node or to a Service. Out: Event objects, the same one at most once in a while. Nobody waits for them: with
//! the API server away, or far too many of them, they are lost, and the log has them.

use std::{collections::HashMap, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::{sync::mpsc, time::Instant};
use tracing::debug;

use crate::{
    model::ObjectName,
    source::api::{Address, Requests},
};

/// What kube-proxy calls itself in events.
const CONTROLLER: &str = "kube-proxy";
/// The same event is recorded again after so long, as client-go does with series.
const REPEAT: Duration = Duration::from_secs(360);
/// So many events may wait to be recorded.
const ROOM: usize = 64;

/// Something worth an event.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Happening {
    /// The Service that it is about; none: the Node.
    pub service: Option<ObjectName>,
    /// Whether someone should act.
    pub warning: bool,
    /// kube-proxy's `reason`.
    pub reason: &'static str,
    /// kube-proxy's `action`.
    pub action: &'static str,
    /// What happened, for people.
    pub note: String,
}

/// Where events are recorded; the default is nowhere.
#[derive(Clone, Debug, Default)]
pub struct Events(Option<mpsc::Sender<Happening>>);

impl Events {
    /// Records events at an API server, on behalf of the proxy of a node. To be called where tasks can run.
    #[must_use]
    pub fn start(address: Address, requests: Requests, node: &str) -> Self {
        let (sender, receiver) = mpsc::channel(ROOM);
        tokio::spawn(record(address, requests, node.to_owned(), receiver));
        Self(Some(sender))
    }

    /// Records an event, soon.
    pub fn record(&self, happening: Happening) {
        if let Some(sender) = &self.0 {
            // If there is no room, trouble is so common that one event more helps nobody.
            let _ = sender.try_send(happening);
        }
    }
}

async fn record(address: Address, requests: Requests, node: String, mut happenings: mpsc::Receiver<Happening>) {
    let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(format!("{CONTROLLER}-{node}")) };
    let mut recorder = None;
    let mut recorded: HashMap<Happening, Instant> = HashMap::new();
    while let Some(happening) = happenings.recv().await {
        recorded.retain(|_, at| at.elapsed() < REPEAT);
        if recorded.contains_key(&happening) {
            continue;
        }
        let result: anyhow::Result<()> = async {
            if recorder.is_none() {
                let (client, _) = address.client(&requests, || ()).await?;
                recorder = Some(Recorder::new(client, reporter.clone()));
            }
            if let Some(recorder) = &recorder {
                recorder.publish(&event(&happening), &regarding(&happening, &node)).await?;
            }
            Ok(())
        }
        .await;
        match result {
            Ok(()) => drop(recorded.insert(happening, Instant::now())),
            // The credentials may be old ones.
            Err(error) => {
                recorder = None;
                debug!(error = format!("{error:#}"), reason = happening.reason, "an event is not recorded");
            }
        }
    }
}

fn event(happening: &Happening) -> Event {
    Event {
        type_: if happening.warning { EventType::Warning } else { EventType::Normal },
        reason: happening.reason.to_owned(),
        note: Some(happening.note.clone()),
        action: happening.action.to_owned(),
        secondary: None,
    }
}

fn regarding(happening: &Happening, node: &str) -> ObjectReference {
    let (kind, name, namespace) = match &happening.service {
        Some(service) => ("Service", service.name().to_owned(), Some(service.namespace().to_owned())),
        None => ("Node", node.to_owned(), None),
    };
    let version = Some("v1".to_owned());
    ObjectReference {
        api_version: version,
        kind: Some(kind.to_owned()),
        name: Some(name),
        namespace,
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Bytes, http::Uri};
    use serde_json::Value;
    use tokio::net::TcpListener;

    use super::*;

    /// An API server that creates everything, and tells where and what.
    async fn server() -> (Address, mpsc::UnboundedReceiver<(String, Value)>) {
        let (sender, created) = mpsc::unbounded_channel();
        let router = Router::new().fallback(async move |uri: Uri, body: Bytes| {
            let object = serde_json::from_slice(&body).unwrap_or_default();
            sender.send((uri.path().to_owned(), object)).unwrap();
            body
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let master = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (Address { kubeconfig: None, master: Some(master) }, created)
    }

    fn happening(service: Option<&str>, note: &str) -> Happening {
        Happening {
            service: service.map(|name| ObjectName::new("ns", name)),
            warning: service.is_some(),
            reason: "Reason",
            action: "Action",
            note: note.to_owned(),
        }
    }

    #[tokio::test]
    async fn an_event_says_what_kube_proxys_would() {
        let (address, mut created) = server().await;
        let events = Events::start(address, Requests::new().unwrap(), "n");
        events.record(happening(Some("a"), "what"));
        events.record(happening(None, ""));
        let (path, event) = created.recv().await.unwrap();
        assert_eq!(path, "/apis/events.k8s.io/v1/namespaces/ns/events");
        for (pointer, expected) in [
            ("/type", "Warning"),
            ("/reason", "Reason"),
            ("/action", "Action"),
            ("/note", "what"),
            ("/reportingController", "kube-proxy"),
            ("/reportingInstance", "kube-proxy-n"),
            ("/regarding/kind", "Service"),
            ("/regarding/namespace", "ns"),
            ("/regarding/name", "a"),
        ] {
            assert_eq!(event.pointer(pointer).unwrap(), expected, "{pointer}");
        }
        let (path, event) = created.recv().await.unwrap();
        assert_eq!(path, "/apis/events.k8s.io/v1/namespaces/default/events");
        assert_eq!((event["type"].as_str(), event["regarding"]["name"].as_str()), (Some("Normal"), Some("n")));
    }

    #[tokio::test]
    async fn the_same_event_is_not_recorded_again_and_again() {
        let (address, mut created) = server().await;
        let events = Events::start(address, Requests::new().unwrap(), "n");
        for _ in 0..10 {
            events.record(happening(Some("a"), "what"));
        }
        events.record(happening(Some("b"), "what"));
        assert_eq!(created.recv().await.unwrap().1["regarding"]["name"], "a");
        assert_eq!(created.recv().await.unwrap().1["regarding"]["name"], "b");
    }
}
