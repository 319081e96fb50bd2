//! The agent: waits for changes of the cluster and of the node, and carries them to the kernel.
//!
//! In: a source's updates, devices and addresses, signals, questions on a socket. Out: writes and attachments. This is the
//! only place that knows of time; what a change means is decided in `plan`.

pub mod door;
pub mod report;

use std::{
    borrow::Borrow,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use lb_common::{
    addr::Addr,
    layout::{frontend_flags, node_flags},
    memory::Memory,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant as TokioInstant, sleep_until},
};
use tracing::{debug, error, info, warn};

use self::{
    door::{Door, Question},
    report::{LastChange, Report, ServiceReport},
};
use crate::{
    config::Config,
    events::{Events, Happening},
    image::{Image, Write, difference},
    kernel::{
        self, Kernel,
        devices::{Snapshot, watch::Watch},
        sysctls::Conntrack,
    },
    model::{Kind, Node},
    pipeline::Pipeline,
    plan::{Expected, node::NodeOptions},
    serve::{
        self, Serve,
        health::{Family, Moment},
        node_ports::Checks,
        troubles::Trouble,
    },
    source::{Place, Problem, Source, Update, api::Requests},
};

/// How often bits that no flow can name any more are looked for.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(60);
/// How long after a change sockets are looked at: a process may be in the middle of connect(2), and changes come together.
const SETTLING: Duration = Duration::from_millis(10);
/// How long after a failed write everything is compared and written again.
const RETRY: Duration = Duration::from_secs(1);

/// What the operator says.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where Services and endpoints come from.
    pub source: Place,
    /// The node's name.
    pub node: String,
    /// What of kube-proxy's configuration concerns the node.
    pub node_options: NodeOptions,
    /// All of kube-proxy's configuration.
    pub config: Config,
    /// Pins, cgroup, attachment.
    pub kernel: kernel::Options,
    /// The HTTP servers.
    pub serve: serve::Options,
    /// conntrack's settings, if they are ours to make.
    pub conntrack: Option<Conntrack>,
}

/// Runs until SIGTERM or SIGINT, and leaves the data plane as it is.
///
/// # Errors
///
/// When the kernel or the source refuses something without which nothing can be done. What fails later is said and tried
/// again.
pub async fn run(options: Options) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let requests = Requests::new()?;
    let mut source = Source::open(&options.source, &requests).await?;
    let mut watch = Watch::open()?;
    let mut agent = Agent::open(&options, requests)?;
    let mut door = Door::open(&options.kernel.bpffs)?;
    loop {
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            snapshot = watch.changed() => {
                let snapshot = snapshot?.clone();
                agent.see_devices(&snapshot);
            }
            update = source.next() => match update {
                Some(update) if update.first => agent.begin(update, watch.snapshot())?,
                Some(update) => agent.take(update),
                None => bail!("the source of Services can't be watched any more"),
            },
            (question, answer) = door.next() => answer.send(agent.answer(question)),
            trouble = agent.serve.fatal() => bail!("{trouble} (bindAddressHardFail)"),
            () = sleep_until(agent.alarm) => agent.wake(),
            () = sleep_until(agent.look.unwrap_or(agent.alarm)), if agent.look.is_some() => agent.end_sockets(),
        }
    }
    info!("stopped; the data plane goes on without an agent (`fairlead cleanup` removes it)");
    Ok(())
}

struct Agent {
    pipeline: Pipeline,
    kernel: Kernel,
    /// What was in the tables before the first list.
    adopted: Memory,
    options: NodeOptions,
    snapshot: Snapshot,
    /// The primary addresses with which the rows of this snapshot's devices were made, if they were.
    rows_of: Option<Vec<IpAddr>>,
    /// Whether the source's first list has been compiled; nothing is written before.
    begun: bool,
    /// Whether the tables in the kernel may differ from the image.
    failed: Option<String>,
    /// Why they were said to differ last; said once for each cause until they don't.
    said: Option<String>,
    attach_failed: Option<String>,
    sockets_failed: Option<String>,
    ports_failed: Option<String>,
    /// Where nothing was attached at the start: until when older connections may exist.
    leaves_mid_flow: Option<u32>,
    /// Whether TCP connections are reset when their endpoint is gone.
    terminates: bool,
    astray_failed: Option<String>,
    alarm: TokioInstant,
    /// When to look for sockets that the last changes have led astray.
    look: Option<TokioInstant>,
    start: Instant,
    birth: SystemTime,
    report: Report,
    serve: Serve,
    events: Events,
    /// Whether the cluster had this node's Node object at any time.
    had_node: bool,
    /// When the first change was taken in that is not compiled yet.
    taken: Option<Instant>,
    /// Whether the next writes come from comparing everything.
    full: bool,
    /// Where health checks of Services listen, as it was said last.
    check_addresses: Vec<IpAddr>,
}

