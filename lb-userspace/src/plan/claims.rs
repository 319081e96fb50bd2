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
use crate::model::{ObjectName, object::Protocol, repack};

/// Age and name of a port: the smallest claim of a frontend wins. Objects without a time (manifests) count as oldest. All
/// frontends of a port share one.
type Claim = Arc<(Option<Box<str>>, PortName)>;

/// A sorted set that nearly always has one element, of which there is one for every frontend: it has no memory of its own.
#[derive(Debug, Default)]
enum Few<T> {
    #[default]
    None,
    One(T),
    More(Vec<T>),
}

impl<T: Ord> Few<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::None => &[],
            Self::One(element) => std::slice::from_ref(element),
            Self::More(elements) => elements,
        }
    }

    fn first(&self) -> Option<&T> {
        self.as_slice().first()
    }

    fn insert(&mut self, element: T) {
        let Err(place) = self.as_slice().binary_search(&element) else { return };
        let mut elements = self.take();
        elements.insert(place, element);
        self.put(elements);
    }

    fn remove(&mut self, element: &T) {
        let Ok(place) = self.as_slice().binary_search(element) else { return };
        let mut elements = self.take();
        elements.remove(place);
        self.put(elements);
    }

    fn take(&mut self) -> Vec<T> {
        match std::mem::take(self) {
            Self::None => Vec::new(),
            Self::One(element) => vec![element],
            Self::More(elements) => elements,
        }
    }

    fn put(&mut self, mut elements: Vec<T>) {
        *self = match (elements.pop(), elements.is_empty()) {
            (None, _) => Self::None,
            (Some(element), true) => Self::One(element),
            (Some(element), false) => {
                elements.push(element);
                Self::More(elements)
            }
        };
    }
}

/// Who claims which frontend. The plans themselves are made anew when they are needed: they would take more memory than
/// everything else here.
#[derive(Debug, Default)]
pub struct Planner {
    services: BTreeMap<ObjectName, Claims>,
    claims: BTreeMap<FrontendKey, Few<Claim>>,
    any_port: BTreeMap<Addr, Few<ObjectName>>,
}

/// What a Service claims.
#[derive(Debug, Default)]
struct Claims {
    ports: Box<[Claimed]>,
    any_port: Box<[Addr]>,
}

/// What a port claims.
#[derive(Debug)]
struct Claimed {
    claim: Claim,
    frontends: Box<[FrontendKey]>,
}

impl Claimed {
    fn name(&self) -> &PortName {
        &self.claim.1
    }
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
    /// Takes the new plan of a Service, or its absence. `age` is its creation time; `plan_of` gives the plans of those that it
    /// takes frontends from, or leaves some to.
    pub fn update(
        &mut self,
        service: &ObjectName,
        plan: Option<ServicePlan>,
        age: Option<&str>,
        plan_of: impl Fn(&ObjectName) -> Option<ServicePlan>,
    ) -> Step {
        let mut touched: BTreeSet<PortName> = BTreeSet::new();
        let mut addrs: BTreeSet<Addr> = BTreeSet::new();
        let before = self.services.remove(service).unwrap_or_default();
        for port in before.ports {
            self.withdraw(&port, &mut touched);
            touched.insert(port.name().clone());
        }
        for addr in before.any_port {
            if let Some(claimants) = self.any_port.get_mut(&addr) {
                claimants.remove(service);
            }
            addrs.insert(addr);
        }
        let mut plans = BTreeMap::new();
        if let Some(ServicePlan { ports, any_port, .. }) = plan {
            let mut claimed: Vec<Claimed> = Vec::with_capacity(ports.len());
            for port in &ports {
                // A second port of this name and protocol, which the API server doesn't allow.
                if claimed.iter().any(|other| *other.name() == port.name) {
                    continue;
                }
                let claim = Arc::new((age.map(Into::into), port.name.clone()));
                let port = Claimed { claim, frontends: port.frontends.iter().map(|frontend| frontend.key).collect() };
                self.claim(&port, &mut touched);
                touched.insert(port.name().clone());
                claimed.push(port);
            }
            for addr in &any_port {
                self.any_port.entry(*addr).or_default().insert(service.clone());
                addrs.insert(*addr);
            }
            self.services.insert(service.clone(), Claims { ports: claimed.into(), any_port: any_port.into() });
            plans.insert(service.clone(), ports);
        }
        let mut planned = |name: PortName| {
            let made = || plan_of(&name.service).map(|plan| plan.ports).unwrap_or_default();
            let ports = plans.entry(name.service.clone()).or_insert_with(made);
            let port = ports.iter().position(|port| port.name == name).map(|place| ports.remove(place));
            (name, port.map(|port| Arc::new(self.granted(port))))
        };
        let ports = touched.into_iter().map(&mut planned).collect();
        Step { ports, any_port: self.refused(addrs) }
    }

    /// A port's plan without the frontends that others have.
    fn granted(&self, mut port: PortPlan) -> PortPlan {
        let won = |frontend: &PlannedFrontend| {
            self.claims.get(&frontend.key).and_then(Few::first).is_some_and(|claim| claim.1 == port.name)
        };
        port.frontends.retain(won);
        port
    }

    /// Gives spare room back, once a first list is planned.
    pub fn compact(&mut self) {
        repack(&mut self.services);
        repack(&mut self.claims);
        repack(&mut self.any_port);
    }

