//! `model` → `plan` → `image` joined, for whoever drives them: the agent, `explain`, tests.
//!
//! In: changes of objects, facts about the node. Out: writes. Pure as its parts are; nothing is written before it is asked
//! for, so a source's first list can be taken in as a whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{addr::Addr, layout::NodeAddress};

use crate::{
    image::{Image, Write},
    model::{Affected, Change, Model, ObjectName, address::parse_cidr},
    plan::{
        Conflict, HealthCheck, NodeView, Planner, Problem, ServicePlan, Step,
        node::{NodeOptions, health_check_addresses, node_addresses},
        plan_service,
    },
};

/// So many Service ports of a first list are planned before their plans are carried out and forgotten.
const AT_ONCE: usize = 64;

/// The state of the cluster, what this node does about it, and what of that is in the kernel.
#[derive(Debug)]
pub struct Pipeline {
    name: String,
    options: NodeOptions,
    interfaces: Vec<IpAddr>,
    model: Model,
    view: NodeView,
    planner: Planner,
    image: Image,
    pending: Affected,
    problems: BTreeMap<ObjectName, Vec<Problem>>,
    node_problems: Vec<Problem>,
    /// Problems that the last compilation found and those before had not.
    fresh: Vec<Problem>,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// Services whose health check changed since somebody asked.
    changed_checks: BTreeSet<ObjectName>,
    check_addresses: Vec<IpAddr>,
    lacking: Lacking,
    endpoints_changed: Vec<(bool, i64)>,
}

/// Service ports that have endpoints, but none here, where a policy is Local.
#[derive(Debug, Default)]
struct Lacking {
    /// Those of a Service, for each of `counts`.
    services: BTreeMap<ObjectName, [usize; 4]>,
    counts: [usize; 4],
}

impl Lacking {
    fn set(&mut self, service: &ObjectName, lacks: [usize; 4]) {
        let old =
            if lacks == [0; 4] { self.services.remove(service) } else { self.services.insert(service.clone(), lacks) };
        for ((count, new), old) in self.counts.iter_mut().zip(lacks).zip(old.unwrap_or_default()) {
            *count = *count + new - old;
        }
    }
}

impl Pipeline {
    /// A pipeline for the node of this name, beginning with what is in the kernel.
    #[must_use]
    pub fn new(name: &str, options: NodeOptions, image: Image) -> Self {
        Self {
            view: NodeView::new(name, None, &options),
            model: Model::new(name),
            name: name.to_owned(),
            options,
            interfaces: Vec::new(),
            planner: Planner::default(),
            image,
            // What depends on the node is there even if no object ever comes.
            pending: Affected { node: true, service_cidrs: true, ..Affected::default() },
            problems: BTreeMap::new(),
            node_problems: Vec::new(),
            fresh: Vec::new(),
            health_checks: BTreeMap::new(),
            changed_checks: BTreeSet::new(),
            check_addresses: Vec::new(),
            lacking: Lacking::default(),
            endpoints_changed: Vec::new(),
        }
    }

    /// The state of the cluster.
    #[must_use]
    pub const fn model(&self) -> &Model {
        &self.model
    }

    /// What is in the kernel once the writes are done.
    #[must_use]
    pub const fn image(&self) -> &Image {
        &self.image
    }

    /// What is in the kernel, for whoever needs nothing else any more.
    #[must_use]
    pub fn into_image(self) -> Image {
        self.image
    }

    /// For facts that concern nobody else: devices, settings, expiry of bits.
    pub const fn image_mut(&mut self) -> &mut Image {
        &mut self.image
    }

    /// What of the node matters to policies.
    #[must_use]
    pub const fn view(&self) -> &NodeView {
        &self.view
    }

