//! Whether this node is well: `/healthz` and `/livez` (`kube-proxy.md` §8).
//!
//! In: what was asked of the tables and when it was done, per family; whether the Node may get new connections. Out: bodies
//! and codes. A family is unhealthy if something that was accepted has not been done in time; one that nothing was asked of is
//! well, whatever its age.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Response, StatusCode},
    routing::any,
};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    answer::{JSON, answer, not_found},
    metrics::Metrics,
};

/// An IP family, each of which has its own proxier in kube-proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The API's word, which is also the value of the label `ip_family`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// A point in time on both clocks: one to count with, one to show.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// To count with.
    pub counted: Instant,
    /// To show.
    pub shown: SystemTime,
}

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        Self { counted: Instant::now(), shown: SystemTime::now() }
    }

    /// RFC 3339 with as many digits as it takes, as Go writes a time in UTC.
    fn text(self) -> String {
        Timestamp::try_from(self.shown).unwrap_or_default().to_string()
    }
}

/// What is known of one family.
#[derive(Clone, Copy, Debug)]
struct Progress {
    updated: Moment,
    /// Since when something has been waiting.
    queued: Option<Moment>,
}

#[derive(Debug)]
struct Known {
    families: BTreeMap<Family, Progress>,
    /// Since when something has been waiting whose families are not known yet.
    taken: Option<Moment>,
}

/// What the agent writes down and the servers read.
#[derive(Debug)]
pub struct Health {
    timeout: Duration,
    known: Mutex<Known>,
    eligible: AtomicBool,
}

/// The body of `/healthz` and `/livez`, in kube-proxy's order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Said {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<&'static str, FamilyBody>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyBody {
    last_updated: String,
    healthy: bool,
}

