//! Several Services that claim one frontend: the oldest has it, and the next takes over when it goes.
//!
//! In: the plan of one Service, or its absence. Out: the plans of the ports whose frontends changed, which is work
//! proportional to that Service and to those it contends with.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use lb_common::{addr::Addr, layout::FrontendKey};

use super::{PlannedFrontend, PortName, PortPlan, Problem, ServicePlan};
use crate::model::{ObjectName, object::Protocol};

/// Age and name of a port: the smallest claim of a frontend wins. Objects without a time (manifests) count as oldest.
type Claim = (Option<Arc<str>>, PortName);

/// A sorted set that nearly always has one element, of which there is one for every frontend: a tree would be ten times as
/// large.
#[derive(Debug)]
struct Few<T>(Vec<T>);

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(Vec::with_capacity(1))
    }
}

impl<T: Ord> Few<T> {
    fn first(&self) -> Option<&T> {
        self.0.first()
    }

    fn insert(&mut self, element: T) {
        if let Err(place) = self.0.binary_search(&element) {
            self.0.insert(place, element);
        }
    }

    fn remove(&mut self, element: &T) {
        if let Ok(place) = self.0.binary_search(element) {
            self.0.remove(place);
        }
    }
}

/// The Services' plans, with each frontend given to one of them.
#[derive(Debug, Default)]
pub struct Planner {
    services: BTreeMap<ObjectName, Entry>,
    ports: BTreeMap<PortName, Arc<PortPlan>>,
    claims: BTreeMap<FrontendKey, Few<Claim>>,
    any_port: BTreeMap<Addr, Few<ObjectName>>,
}

#[derive(Debug)]
struct Entry {
    age: Option<Arc<str>>,
    ports: Vec<PortName>,
    any_port: Vec<Addr>,
}

/// What a change to one Service changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Ports with what they do now; nothing for those that are gone.
    pub ports: BTreeMap<PortName, Option<Arc<PortPlan>>>,
    /// ClusterIPs, and whether their other ports are refused now.
    pub any_port: BTreeMap<Addr, bool>,
}

impl Step {
    /// Adds what a later step changes.
    pub fn merge(&mut self, later: Self) {
        self.ports.extend(later.ports);
        self.any_port.extend(later.any_port);
    }
}

/// A frontend that a port claims and another has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The frontend.
    pub key: FrontendKey,
    /// Who has it.
    pub winner: PortName,
    /// Who claims it in vain.
    pub loser: PortName,
}

impl Conflict {
    /// The conflict as a problem of the one who lost.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let Self { key, winner, loser } = self;
        let protocol = Protocol::from_number(key.proto).unwrap_or_default();
        let port = key.port.number();
        let (what, field) = if key.addr.same(&key.addr.unspecified()) {
            (format!("nodePort {port}/{protocol}"), "spec.ports")
        } else {
            (format!("{}/{protocol}", SocketAddr::new(key.addr.into(), port)), "spec")
        };
        Problem {
            object: format!("Service {}", loser.service),
            field: field.to_owned(),
            message: format!("{what} belongs to Service {}, which is older", winner.service),
            remedy: "give one of them another address or port".to_owned(),
        }
    }
}

impl Planner {
    /// Takes the new plan of a Service, or its absence. `age` is its creation time.
    pub fn update(&mut self, service: &ObjectName, plan: Option<ServicePlan>, age: Option<&str>) -> Step {
        let mut touched: BTreeSet<PortName> = BTreeSet::new();
        let mut addrs: BTreeSet<Addr> = BTreeSet::new();
        let before = self.services.remove(service);
        let had: BTreeSet<Addr> = before.iter().flat_map(|entry| entry.any_port.iter().copied()).collect();
        for name in before.iter().flat_map(|entry| &entry.ports) {
            let age = before.as_ref().and_then(|entry| entry.age.clone());
            if let Some(port) = self.ports.remove(name) {
                self.withdraw(&(age, name.clone()), &port, &mut touched);
            }
            touched.insert(name.clone());
        }
        for addr in &had {
            if let Some(claimants) = self.any_port.get_mut(addr) {
                claimants.remove(service);
            }
            addrs.insert(*addr);
        }
        if let Some(ServicePlan { ports, any_port, .. }) = plan {
            let age: Option<Arc<str>> = age.map(Into::into);
            let mut names = Vec::new();
            for port in ports {
                // A second port of this name and protocol, which the API server doesn't allow.
                if self.ports.contains_key(&port.name) {
                    continue;
                }
                self.claim(&(age.clone(), port.name.clone()), &port, &mut touched);
                names.push(port.name.clone());
                touched.insert(port.name.clone());
                self.ports.insert(port.name.clone(), Arc::new(port));
            }
            for addr in &any_port {
                self.any_port.entry(*addr).or_default().insert(service.clone());
                addrs.insert(*addr);
            }
            self.services.insert(service.clone(), Entry { age, ports: names, any_port });
        }
        self.step(touched, addrs)
    }