    /// Whether there is such a port.
    #[must_use]
    pub fn has_port(&self, name: &PortName) -> bool {
        let service = self.services.get(&name.service);
        service.is_some_and(|claims| claims.ports.iter().any(|port| port.name() == name))
    }

    /// Whether other ports of an address are refused.
    #[must_use]
    pub fn has_any_port(&self, addr: &Addr) -> bool {
        self.any_port.contains_key(addr)
    }

    /// The frontends that ports of a Service claim, but others have.
    #[must_use]
    pub fn conflicts_of(&self, service: &ObjectName) -> Vec<Conflict> {
        let ports = self.services.get(service).into_iter().flat_map(|entry| &entry.ports);
        let claims = ports.flat_map(|port| port.frontends.iter().map(move |key| (port.name(), *key)));
        let lost = claims.filter_map(|(loser, key)| {
            let winner = &self.claims.get(&key)?.first()?.1;
            (winner != loser).then(|| Conflict { key, winner: winner.clone(), loser: loser.clone() })
        });
        lost.collect()
    }

    /// Every frontend that somebody claims in vain. A walk over all, for whoever wants to see the whole.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        self.claims.iter().flat_map(|(key, claims)| {
            let winner = claims.first();
            let lost = claims.as_slice().iter().skip(1);
            lost.zip(winner.into_iter().cycle()).map(|(loser, winner)| Conflict {
                key: *key,
                winner: winner.1.clone(),
                loser: loser.1.clone(),
            })
        })
    }

    fn claim(&mut self, port: &Claimed, touched: &mut BTreeSet<PortName>) {
        for key in &port.frontends {
            let claims = self.claims.entry(*key).or_default();
            let before = claims.first().map(|claim| claim.1.clone());
            claims.insert(port.claim.clone());
            if claims.first() == Some(&port.claim) {
                touched.extend(before);
            }
        }
    }

    fn withdraw(&mut self, port: &Claimed, touched: &mut BTreeSet<PortName>) {
        for key in &port.frontends {
            let Some(claims) = self.claims.get_mut(key) else { continue };
            let won = claims.first() == Some(&port.claim);
            claims.remove(&port.claim);
            match claims.first() {
                Some(heir) if won => _ = touched.insert(heir.1.clone()),
                Some(_) => (),
                None => _ = self.claims.remove(key),
            }
        }
    }

    /// Whether these addresses refuse other ports now.
    fn refused(&mut self, addrs: BTreeSet<Addr>) -> BTreeMap<Addr, bool> {
        for addr in &addrs {
            if self.any_port.get(addr).is_some_and(|claimants| claimants.first().is_none()) {
                self.any_port.remove(addr);
            }
        }
        addrs.into_iter().map(|addr| (addr, self.any_port.contains_key(&addr))).collect()
    }
}

/// A planner with the plans of its Services, for tests.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) planner: Planner,
    plans: BTreeMap<ObjectName, ServicePlan>,
}

#[cfg(test)]
impl Book {
    pub(crate) fn update(&mut self, service: &ObjectName, plan: Option<ServicePlan>, age: Option<&str>) -> Step {
        match plan.clone() {
            Some(plan) => _ = self.plans.insert(service.clone(), plan),
            None => _ = self.plans.remove(service),
        }
        self.planner.update(service, plan, age, |other| self.plans.get(other).cloned())
    }

    /// What all ports do now.
    pub(crate) fn everything(&self) -> Step {
        let ports = self.plans.values().flat_map(|plan| plan.ports.iter().cloned());
        Step {
            ports: ports.map(|port| (port.name.clone(), Some(Arc::new(self.planner.granted(port))))).collect(),
            any_port: self.planner.any_port.keys().map(|addr| (*addr, true)).collect(),
        }
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
            format!("{}: {}", name.service.name(), ports.map_or("gone".into(), |ports| ports.join(",")))
        };
        step.ports.iter().map(entry).collect()
    }

    #[test]
    fn the_oldest_wins_and_the_next_takes_over() {
        let mut planner = Book::default();
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
        let mut planner = Book::default();
        for (name, age) in [("a", "2026"), ("b", "2025")] {
            let (service, plan) = plan(name, &[SHARED]);
            planner.update(&service, plan, Some(age));
        }
        let [conflict] = &planner.planner.conflicts_of(&ObjectName::new("ns", "a"))[..] else { panic!() };
        assert_eq!(
            conflict.problem().to_string(),
            "Service ns/a: spec.ports: nodePort 80/TCP belongs to Service ns/b, which is older; \
             give one of them another address or port"
        );
        assert!(planner.planner.conflicts().eq([conflict.clone()]));
        assert_eq!(planner.planner.conflicts_of(&ObjectName::new("ns", "b")), []);
    }

    proptest! {
        #[test]
        fn steps_add_up_to_what_each_frontend_s_oldest_claim_says(
            changes in prop::collection::vec((0..4_usize, prop::option::of(prop::collection::btree_set(80..86_u16, 0..4))), 1..40)
        ) {
            let (mut planner, mut followed, mut there) = (Book::default(), Step::default(), BTreeMap::new());
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
                    let port = followed.ports.iter().find(|(port, _)| port.service.name() == *name).unwrap().1;
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
        let mut planner = Book::default();
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