impl Health {
    /// Nothing has been asked for yet, and nothing can be served; what isn't done after `timeout` is late.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        let updated = Moment::now();
        let families = Family::ALL.map(|family| (family, Progress { updated, queued: None })).into();
        let known = Mutex::new(Known { families, taken: None });
        Self { timeout, known, eligible: AtomicBool::new(false) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change was accepted that may lead to writes.
    pub fn taken(&self, now: Moment) {
        self.known().taken.get_or_insert(now);
    }

    /// What was accepted is planned: these families have to be written.
    pub fn queued(&self, families: &[Family], now: Moment) {
        let mut known = self.known();
        let since = known.taken.take().unwrap_or(now);
        for family in families {
            if let Some(progress) = known.families.get_mut(family) {
                progress.queued.get_or_insert(since);
            }
        }
    }

    /// Everything that was asked of these families is in the tables.
    pub fn updated(&self, families: &[Family], now: Moment) {
        let mut known = self.known();
        for family in families {
            known.families.insert(*family, Progress { updated: now, queued: None });
        }
    }

    /// Whether load balancers may send new connections here.
    pub fn set_eligible(&self, eligible: bool) {
        self.eligible.store(eligible, Ordering::Relaxed);
    }

    /// Whether nothing is late.
    #[must_use]
    pub fn is_healthy(&self, now: Moment) -> bool {
        let known = self.known();
        known.families.values().all(|progress| self.is_in_time(progress, known.taken, now))
    }

    fn is_in_time(&self, progress: &Progress, taken: Option<Moment>, now: Moment) -> bool {
        let late = |since: Moment| now.counted.saturating_duration_since(since.counted) >= self.timeout;
        !progress.queued.is_some_and(late) && !taken.is_some_and(late)
    }

    /// Code and body of `/livez`, or of `/healthz`, which knows the Node.
    fn say(&self, of_node: bool, now: Moment) -> (bool, String) {
        let known = self.known();
        let status: BTreeMap<_, _> = known
            .families
            .iter()
            .map(|(family, progress)| {
                let healthy = self.is_in_time(progress, known.taken, now);
                (family.as_str(), FamilyBody { last_updated: progress.updated.text(), healthy })
            })
            .collect();
        let last = known.families.values().map(|progress| progress.updated).max_by_key(|updated| updated.counted);
        drop(known);
        let healthy = status.values().all(|family| family.healthy);
        let eligible = of_node.then(|| self.eligible.load(Ordering::Relaxed));
        let good = healthy && eligible != Some(false);
        let body = Said {
            // kube-proxy's word for "recently, if all is well".
            last_updated: if good { now } else { last.unwrap_or(now) }.text(),
            current_time: now.text(),
            node_eligible: eligible,
            healthy,
            status,
        };
        (good, serde_json::to_string(&body).unwrap_or_default())
    }
}

/// What both pages need.
type Shared = State<(Arc<Health>, Arc<Metrics>)>;

/// `/healthz` and `/livez`, for any method.
pub fn router(health: Arc<Health>, metrics: Arc<Metrics>) -> Router {
    async fn healthz(State((health, metrics)): Shared) -> Response<Body> {
        respond(&health, &metrics, true)
    }
    async fn livez(State((health, metrics)): Shared) -> Response<Body> {
        respond(&health, &metrics, false)
    }
    let router = Router::new().route("/healthz", any(healthz)).route("/livez", any(livez)).fallback(not_found);
    router.with_state((health, metrics))
}

fn respond(health: &Health, metrics: &Metrics, of_node: bool) -> Response<Body> {
    let (good, body) = health.say(of_node, Moment::now());
    metrics.probed(of_node, good);
    answer(if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, JSON, body)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn after(start: Moment, seconds: u64) -> Moment {
        let later = Duration::from_secs(seconds);
        Moment { counted: start.counted + later, shown: start.shown + later }
    }

    fn families(health: &Health, now: Moment) -> [bool; 2] {
        let body: Value = serde_json::from_str(&health.say(false, now).1).unwrap();
        ["IPv4", "IPv6"].map(|family| body["status"][family]["healthy"].as_bool().unwrap())
    }

    /// Of a node that serves.
    fn eligible() -> Health {
        let health = Health::new(TIMEOUT);
        health.set_eligible(true);
        health
    }

    #[test]
    fn a_node_that_serves_nothing_yet_gets_no_new_connections_and_is_alive() {
        let (health, now) = (Health::new(TIMEOUT), Moment::now());
        assert_eq!([true, false].map(|of_node| health.say(of_node, now).0), [false, true]);
    }

    #[test]
    fn a_family_is_late_only_while_something_of_it_waits() {
        let (health, start) = (eligible(), Moment::now());
        let at = |seconds| after(start, seconds);
        assert_eq!(families(&health, at(100_000)), [true, true], "nothing was asked for");
        health.taken(at(0));
        health.queued(&[Family::V4], at(1));
        health.queued(&[Family::V4], at(50));
        assert_eq!(families(&health, at(59)), [true, true]);
        assert_eq!(families(&health, at(60)), [false, true], "since it was taken, not since the last");
        assert!(!health.is_healthy(at(60)));
        health.updated(&[Family::V6], at(61));
        assert_eq!(families(&health, at(62)), [false, true]);
        health.updated(&[Family::V4], at(63));
        assert_eq!(families(&health, at(1_000)), [true, true]);
    }

    #[test]
    fn what_was_taken_and_never_planned_is_late_in_every_family() {
        let (health, start) = (eligible(), Moment::now());
        health.taken(start);
        health.taken(after(start, 30));
        assert_eq!(families(&health, after(start, 60)), [false, false]);
        health.queued(&[], after(start, 61));
        assert_eq!(families(&health, after(start, 100)), [true, true], "it changed nothing");
    }

    #[test]
    fn bodies_say_when_the_last_write_was_done_and_livez_knows_no_node() {
        let (health, start) = (eligible(), Moment::now());
        health.updated(&Family::ALL, start);
        health.queued(&[Family::V4], after(start, 10));
        health.updated(&[Family::V6], after(start, 20));
        let now = after(start, 90);
        let (good, text) = health.say(true, now);
        let status = |v4: bool| {
            format!(
                r#""status":{{"IPv4":{{"lastUpdated":"{}","healthy":{v4}}},"IPv6":{{"lastUpdated":"{}","healthy":true}}}}"#,
                start.text(),
                after(start, 20).text()
            )
        };
        let (last, now_text) = (after(start, 20).text(), now.text());
        assert!(!good);
        assert_eq!(
            text,
            format!(
                r#"{{"lastUpdated":"{last}","currentTime":"{now_text}","nodeEligible":true,"healthy":false,{}}}"#,
                status(false)
            )
        );
        health.set_eligible(false);
        assert!(!health.say(true, after(start, 30)).0, "a Node that goes gets no new connections");
        assert!(health.say(false, after(start, 30)).0, "and is alive");
        let now = after(start, 30);
        let text = now.text();
        let want = format!(r#"{{"lastUpdated":"{text}","currentTime":"{text}","healthy":true,{}}}"#, status(true));
        assert_eq!(health.say(false, now).1, want);
    }
}
