//! What happens to the cluster. In: a seed. Out: one thing after another, and in the end everything that was stopped runs again.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use serde_json::{Value, json};

use super::{PODS, SETTLED, World};
use crate::cluster::{TARGET, load_balancer};
use crate::control_plane::Api;
use crate::lab::Pod;
use crate::manifest::{PodObject, Service, SliceEndpoint, endpoint_slice};

/// The labels that pods which come and go have, and Services select.
pub const APPS: [&str; 3] = ["red", "green", "blue"];

/// Services that come and go: by this number and the next ones.
const FIRST: u16 = 20;
const SERVICES: u16 = 6;

/// A Service without selector, whose slices are written by hand.
const BY_HAND: &str = "by-hand";

/// Between two things that happen.
const PAUSE: Duration = Duration::from_millis(150);

const NAMESPACE: &str = "/api/v1/namespaces/default";

/// Whether the pod is an endpoint of `web` from the beginning to the end.
pub fn lasts(pod: &Pod) -> bool {
    pod.name.ends_with("-1")
}

/// Things that happen.
pub struct Events {
    rng: Rng,
    counts: BTreeMap<&'static str, u32>,
    /// What happened when.
    history: Vec<(Instant, String)>,
    /// Services of [`FIRST`] and on that are there.
    there: BTreeMap<u16, bool>,
    /// Until when agents are down, by index.
    down: Vec<(usize, Instant)>,
    /// Until when the API server is down.
    away: Option<Instant>,
}

