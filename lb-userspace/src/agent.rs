//! The agent: waits for changes of the cluster and of the node, and carries them to the kernel.
//!
//! In: a source's updates, devices and addresses, signals, questions on a socket. Out: writes and attachments. This is the
//! only place that knows of time; what a change means is decided in `plan`.

mod answer;
pub mod door;
mod failure;
pub mod report;

use std::{
    borrow::Borrow,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Error, Result, bail};
use lb_common::memory::Memory;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant as TokioInstant, sleep_until},
};
use tracing::{debug, error, info, warn};

use self::{
    door::Door,
    failure::Failure,
    report::{LastChange, Report},
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
    source::{Place, Source, Update, api::Requests},
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
    /// Whether the tables in the kernel may differ from the image; then nothing is written but a whole image.
    failed: bool,
    writing: Failure,
    attaching: Failure,
    attaching_sockets: Failure,
    reserving_ports: Failure,
    ending_sockets: Failure,
    /// Whether kube-proxy's rules are still to be looked for.
    succeeds_kube_proxy: bool,
    /// Where nothing was attached at the start: until when older connections may exist.
    leaves_mid_flow: Option<u32>,
    /// Whether TCP connections are reset when their endpoint is gone.
    terminates: bool,
    alarm: TokioInstant,
    /// When to look for sockets that the last changes have led astray.
    look: Option<TokioInstant>,
    start: Instant,
    birth: SystemTime,
    report: Report,
    serve: Serve,
    events: Events,
    /// Whether this node is gone where it has no Node object: a folder of manifests need not have one, but one that it had is gone.
    needs_node: bool,
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
            failed: false,
            writing: Failure::default(),
            attaching: Failure::default(),
            attaching_sockets: Failure::default(),
            reserving_ports: Failure::default(),
            ending_sockets: Failure::default(),
            succeeds_kube_proxy: true,
            leaves_mid_flow,
            terminates: options.kernel.terminate_connections,
            alarm: TokioInstant::now() + EXPIRY_INTERVAL,
            look: None,
            start: Instant::now(),
            birth: SystemTime::now(),
            report,
            serve,
            events,
            taken: None,
            full: true,
            needs_node: matches!(options.source, Place::ApiServer(_)),
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

    /// Takes in what is left of the source's first list, writes the difference to what is pinned, and attaches.
    ///
    /// # Errors
    ///
    /// When the kernel has no tables for us, or refuses the programs: trying again would not help.
    fn begin(&mut self, update: Update, snapshot: &Snapshot) -> Result<()> {
        let changes = update.changes.len();
        debug!(changes, milliseconds = self.milliseconds(), "the first list is read");
        self.take_in(update);
        self.kernel.prepare(&Expected::of(self.pipeline.model()))?;
        self.begun = true;
        self.note_eligible();
        self.pipeline.compact_model();
        self.set_devices(snapshot);
        self.compile_first();
        self.kernel.verified()?;
        self.attach_devices();
        self.attach_sockets();
        if let Err(error) = self.kernel.reserve_ports()
            && let Some(error) = self.reserving_ports.news(&error)
        {
            warn!("{error}");
        }
        // The first list takes much more than what stays of it, and never comes again.
        self.pipeline.compact();
        kernel::release_memory();
        self.events.record(Happening {
            service: None,
            warning: false,
            reason: "Starting",
            action: "StartKubeProxy",
            note: String::new(),
        });
        if self.failed {
            return Ok(());
        }
        self.become_ready();
        info!(
            services = self.pipeline.model().count(Kind::Service),
            frontends = self.pipeline.image().memory().frontends.len(),
            devices = self.snapshot.ports().len(),
            milliseconds = self.milliseconds(),
            "ready"
        );
        Ok(())
    }

    /// The tables are as they should be, for the first time or again.
    fn become_ready(&mut self) {
        self.report.ready = true;
        if std::mem::take(&mut self.succeeds_kube_proxy) {
            remove_kube_proxy();
        }
    }

    fn attach_sockets(&mut self) {
        match self.kernel.attach_sockets() {
            Ok(()) => {
                self.attaching_sockets.ends();
                // Some may have connected while no programs were there.
                self.look = Some(TokioInstant::now());
            }
            Err(error) => {
                if let Some(error) = self.attaching_sockets.news(&error) {
                    error!(error, "clients on the node itself are not served; trying again");
                }
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
            // What comes before the first list is complete waits for the rest of that, which is not late (kube-proxy's proxiers queue
            // nothing before they are initialized): starting again would not bring it sooner.
            if self.pipeline.take(change) && self.begun {
                self.serve.health().taken(now);
            }
        }
        self.note_eligible();
        for problem in &problems {
            if !self.report.source_problems.contains(problem) {
                warn!("{problem}");
            }
        }
        self.report.source_problems = problems;
        self.report.skipped = skipped;
    }

    /// Whether load balancers may send new connections here: not before there is anything to send them on by (kube-proxy doesn't even
    /// listen before its Node is there), and not where the Node is gone.
    fn note_eligible(&mut self) {
        let node = self.pipeline.model().node();
        self.needs_node |= node.is_some();
        let eligible = node.map_or(!self.needs_node, Node::is_eligible);
        self.serve.health().set_eligible(self.begun && eligible);
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
            Ok(()) => self.attaching.ends(),
            Err(error) => {
                if let Some(error) = self.attaching.news(&error) {
                    error!(error, "a device has no programs; trying again");
                }
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
        self.full = self.failed;
        self.taken = None;
        self.publish();
        debug!(milliseconds = self.milliseconds(), "written");
        if writes != 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.report.last_change = Some(LastChange {
                at: now.as_secs(),
                at_microseconds: now.subsec_micros(),
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
        if self.failed {
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
        if writes.is_empty() || self.failed {
            return;
        }
        let result = self.kernel.apply(writes);
        self.end_write(result, &families, begin);
        if !self.failed && self.look.is_none() && self.kernel.concerns_sockets(writes, self.pipeline.image().memory()) {
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
            self.fail(&error.context("the tables could not be written"));
            return;
        }
        self.serve.health().updated(families, Moment::now());
        self.serve.metrics().synced(families, self.taken.unwrap_or(begin.counted).elapsed(), self.full);
    }

    /// The tables may differ from the image, until a try succeeds.
    fn fail(&mut self, error: &Error) {
        if let Some(error) = self.writing.news(error) {
            error!(error, "Services are served as they were; trying again");
        }
        self.failed = true;
        self.report.ready = false;
        self.alarm = TokioInstant::now() + RETRY;
    }

    fn end_sockets(&mut self) {
        self.look = None;
        match self.kernel.end_sockets_astray(self.pipeline.image().memory()) {
            Ok(sockets) => {
                self.ending_sockets.ends();
                if sockets != 0 {
                    info!(
                        sockets,
                        "connected sockets were ended: what they were connected to is gone or has become a Service's"
                    );
                }
            }
            Err(error) => {
                if let Some(error) = self.ending_sockets.news(&error) {
                    warn!(error, "connected sockets may go on to speak to endpoints that are gone");
                }
            }
        }
    }

    /// What is due: another try after a failure, else old bits.
    fn wake(&mut self) {
        self.alarm = TokioInstant::now() + EXPIRY_INTERVAL;
        let now = self.now();
        if self.failed {
            match self.kernel.memory() {
                Ok(memory) => {
                    self.failed = false;
                    self.full = true;
                    self.pipeline.restart(Image::restore(memory, now));
                    self.rows_of = None;
                    self.compile();
                    let writes = self.pipeline.sweep(now);
                    self.write(&writes);
                    if !self.failed {
                        self.serve.health().updated(&Family::ALL, Moment::now());
                        self.look = Some(TokioInstant::now());
                        self.writing.ends();
                        self.become_ready();
                        info!("the tables are as they should be again");
                    }
                }
                Err(error) => self.fail(&error.context("the tables can't be read")),
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
fn remove_kube_proxy() {
    let work = || match kernel::kube_proxy::remove() {
        Ok(removed) if removed.is_empty() => {}
        Ok(removed) => info!(removed = removed.join(", "), "kube-proxy's rules are removed"),
        Err(error) => warn!(error = format!("{error:#}"), "connections may be translated twice"),
    };
    if let Err(error) = std::thread::Builder::new().name("kube-proxy".to_owned()).spawn(work) {
        warn!(%error, "there is no thread that looks for kube-proxy's rules; connections may be translated twice");
    }
}