impl Agent {
    fn open(options: &Options, requests: Requests) -> Result<Self> {
        let events = match &options.source {
            Place::ApiServer(source) => Events::start(source.address.clone(), requests.clone(), &options.node),
            Place::Manifests(_) => Events::default(),
        };
        let kernel = Kernel::open(options.kernel.clone())?;
        let memory = kernel.memory().context("reading what is pinned")?;
        let adopted = memory.clone();
        let image = Image::restore(memory, 0);
        let leaves_mid_flow = kernel.is_detached()?.then(kernel::older_connections_until);
        info!(
            node = options.node,
            bpffs = %options.kernel.bpffs.display(),
            attach = ?kernel.mechanism(),
            socket_lb = ?options.kernel.socket_lb,
            adopted_frontends = adopted.frontends.len(),
            "waiting for the first list"
        );
        let serve = Serve::start(options.serve.clone(), options.kernel.bpffs.clone(), events.clone())?;
        serve.metrics().show(requests.collector())?;
        for message in options.conntrack.iter().flat_map(|conntrack| conntrack.apply(Path::new("/"))) {
            serve.report(&message, Trouble::of_node("FailedToSetConntrack", message.clone()));
        }
        let report = Report {
            node: options.node.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            attach: format!("{:?}", kernel.mechanism()).to_lowercase(),
            ..Report::default()
        };
        Ok(Self {
            pipeline: Pipeline::new(&options.node, options.node_options.clone(), image),
            kernel,
            adopted,
            options: options.node_options.clone(),
            snapshot: Snapshot::default(),
            rows_of: None,
            begun: false,
            failed: None,
            said: None,
            attach_failed: None,
            sockets_failed: None,
            ports_failed: None,
            leaves_mid_flow,
            terminates: options.kernel.terminate_connections,
            astray_failed: None,
            alarm: TokioInstant::now() + EXPIRY_INTERVAL,
            look: None,
            start: Instant::now(),
            birth: SystemTime::now(),
            report,
            serve,
            events,
            taken: None,
            full: true,
            had_node: false,
            check_addresses: Vec::new(),
        })
    }

    /// Seconds since the start.
    fn now(&self) -> u64 {
        self.start.elapsed().as_secs()
    }