    /// What a port does now.
    #[must_use]
    pub fn port(&self, name: &PortName) -> Option<Arc<PortPlan>> {
        let mut port = self.ports.get(name)?.clone();
        let won = |frontend: &PlannedFrontend| {
            self.claims.get(&frontend.key).and_then(Few::first).is_some_and(|(_, winner)| winner == name)
        };
        if !port.frontends.iter().all(won) {
            Arc::make_mut(&mut port).frontends.retain(won);
        }
        Some(port)
    }

    /// Every port there is.
    pub fn ports(&self) -> impl Iterator<Item = &PortName> {
        self.ports.keys()
    }

    /// Every address of which other ports are refused.
    pub fn any_port(&self) -> impl Iterator<Item = &Addr> {
        self.any_port.keys()
    }

    /// The frontends that ports of a Service claim, but others have.
    #[must_use]
    pub fn conflicts_of(&self, service: &ObjectName) -> Vec<Conflict> {
        let ports = self.services.get(service).into_iter().flat_map(|entry| &entry.ports);
        let claims = ports
            .filter_map(|name| self.ports.get(name))
            .flat_map(|port| port.frontends.iter().map(move |frontend| (&port.name, frontend.key)));
        let lost = claims.filter_map(|(loser, key)| {
            let (_, winner) = self.claims.get(&key)?.first()?;
            (winner != loser).then(|| Conflict { key, winner: winner.clone(), loser: loser.clone() })
        });
        lost.collect()
    }

