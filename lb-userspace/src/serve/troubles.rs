//! What is wrong with the servers, as an event of kube-proxy's would say it.
//!
//! In: failures by what they are about. Out: a log line and an event when one is new, a list of those that last.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::{info, warn};

use crate::{
    events::{Events, Happening},
    model::ObjectName,
};

/// A failure in the words of kube-proxy's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// `reason` of the event, such as `FailedToStartServiceHealthcheck`.
    pub reason: &'static str,
    /// `action` of the event.
    pub action: &'static str,
    /// The Service that it is about; none: the Node.
    pub service: Option<ObjectName>,
    /// What is wrong and what happens now.
    pub message: String,
}

impl Trouble {
    /// What the node starts with.
    #[must_use]
    pub const fn of_node(reason: &'static str, message: String) -> Self {
        Self { reason, action: "StartKubeProxy", service: None, message }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(service) = &self.service {
            write!(f, "Service {service}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// The failures that last, by what they are about.
#[derive(Clone, Debug, Default)]
pub struct Troubles {
    lasting: Arc<Mutex<BTreeMap<String, Trouble>>>,
    events: Events,
}

impl Troubles {
    /// None yet; new ones are recorded there.
    #[must_use]
    pub fn new(events: Events) -> Self {
        Self { lasting: Arc::default(), events }
    }

    /// Notes a failure. The same one again is no news.
    pub fn report(&self, subject: &str, trouble: Trouble) {
        let mut all = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(subject) != Some(&trouble) {
            warn!(reason = trouble.reason, "{trouble}");
            self.events.record(Happening {
                service: trouble.service.clone(),
                warning: true,
                reason: trouble.reason,
                action: trouble.action,
                note: trouble.message.clone(),
            });
            all.insert(subject.to_owned(), trouble);
        }
    }

    /// Notes that it is over, if it was there.
    pub fn resolve(&self, subject: &str) {
        if self.lasting.lock().unwrap_or_else(PoisonError::into_inner).remove(subject).is_some() {
            info!(subject, "works again");
        }
    }

    /// All that last.
    #[must_use]
    pub fn list(&self) -> Vec<Trouble> {
        self.lasting.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