    fn milliseconds(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Takes in the source's first list, writes the difference to what is pinned, and attaches.
    ///
    /// # Errors
    ///
    /// When the kernel has no tables for us, or refuses the programs: trying again would not help.
    fn begin(&mut self, update: Update, snapshot: &Snapshot) -> Result<()> {
        let changes = update.changes.len();
        debug!(changes, milliseconds = self.milliseconds(), "the first list is read");
        self.kernel.prepare(&Expected::of(&update.changes))?;
        self.take_in(update);
        self.begun = true;
        self.set_devices(snapshot);
        self.compile_first();
        self.kernel.verified()?;
        self.attach_devices();
        self.attach_sockets();
        if let Err(error) = self.kernel.reserve_ports() {
            let text = format!(
                "{error:#}: the node's processes may take the ports that masquerading takes (--masquerade-ports); put them into \
                 net.ipv4.ip_local_reserved_ports by other means"
            );
            warn!("{text}");
            self.ports_failed = Some(text);
        }
        self.report.ready = self.failed.is_none();
        // The first list takes much more than what stays of it, and never comes again.
        kernel::release_memory();
        self.events.record(Happening {
            service: None,
            warning: false,
            reason: "Starting",
            action: "StartKubeProxy",
            note: String::new(),
        });
        if self.failed.is_some() {
            return Ok(());
        }
        info!(
            services = self.pipeline.model().count(Kind::Service),
            frontends = self.pipeline.image().memory().frontends.len(),
            devices = self.snapshot.ports().len(),
            milliseconds = self.milliseconds(),
            "ready"
        );
        remove_kube_proxy()
    }

    fn attach_sockets(&mut self) {
        match self.kernel.attach_sockets() {
            Ok(()) => {
                self.sockets_failed = None;
                // Some may have connected while no programs were there.
                self.look = Some(TokioInstant::now());
            }
            Err(error) => {
                let text = format!("{error:#}");
                if self.sockets_failed.as_ref() != Some(&text) {
                    error!(error = text, "clients on the node itself are not served; trying again");
                }
                self.sockets_failed = Some(text);
                self.alarm = TokioInstant::now() + RETRY;
            }
        }
    }

    fn take(&mut self, update: Update) {
        self.take_in(update);
        self.compile();
    }

    fn take_in(&mut self, update: Update) {
        let Update { changes, problems, skipped, .. } = update;
        let now = Moment::now();
        self.taken.get_or_insert(now.counted);
        for change in changes {
            match change.kind() {
                Kind::Service => self.serve.metrics().service_changed(),
                Kind::EndpointSlice | Kind::Pod => self.serve.metrics().endpoints_changed(),
                Kind::Node | Kind::ServiceCidr => {}
            }
            if self.pipeline.take(change) {
                self.serve.health().taken(now);
            }
        }
        let node = self.pipeline.model().node();
        self.had_node |= node.is_some();
        // Where the cluster never had it, as in a folder of manifests, it can't be going away.
        self.serve.health().set_eligible(node.map_or(!self.had_node, Node::is_eligible));
        for problem in &problems {
            if !self.report.source_problems.contains(problem) {
                warn!("{problem}");
            }
        }
        self.report.source_problems = problems;
        self.report.skipped = skipped;
    }

    /// Follows devices and addresses: rows first, then programs, so that none runs on a device that the tables don't know.
    fn see_devices(&mut self, snapshot: &Snapshot) {
        self.set_devices(snapshot);
        if self.begun {
            self.compile();
            self.attach_devices();
        }
    }

    fn set_devices(&mut self, snapshot: &Snapshot) {
        self.snapshot = snapshot.clone();
        self.rows_of = None;
        self.pipeline.set_interfaces(snapshot.node_addresses().into_iter().map(|(_, addr)| addr).collect());
    }

    fn attach_devices(&mut self) {
        match self.kernel.attach_devices(&self.snapshot.ports()) {
            Ok(()) => self.attach_failed = None,
            Err(error) => {
                let text = format!("{error:#}");
                if self.attach_failed.as_ref() != Some(&text) {
                    error!(error = text, "a device has no programs; trying again");
                }
                self.attach_failed = Some(text);
                self.alarm = TokioInstant::now() + RETRY;
            }
        }
    }

    /// Carries everything taken in to the kernel.
    fn compile(&mut self) {
        if !self.begun {
            return;
        }
        let begin = Instant::now();
        let writes = self.plan();
        debug!(writes = writes.len(), milliseconds = self.milliseconds(), "planned");
        self.write(&writes);
        self.end_change(begin, writes.len());
    }

    /// Makes the tables that were adopted those of the first list.
    fn compile_first(&mut self) {
        let begin = Instant::now();
        self.pipeline.image_mut().set_silent(true);
        self.plan();
        self.pipeline.sweep(self.now());
        self.pipeline.image_mut().set_silent(false);
        debug!(milliseconds = self.milliseconds(), "planned");
        let (old, new) = (std::mem::take(&mut self.adopted), self.pipeline.image().memory());
        let mut count = 0;
        let families = families(difference(&old, new).inspect(|_| count += 1));
        let moment = self.begin_write(&families);
        if count != 0 {
            let result = self.kernel.fill(&old, new);
            self.end_write(result, &families, moment);
        }
        self.end_change(begin, count);
    }

    /// The writes that follow from everything taken in.
    fn plan(&mut self) -> Vec<Write> {
        // First, or an agent that dies meanwhile would leave frontends to packets of older connections.
        let until = self.leaves_mid_flow;
        let mut writes = until.map(|until| self.pipeline.image_mut().leave_mid_flow(until)).unwrap_or_default();
        writes.extend(self.pipeline.image_mut().set_terminates(self.terminates));
        writes.extend(self.pipeline.compile(self.now()));
        // The node's primary addresses, which rows of devices depend on, are known only now.
        let primary = &self.pipeline.view().primary;
        if self.rows_of.as_ref() != Some(primary) {
            let rows = self.snapshot.device_rows(primary, |name| self.options.detector.takes_interface(name));
            self.rows_of = Some(primary.clone());
            writes.extend(self.pipeline.image_mut().set_devices(&rows));
        }
        self.serve.metrics().nothing_pending();
        writes
    }

    fn end_change(&mut self, begin: Instant, writes: usize) {
        self.full = self.failed.is_some();
        self.taken = None;
        self.publish();
        debug!(milliseconds = self.milliseconds(), "written");
        if writes != 0 {
            self.report.last_change = Some(LastChange {
                at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
                writes,
                microseconds: u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX),
            });
        }
        for problem in self.pipeline.fresh_problems() {
            warn!("{problem}");
        }
    }