    /// Every frontend that somebody claims in vain. A walk over all, for whoever wants to see the whole.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        self.claims.iter().flat_map(|(key, claims)| {
            let winner = claims.first();
            let lost = claims.0.iter().skip(1);
            lost.zip(winner.into_iter().cycle()).map(|((_, loser), (_, winner))| Conflict {
                key: *key,
                winner: winner.clone(),
                loser: loser.clone(),
            })
        })
    }

    fn claim(&mut self, claim: &Claim, port: &PortPlan, touched: &mut BTreeSet<PortName>) {
        for frontend in &port.frontends {
            let claims = self.claims.entry(frontend.key).or_default();
            let before = claims.first().map(|(_, name)| name.clone());
            claims.insert(claim.clone());
            if claims.first() == Some(claim) {
                touched.extend(before);
            }
        }
    }

    fn withdraw(&mut self, claim: &Claim, port: &PortPlan, touched: &mut BTreeSet<PortName>) {
        for frontend in &port.frontends {
            let Some(claims) = self.claims.get_mut(&frontend.key) else { continue };
            let won = claims.first() == Some(claim);
            claims.remove(claim);
            match claims.first() {
                Some((_, heir)) if won => _ = touched.insert(heir.clone()),
                Some(_) => (),
                None => _ = self.claims.remove(&frontend.key),
            }
        }
    }

    fn step(&mut self, touched: BTreeSet<PortName>, addrs: BTreeSet<Addr>) -> Step {
        for addr in &addrs {
            if self.any_port.get(addr).is_some_and(|claimants| claimants.0.is_empty()) {
                self.any_port.remove(addr);
            }
        }
        let any_port = addrs.into_iter().map(|addr| (addr, self.any_port.contains_key(&addr))).collect();
        let ports = touched.into_iter().map(|name| (name.clone(), self.port(&name))).collect();
        Step { ports, any_port }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{addr::Port, layout::protocol::TCP};

    use proptest::prelude::*;

    use super::*;

    const SHARED: u16 = 80;

    fn plan(name: &str, ports: &[u16]) -> (ObjectName, Option<ServicePlan>) {
        let service = ObjectName::new("ns", name);
        let frontend = |port: &u16| PlannedFrontend {
            key: FrontendKey::new(Addr::UNSPECIFIED_V4, Port::new(*port), TCP),
            internal: [].into(),
            external: [].into(),
            flags: 0,
        };
        let port = PortPlan {
            name: PortName { service: service.clone(), port: "".into(), protocol: Protocol::Tcp },
            endpoints: Vec::new(),
            frontends: ports.iter().map(frontend).collect(),
            source_ranges: BTreeSet::new(),
            affinity: 0,
        };
        let any_port = vec![Addr::UNSPECIFIED_V6];
        (service, Some(ServicePlan { ports: vec![port], any_port, local_ready: 0, health_check: None }))
    }

    /// `service: ports` of a step.
    fn text(step: &Step) -> Vec<String> {
        let entry = |(name, port): (&PortName, &Option<Arc<PortPlan>>)| {
            let ports = port.as_ref().map(|port| {
                port.frontends.iter().map(|frontend| frontend.key.port.number().to_string()).collect::<Vec<_>>()
            });
            format!("{}: {}", name.service.name, ports.map_or("gone".into(), |ports| ports.join(",")))
        };
        step.ports.iter().map(entry).collect()
    }

    #[test]
    fn the_oldest_wins_and_the_next_takes_over() {
        let mut planner = Planner::default();
        let mut update = |name, ports: Option<&[u16]>, age| {
            let (service, plan) = plan(name, ports.unwrap_or_default());
            text(&planner.update(&service, plan.filter(|_| ports.is_some()), Some(age)))
        };
        assert_eq!(update("young", Some(&[SHARED, 81]), "2026"), ["young: 80,81"]);
        assert_eq!(update("other", Some(&[90]), "2020"), ["other: 90"], "who shares nothing touches nobody");
        assert_eq!(update("old", Some(&[SHARED, 82]), "2024"), ["old: 80,82", "young: 81"]);
        assert_eq!(update("bold", Some(&[SHARED]), "2026"), ["bold: "]);
        assert_eq!(update("old", Some(&[82]), "2024"), ["bold: 80", "old: 82"], "of one age, the name decides");
        assert_eq!(update("bold", None, ""), ["bold: gone", "young: 80,81"]);
        assert_eq!(update("bold", None, ""), Vec::<String>::new());
    }

    #[test]
    fn losers_are_named() {
        let mut planner = Planner::default();
        for (name, age) in [("a", "2026"), ("b", "2025")] {
            let (service, plan) = plan(name, &[SHARED]);
            planner.update(&service, plan, Some(age));
        }
        let [conflict] = &planner.conflicts_of(&ObjectName::new("ns", "a"))[..] else { panic!() };
        assert_eq!(
            conflict.problem().to_string(),
            "Service ns/a: spec.ports: nodePort 80/TCP belongs to Service ns/b, which is older; \
             give one of them another address or port"
        );
        assert!(planner.conflicts().eq([conflict.clone()]));
        assert_eq!(planner.conflicts_of(&ObjectName::new("ns", "b")), []);
    }

    proptest! {
        #[test]
        fn steps_add_up_to_what_each_frontend_s_oldest_claim_says(
            changes in prop::collection::vec((0..4_usize, prop::option::of(prop::collection::btree_set(80..86_u16, 0..4))), 1..40)
        ) {
            let (mut planner, mut followed, mut there) = (Planner::default(), Step::default(), BTreeMap::new());
            let names = [("2026", "a"), ("2024", "b"), ("2025", "c"), ("2025", "d")];
            for (which, ports) in changes {
                let (age, name) = names[which];
                let list: Vec<u16> = ports.iter().flatten().copied().collect();
                let (service, plan) = plan(name, &list);
                followed.merge(planner.update(&service, plan.filter(|_| ports.is_some()), Some(age)));
                match ports {
                    Some(ports) => _ = there.insert((age, name), ports),
                    None => _ = there.remove(&(age, name)),
                }
                let mut free: BTreeSet<u16> = (80..86).collect();
                for ((_, name), ports) in &there {
                    let won: BTreeSet<u16> = ports.iter().copied().filter(|port| free.remove(port)).collect();
                    let port = followed.ports.iter().find(|(port, _)| *port.service.name == **name).unwrap().1;
                    let has: BTreeSet<u16> =
                        port.as_ref().unwrap().frontends.iter().map(|frontend| frontend.key.port.number()).collect();
                    prop_assert_eq!(has, won, "{}", name);
                }
                prop_assert_eq!(followed.ports.values().flatten().count(), there.len());
                let refused = followed.any_port.get(&Addr::UNSPECIFIED_V6).copied().unwrap_or_default();
                prop_assert_eq!(refused, !there.is_empty());
            }
        }
    }

    #[test]
    fn other_ports_are_refused_while_anyone_has_the_address() {
        let mut planner = Planner::default();
        let mut update = |name, there| {
            let (service, plan) = plan(name, &[]);
            planner.update(&service, plan.filter(|_| there), None).any_port[&Addr::UNSPECIFIED_V6]
        };
        assert_eq!(
            [update("a", true), update("b", true), update("a", false), update("b", false)],
            [true, true, true, false]
        );
    }
}
