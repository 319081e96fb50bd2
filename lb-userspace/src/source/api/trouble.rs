//! What keeps a watch from working, in words that help.
//!
//! In: errors of kube's watcher. Out: a [`Problem`], or what the watch should do about it without a word.

use kube::{Error, runtime::watcher};

use super::ask::Ask;
use crate::source::Problem;

/// What to do after an error.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// A watch that ended: the next one goes on where it ended, and nobody needs to know.
    Resume,
    /// The place to go on from is not known to the server any more: list again.
    Relist,
    /// The server doesn't take the request as it is: ask for less, if there is less.
    Simplify(Problem),
    /// Credentials have to be read again.
    Reconnect(Problem),
    /// Only time or a person helps.
    Wait(Problem),
}

impl Remedy {
    /// What to do about an error of the watch that asked so, at the API server of this address.
    pub(super) fn new(error: &watcher::Error, ask: &Ask, server: &str) -> Self {
        match error {
            watcher::Error::InitialListFailed(error) => Self::refused(error, "list", ask, server),
            watcher::Error::WatchStartFailed(error) => Self::refused(error, "watch", ask, server),
            watcher::Error::WatchError(_) | watcher::Error::WatchFailed(_) => Self::Resume,
            watcher::Error::NoResourceVersion => Self::Wait(of(
                ask,
                "the API server sends objects without metadata.resourceVersion; check what answers at its address",
            )),
        }
    }

    fn refused(error: &Error, verb: &str, ask: &Ask, server: &str) -> Self {
        let Error::Api(status) = error else {
            // Of a chain of errors the last says what happened: "Connection refused", "certificate has expired".
            let mut cause: &dyn std::error::Error = error;
            while let Some(deeper) = cause.source() {
                cause = deeper;
            }
            let message =
                format!("the API server at {server} can't be reached: {cause}; until it can, nothing changes");
            return Self::Wait(Problem { message, ..Problem::default() });
        };
        let said = if status.message.is_empty() { &status.reason } else { &status.message };
        let resource = ask.resource();
        match status.code {
            401 => {
                let remedy = "check user and token in the kubeconfig, or the service account";
                let message = format!("the API server at {server} doesn't accept our credentials: {said}; {remedy}");
                Self::Reconnect(Problem { message, ..Problem::default() })
            }
            403 => {
                let loss = without(ask);
                let remedy = format!("grant verbs `list` and `watch` on {resource} (missing: {verb}){loss}");
                Self::Wait(of(ask, &format!("{said}; {remedy}")))
            }
            404 => {
                let loss = without(ask);
                Self::Wait(of(ask, &format!("the API server at {server} doesn't know {resource}{loss}")))
            }
            410 => Self::Relist,
            // After etcd was restored from a backup, all versions that we know lie in its future.
            504 if said.contains("Too large resource version") => Self::Relist,
            400 | 405 | 415 | 422 => Self::Simplify(of(ask, &format!("{verb} of {resource} refused: {said}"))),
            code => Self::Wait(of(ask, &format!("{verb} of {resource} failed with status {code}: {said}"))),
        }
    }
}

fn without(ask: &Ask) -> &'static str {
    if ask.needed { "" } else { "; everything else works without" }
}

pub(super) fn of(ask: &Ask, message: &str) -> Problem {
    Problem { object: Some(format!("{}s", ask.kind)), message: message.to_owned(), ..Problem::default() }
}