    /// Tells the health checks of Services what is effective.
    fn publish(&mut self) {
        if self.failed.is_some() {
            return;
        }
        for (v4, seconds) in self.pipeline.endpoints_changed() {
            let since = UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            // What happened before the start says nothing about us.
            if since >= self.birth {
                self.serve.metrics().programmed(if v4 { Family::V4 } else { Family::V6 }, since);
            }
        }
        for family in Family::ALL {
            let (inside, outside) = self.pipeline.lacking_local_endpoints(family == Family::V4);
            self.serve.metrics().set_no_local_endpoints(family, inside, outside);
        }
        let services = self.pipeline.changed_health_checks();
        let addresses = self.pipeline.health_check_addresses();
        let addresses = (self.check_addresses != addresses).then(|| addresses.to_vec());
        if let Some(addresses) = &addresses {
            self.check_addresses.clone_from(addresses);
        }
        if !services.is_empty() || addresses.is_some() {
            self.serve.set_checks(Checks { services, addresses });
        }
    }

    fn write(&mut self, writes: &[Write]) {
        let families = families(writes);
        let begin = self.begin_write(&families);
        if writes.is_empty() || self.failed.is_some() {
            return;
        }
        let result = self.kernel.apply(writes);
        self.end_write(result, &families, begin);
        if self.failed.is_none()
            && self.look.is_none()
            && self.kernel.concerns_sockets(writes, self.pipeline.image().memory())
        {
            self.look = Some(TokioInstant::now() + SETTLING);
        }
    }

    fn begin_write(&self, families: &[Family]) -> Moment {
        let now = Moment::now();
        self.serve.health().queued(families, now);
        self.serve.metrics().queued(families);
        now
    }

    fn end_write(&mut self, result: Result<()>, families: &[Family], begin: Moment) {
        self.serve.metrics().set_written(self.kernel.statistics());
        if let Err(error) = result {
            self.serve.metrics().failed(families);
            self.fail(format!("{error:#}"), "the tables could not be written; trying again");
            return;
        }
        self.serve.health().updated(families, Moment::now());
        self.serve.metrics().synced(families, self.taken.unwrap_or(begin.counted).elapsed(), self.full);
    }

    /// The tables may differ from the image, until a try succeeds.
    fn fail(&mut self, text: String, what: &str) {
        if self.said.as_ref() != Some(&text) {
            error!(error = text, "{what}");
        }
        self.said = Some(text.clone());
        self.failed = Some(text);
        self.report.ready = false;
        self.alarm = TokioInstant::now() + RETRY;
    }

    fn end_sockets(&mut self) {
        self.look = None;
        match self.kernel.end_sockets_astray(self.pipeline.image().memory()) {
            Ok(0) => self.astray_failed = None,
            Ok(sockets) => {
                self.astray_failed = None;
                info!(
                    sockets,
                    "connected sockets were ended: what they were connected to is gone or has become a Service's"
                );
            }
            Err(error) => {
                let text = format!("{error:#}");
                if self.astray_failed.as_ref() != Some(&text) {
                    warn!(error = text, "connected sockets may go on to speak to endpoints that are gone");
                }
                self.astray_failed = Some(text);
            }
        }
    }

    /// What is due: another try after a failure, else old bits.
    fn wake(&mut self) {
        self.alarm = TokioInstant::now() + EXPIRY_INTERVAL;
        let now = self.now();
        if self.failed.is_some() {
            match self.kernel.memory() {
                Ok(memory) => {
                    self.failed = None;
                    self.full = true;
                    self.pipeline.restart(Image::restore(memory, now));
                    self.rows_of = None;
                    self.compile();
                    let writes = self.pipeline.sweep(now);
                    self.write(&writes);
                    if self.failed.is_none() {
                        self.serve.health().updated(&Family::ALL, Moment::now());
                        self.look = Some(TokioInstant::now());
                        self.report.ready = true;
                        self.said = None;
                        info!("the tables are as they should be again");
                    }
                }
                Err(error) => {
                    self.fail(format!("{error:#}"), "the tables can't be read; trying again");
                }
            }
        }
        if self.begun && !self.kernel.is_attached() {
            let snapshot = self.snapshot.clone();
            self.see_devices(&snapshot);
            self.attach_sockets();
        }
        if self.pipeline.image().has_expired(now) {
            self.expire(now);
        }
    }

