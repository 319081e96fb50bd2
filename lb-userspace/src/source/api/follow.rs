//! One watch, kept alive.
//!
//! In: what to ask, and where. Out: signals. Tries again for ever, ever more slowly, each node at its own moment. Never here:
//! what an object says.

use std::time::Duration;

use futures::{StreamExt as _, stream::BoxStream};
use kube::{
    Api, Client,
    runtime::watcher::{self, DefaultBackoff, Event, watcher},
};
use tokio::{sync::mpsc::Sender, time::timeout};
use tracing::debug;

use super::{
    Address, Requests,
    ask::Ask,
    raw::Raw,
    trouble::{self, Remedy},
};
use crate::{model::Kind, source::Problem};

/// A list from which nothing comes for so long is asked for again.
const LIST_PATIENCE: Duration = Duration::from_secs(60);

/// What a watch tells.
#[derive(Debug)]
pub(super) enum Signal {
    /// An event.
    Event(Kind, Box<Event<Raw>>),
    /// The API server answers; if there was trouble, it is over.
    Answered(Kind),
    /// What keeps the watch from going on.
    Trouble(Kind, Problem),
}

type Events = BoxStream<'static, watcher::Result<Event<Raw>>>;

/// Watches a kind until nobody listens any more.
pub(super) async fn follow(address: Address, requests: Requests, mut ask: Ask, signals: Sender<Signal>) {
    let kind = ask.kind;
    let mut backoff = DefaultBackoff::default();
    let mut client = None;
    let mut events = None;
    while !signals.is_closed() {
        if client.is_none() {
            match connect(&address, &requests, kind, &signals).await {
                Ok(connected) => client = Some(connected),
                Err(problem) => {
                    let _ = signals.send(Signal::Trouble(kind, problem)).await;
                    pause(&mut backoff).await;
                    continue;
                }
            }
        }
        let Some((connected, server)) = client.clone() else { continue };
        let (mut stream, listed) = events.take().unwrap_or_else(|| (watch(connected, &ask), false));
        let outcome = next(&mut stream, listed).await;
        let Some(outcome) = outcome else {
            debug!(%kind, "the list stalls; asking again");
            ask.ask_for_pages();
            let _ = signals.send(Signal::Trouble(kind, stalled(&ask, &server))).await;
            pause(&mut backoff).await;
            continue;
        };
        let error = match outcome {
            Ok(event) => {
                let listed = match event {
                    Event::Init => false,
                    Event::InitDone => true,
                    Event::InitApply(_) | Event::Apply(_) | Event::Delete(_) => listed,
                };
                let _ = signals.send(Signal::Event(kind, Box::new(event))).await;
                events = Some((stream, listed));
                continue;
            }
            Err(error) => error,
        };
        debug!(%kind, %error, "watch");
        let problem = match Remedy::new(&error, &ask, &server) {
            Remedy::Relist => None,
            Remedy::Simplify(_) if ask.simplify() => continue,
            Remedy::Simplify(problem) => Some(problem),
            Remedy::Reconnect(problem) => {
                client = None;
                Some(problem)
            }
            Remedy::Resume => {
                events = Some((stream, listed));
                None
            }
            Remedy::Wait(problem) => {
                events = Some((stream, listed));
                Some(problem)
            }
        };
        if let Some(problem) = problem {
            let _ = signals.send(Signal::Trouble(kind, problem)).await;
        }
        pause(&mut backoff).await;
    }
}

/// The next event. Once everything is listed, silence is normal, and kube's watcher sees to it that a dead watch ends; before
/// that, silence is nothing.
async fn next(stream: &mut Events, listed: bool) -> Option<watcher::Result<Event<Raw>>> {
    let next = stream.next();
    if listed { next.await } else { timeout(LIST_PATIENCE, next).await.ok().flatten() }
}

fn stalled(ask: &Ask, server: &str) -> Problem {
    let seconds = LIST_PATIENCE.as_secs();
    let message = format!(
        "the API server at {server} sends nothing for {seconds} s; it is asked again; look at it and at what is between"
    );
    trouble::of(ask, &message)
}

fn watch(client: Client, ask: &Ask) -> Events {
    watcher(Api::<Raw>::all_with(client, &ask.kind), ask.config()).boxed()
}

async fn connect(
    address: &Address,
    requests: &Requests,
    kind: Kind,
    signals: &Sender<Signal>,
) -> Result<(Client, String), Problem> {
    let signals = signals.clone();
    // If there is no room, events wait, which say as much.
    let answered = move || drop(signals.try_send(Signal::Answered(kind)));
    address
        .client(requests, answered)
        .await
        .map_err(|error| Problem { message: format!("{error:#}; correct the kubeconfig"), ..Problem::default() })
}

async fn pause(backoff: &mut DefaultBackoff) {
    let delay = backoff.next().unwrap_or(LIST_PATIENCE);
    tokio::time::sleep(delay).await;
}