impl Events {
    /// The same for the same seed.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            counts: BTreeMap::new(),
            history: Vec::new(),
            there: BTreeMap::new(),
            down: Vec::new(),
            away: None,
        }
    }

    /// How often what happened.
    pub fn counts(&self) -> Vec<(&'static str, u32)> {
        self.counts.iter().map(|(what, count)| (*what, *count)).collect()
    }

    /// The same, for people.
    pub fn told(&self) -> String {
        let parts: Vec<String> = self.counts.iter().map(|(what, count)| format!("{count} × {what}")).collect();
        parts.join(", ")
    }

    fn note(&mut self, what: String) {
        self.history.push((Instant::now(), what));
    }

    /// What happened in the seconds before this moment, and in the one after it.
    pub fn around(&self, moment: Instant) -> String {
        let mut text = String::new();
        for (at, what) in &self.history {
            let (before, after) = (moment.saturating_duration_since(*at), at.saturating_duration_since(moment));
            if before < Duration::from_secs(3) && after < Duration::from_secs(1) {
                let milliseconds = before.as_millis() as i64 - after.as_millis() as i64;
                let _ = write!(text, "\n    {milliseconds} ms before: {what}");
            }
        }
        text
    }

    /// Lets the next thing happen.
    pub fn next(&mut self, world: &mut World) -> Result<()> {
        thread::sleep(PAUSE);
        self.bring_back(world, Instant::now())?;
        let roll = self.rng.u32(0..100);
        // Nobody can tell an API server that is away that an object changes.
        let what = match roll {
            0..3 => self.end_agent(world),
            3..5 => self.remake_device(world)?,
            5..6 if self.away.is_none() => {
                world.plane.kill_api_server();
                self.away = Some(Instant::now() + Duration::from_millis(self.rng.u64(0..4000)));
                "the API server killed"
            }
            _ if self.away.is_some() => return Ok(()),
            6..8 => {
                world.plane.compact();
                "history forgotten"
            }
            8..40 => self.change_service(&world.plane.api()),
            40..80 => self.change_pod(world),
            _ => self.change_slices(world),
        };
        *self.counts.entry(what).or_default() += 1;
        self.note(what.to_owned());
        Ok(())
    }

    /// Brings everything back, and waits until it is there.
    pub fn calm(&mut self, world: &mut World) -> Result<()> {
        self.bring_back(world, Instant::now() + Duration::from_secs(60))?;
        world.agents.iter_mut().try_for_each(|agent| agent.wait_ready(SETTLED))
    }

    fn bring_back(&mut self, world: &mut World, now: Instant) -> Result<()> {
        if self.away.is_some_and(|until| until <= now) {
            world.plane.start_api_server().context("starting the API server again")?;
            self.away = None;
            self.note("the API server started again".to_owned());
        }
        let back: Vec<_> = self.down.extract_if(.., |(_, until)| *until <= now).collect();
        for (index, _) in back {
            world.agents[index].spawn().with_context(|| format!("starting agent {index} again"))?;
            self.note(format!("agent {} started again", index + 1));
        }
        Ok(())
    }

    fn end_agent(&mut self, world: &mut World) -> &'static str {
        let index = self.rng.usize(0..world.agents.len());
        if self.down.iter().any(|(down, _)| *down == index) {
            return "an agent left alone";
        }
        let what = if self.rng.bool() {
            world.agents[index].kill();
            "an agent killed"
        } else {
            world.agents[index].terminate();
            "an agent ended"
        };
        self.note(format!("agent {} is gone", index + 1));
        self.down.push((index, Instant::now() + Duration::from_millis(self.rng.u64(0..3000))));
        what
    }

    fn remake_device(&mut self, world: &World) -> Result<&'static str> {
        let node = self.rng.u8(1..=2);
        world.lab.rewire(world.lab.pod(node, PODS))?;
        Ok("a device made anew")
    }

    fn change_service(&mut self, api: &Api) -> &'static str {
        let number = FIRST + self.rng.u16(0..SERVICES);
        let name = name(number);
        if self.there.get(&number).copied().unwrap_or_default() {
            if self.rng.bool() {
                self.there.insert(number, false);
                api.delete(&format!("{NAMESPACE}/services/{name}"));
                return "a Service deleted";
            }
            let spec = match self.rng.u8(0..3) {
                0 => json!({"selector": {"app": self.app()}}),
                1 => json!({"internalTrafficPolicy": if self.rng.bool() { "Local" } else { "Cluster" }}),
                _ => json!({"publishNotReadyAddresses": self.rng.bool()}),
            };
            api.patch(&format!("{NAMESPACE}/services/{name}"), &json!({"spec": spec}));
            return "a Service changed";
        }
        let mut service = Service::new(&name).selector("app", self.app()).dual_stack(number);
        if self.rng.bool() {
            service = service.node_port("tcp", "TCP", 80, TARGET, 30_000 + number).node_port(
                "udp",
                "UDP",
                80,
                TARGET,
                30_000 + number,
            );
            if self.rng.bool() {
                service = service.spec("externalTrafficPolicy", "Local");
            }
            if self.rng.bool() {
                service = service.load_balancer(&load_balancer(number));
            }
        } else {
            service = service.port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET);
        }
        api.put(service);
        self.there.insert(number, true);
        "a Service created"
    }

    fn change_pod(&mut self, world: &World) -> &'static str {
        let pod = world.lab.pod(self.rng.u8(1..=2), self.rng.u8(2..=PODS));
        let (api, path) = (world.plane.api(), format!("{NAMESPACE}/pods/{}", pod.name));
        match self.rng.u8(0..4) {
            0 | 1 => {
                api.patch(&path, &json!({"metadata": {"labels": {"app": self.app()}}}));
                "a Pod's label changed"
            }
            2 => {
                let ready = if self.rng.bool() { "True" } else { "False" };
                let status = json!({"status": {"conditions": [{"type": "Ready", "status": ready}]}});
                api.patch(&format!("{path}/status"), &status);
                "a Pod's readiness changed"
            }
            _ => {
                api.delete(&path);
                api.put(PodObject::of(pod).label("app", self.app()).ready(self.rng.bool()));
                "a Pod made anew"
            }
        }
    }

    fn change_slices(&mut self, world: &World) -> &'static str {
        let api = world.plane.api();
        if !self.counts.contains_key("a slice written") {
            api.put(Service::new(BY_HAND).dual_stack(FIRST + SERVICES).port("tcp", "TCP", 80, TARGET));
        }
        let v6 = self.rng.bool();
        let mut endpoints = Vec::new();
        for pod in world.lab.pods() {
            if self.rng.bool() {
                endpoints.push(SliceEndpoint {
                    address: if v6 { pod.v6.into() } else { pod.v4.into() },
                    node: pod.node.clone(),
                    serving: self.rng.bool(),
                    terminating: self.rng.bool(),
                });
            }
        }
        // An empty slice is of IPv4.
        let family = if v6 && !endpoints.is_empty() { "v6" } else { "v4" };
        let slice = endpoint_slice(&format!("{BY_HAND}-{family}"), BY_HAND, &[("tcp", "TCP", TARGET)], &endpoints);
        api.put(slice);
        "a slice written"
    }

    fn app(&mut self) -> &'static str {
        APPS[self.rng.usize(0..APPS.len())]
    }
}

fn name(number: u16) -> String {
    format!("chaos-{number}")
}

/// Deletes the Services that came and went.
pub fn remove_all(api: &Api) {
    let services = api.get(&format!("{NAMESPACE}/services")).unwrap_or_default();
    let names = services["items"].as_array().into_iter().flatten().filter_map(|it| it["metadata"]["name"].as_str());
    for name in names.filter(|name| name.starts_with("chaos-") || *name == BY_HAND) {
        api.delete(&format!("{NAMESPACE}/services/{name}"));
    }
    for family in ["v4", "v6"] {
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/{BY_HAND}-{family}");
        if api.get(&path).is_ok_and(|slice: Value| !slice.is_null()) {
            api.delete(&path);
        }
    }
}