    /// Clears the bits that nothing names any more. Flows may live longer than anybody foresaw.
    fn expire(&mut self, now: u64) {
        match self.kernel.named_by_flows() {
            Ok((frontends, endpoints)) => {
                let writes = self.pipeline.image_mut().expire(now, &frontends, &endpoints);
                self.write(&writes);
            }
            Err(error) => warn!(error = format!("{error:#}"), "flows can't be read; bits are kept"),
        }
    }

    fn answer(&self, question: Question) -> String {
        let text = match question {
            Question::Status => serde_json::to_string(&self.status()),
            Question::Services => serde_json::to_string(&self.services()),
        };
        text.unwrap_or_default()
    }

    fn status(&self) -> Report {
        let model = self.pipeline.model();
        let count = |kind| model.count(kind);
        let mut report = self.report.clone();
        report.objects = [
            ("services", Kind::Service),
            ("endpointSlices", Kind::EndpointSlice),
            ("pods", Kind::Pod),
            ("nodes", Kind::Node),
            ("serviceCIDRs", Kind::ServiceCidr),
        ]
        .map(|(name, kind)| (name.to_owned(), count(kind)))
        .into();
        report.devices = self.snapshot.links.values().map(|link| (link.ifindex, link.name.clone())).collect();
        report.bridges = self.snapshot.bridges();
        report.problems = self.pipeline.problems().iter().map(ToString::to_string).collect();
        report.problems.extend(self.report.source_problems.iter().map(Problem::to_string));
        report.problems.extend(self.failed.iter().map(|text| format!("tables: {text}")));
        report.problems.extend(self.attach_failed.iter().map(|text| format!("devices: {text}")));
        report.problems.extend(self.sockets_failed.iter().map(|text| format!("sockets: {text}")));
        report.problems.extend(self.ports_failed.iter().map(|text| format!("ports: {text}")));
        report.problems.extend(self.astray_failed.iter().map(|text| format!("connected sockets: {text}")));
        report.problems.extend(self.serve.troubles().iter().map(ToString::to_string));
        report.problems.extend(self.shadowed());
        report.problems.extend(self.kernel.colliding_node_ports(self.pipeline.image().memory()));
        report.problems.extend(self.kernel.problems(&self.snapshot));
        let statistics = self.kernel.statistics();
        report.bpf_calls = statistics.calls;
        report.entries_written = statistics.entries;
        report.bytes_written = statistics.bytes;
        report
    }

    /// ClusterIPs that are addresses of the node, as node-local DNS caches have them: the host has them, not the Service.
    fn shadowed(&self) -> Vec<String> {
        let memory = self.pipeline.image().memory();
        let own = |addr: &Addr| memory.node_addresses.get(addr).is_some_and(|flags| flags & node_flags::LOCAL != 0);
        let refusing = memory.frontends.iter().filter(|(_, frontend)| frontend.flags & frontend_flags::ANY_PORT != 0);
        let shadowed = refusing.map(|(key, _)| key.addr).filter(own);
        shadowed
            .map(|addr| format!("ClusterIP {} is an address of this node and is left to it", IpAddr::from(addr)))
            .collect()
    }

    fn services(&self) -> Vec<ServiceReport> {
        self.pipeline
            .model()
            .services()
            .map(|(name, service)| ServiceReport {
                namespace: name.namespace.to_string(),
                name: name.name.to_string(),
                kind: if service.spec.cluster_ip.as_deref() == Some("None") {
                    "Headless".to_owned()
                } else {
                    service.spec.type_.as_str().to_owned()
                },
                external_name: service.spec.external_name.clone(),
            })
            .collect()
    }
}

/// The families whose plan these writes carry out.
fn families(writes: impl IntoIterator<Item: Borrow<Write>>) -> Vec<Family> {
    let (v4, v6) = writes
        .into_iter()
        .map(|write| write.borrow().families())
        .fold((false, false), |(v4, v6), one| (v4 | one.0, v6 | one.1));
    [(v4, Family::V4), (v6, Family::V6)].into_iter().filter(|(any, _)| *any).map(|(_, family)| family).collect()
}

/// What kube-proxy left would translate before us, or after. It goes as soon as ours is effective, and nobody waits for it:
/// with many Services iptables takes seconds.
fn remove_kube_proxy() -> Result<()> {
    let work = || match kernel::kube_proxy::remove() {
        Ok(removed) if removed.is_empty() => {}
        Ok(removed) => info!(removed = removed.join(", "), "kube-proxy's rules are removed"),
        Err(error) => warn!(error = format!("{error:#}"), "connections may be translated twice"),
    };
    std::thread::Builder::new().name("kube-proxy".to_owned()).spawn(work).context("starting a thread")?;
    Ok(())
}