    /// Everything that can't be used now. A walk over all, for whoever wants to see the whole.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let stated = self.node_problems.iter().chain(self.problems.values().flatten()).cloned();
        stated.chain(self.planner.conflicts().map(|conflict| conflict.problem())).collect()
    }

    /// What can't be used since the last compilation, and could before.
    pub fn fresh_problems(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.fresh)
    }

    /// Health checks of Services that changed since the last call, with what they are now.
    pub fn changed_health_checks(&mut self) -> BTreeMap<ObjectName, Option<HealthCheck>> {
        let changed = std::mem::take(&mut self.changed_checks);
        changed.into_iter().map(|name| (name.clone(), self.health_checks.get(&name).copied())).collect()
    }

    /// How many Service ports have endpoints, but none here, where a policy is Local: for clients inside, and outside.
    #[must_use]
    pub const fn lacking_local_endpoints(&self, v4: bool) -> (usize, usize) {
        let [v4_in, v4_out, v6_in, v6_out] = self.lacking.counts;
        if v4 { (v4_in, v4_out) } else { (v6_in, v6_out) }
    }

    /// When endpoints changed whose writes were compiled since the last call: whether they are IPv4's, seconds of Unix time.
    pub fn endpoints_changed(&mut self) -> Vec<(bool, i64)> {
        std::mem::take(&mut self.endpoints_changed)
    }

    /// Where healthCheckNodePorts listen; unspecified stands for every address of its family.
    #[must_use]
    pub fn health_check_addresses(&self) -> &[IpAddr] {
        &self.check_addresses
    }

    /// What of one Service can't be used now.
    #[must_use]
    pub fn problems_of(&self, service: &ObjectName) -> Vec<Problem> {
        let stated = self.problems.get(service).into_iter().flatten().cloned();
        stated.chain(self.planner.conflicts_of(service).iter().map(Conflict::problem)).collect()
    }

    /// What this node would do for a Service if no other claimed its frontends.
    #[must_use]
    pub fn plan(&self, service: &ObjectName) -> Option<ServicePlan> {
        plan_of(&self.model, service, &self.view)?.0
    }

    /// Begins again with what is in the kernel, after writes may have been lost: the next [`Self::compile`] compares everything.
    pub fn restart(&mut self, image: Image) {
        self.image = image;
        self.planner = Planner::default();
        let services = self.model.services().map(|(name, _)| name.clone()).collect();
        self.pending = Affected { services, node: true, service_cidrs: true, ..Affected::default() };
    }

    /// Takes a change in. Its writes come with the next [`Self::compile`]. Whether anything has to be planned again.
    pub fn take(&mut self, change: Change) -> bool {
        let affected = self.model.apply(change);
        let any = affected != Affected::default();
        self.pending.merge(affected);
        any
    }

    /// The addresses on the node's interfaces, loopback or not. Their writes come with the next [`Self::compile`].
    pub fn set_interfaces(&mut self, addresses: Vec<IpAddr>) {
        if self.interfaces != addresses {
            self.interfaces = addresses;
            self.pending.node = true;
        }
    }

    /// Gives spare room back, once a first list is taken in: there is room for its plans in it.
    pub fn compact_model(&mut self) {
        self.model.compact();
    }

    /// The writes that follow from everything taken in since the last call.
    pub fn compile(&mut self, now: u64) -> Vec<Write> {
        let Affected { mut services, node, service_cidrs, endpoints_changed } = std::mem::take(&mut self.pending);
        self.endpoints_changed.extend(endpoints_changed);
        let mut writes = Vec::new();
        if node {
            let view = NodeView::new(&self.name, self.model.node(), &self.options);
            let cidrs = self.options.detector.cidrs(self.model.node());
            writes.extend(self.image.set_local_cidrs(&cidrs));
            let (addresses, problems): (BTreeMap<Addr, NodeAddress>, _) =
                node_addresses(&self.interfaces, &view, &self.options);
            writes.extend(self.image.set_node_addresses(&addresses));
            self.check_addresses = health_check_addresses(&addresses, &view, &self.options);
            self.fresh.extend(problems.iter().filter(|problem| !self.node_problems.contains(problem)).cloned());
            self.node_problems = problems;
            if view != self.view {
                self.view = view;
                services.extend(self.model.services().map(|(name, _)| name.clone()));
            }
        }
        if service_cidrs {
            let cidrs = self.model.service_cidrs().flat_map(|cidr| &cidr.spec.cidrs);
            let cidrs: Vec<_> = cidrs.filter_map(|text| parse_cidr(text)).collect();
            writes.extend(self.image.set_service_cidrs(&cidrs));
        }
        let mut step = Step::default();
        for service in services {
            step.merge(self.plan_again(&service));
            // A first list's plans would take more memory than what comes of them.
            if self.image.is_silent() && step.ports.len() >= AT_ONCE {
                self.image.apply(&std::mem::take(&mut step), now);
            }
        }
        writes.extend(self.image.apply(&step, now));
        writes
    }

    /// Gives spare room back, once a first list is compiled.
    pub fn compact(&mut self) {
        self.planner.compact();
        self.image.compact();
    }

    /// Removes what is in the kernel and in no plan. To be called once, after the source's first full list was compiled.
    pub fn sweep(&mut self, now: u64) -> Vec<Write> {
        let planner = &self.planner;
        self.image.sweep(|name| planner.has_port(name), |addr| planner.has_any_port(addr), now)
    }

    fn plan_again(&mut self, service: &ObjectName) -> Step {
        let object = self.model.service(service);
        let (plan, problems) = plan_of(&self.model, service, &self.view).unwrap_or_default();
        let age = object.and_then(|object| object.metadata.creation_timestamp.as_deref());
        let known = self.problems_of(service);
        let check = plan.as_ref().and_then(|plan| plan.health_check);
        let had = match check {
            Some(check) => self.health_checks.insert(service.clone(), check),
            None => self.health_checks.remove(service),
        };
        if had != check {
            self.changed_checks.insert(service.clone());
        }
        let lacks = plan.as_ref().map(|plan| [true, false].map(|v4| plan.ports_without_local_endpoints(v4)));
        let lacks = lacks.map(|[v4, v6]| [v4.0, v4.1, v6.0, v6.1]);
        self.lacking.set(service, lacks.unwrap_or_default());
        let (model, view) = (&self.model, &self.view);
        let step = self.planner.update(service, plan, age, |other| plan_of(model, other, view)?.0);
        if problems.is_empty() {
            self.problems.remove(service);
        } else {
            self.problems.insert(service.clone(), problems);
        }
        self.fresh.extend(self.problems_of(service).into_iter().filter(|problem| !known.contains(problem)));
        step
    }
}

/// What a node does for a Service, if there is such a Service, and what of it can't be used.
fn plan_of(model: &Model, service: &ObjectName, view: &NodeView) -> Option<(Option<ServicePlan>, Vec<Problem>)> {
    Some(plan_service(model.service(service)?, &model.backends(service), view))
}
