//! A cluster to which things happen at random: objects change, while agents, the API server and devices go and come. In: for how long,
//! a seed. Out: an error with whatever is wrong: a connection to an endpoint that lasts failed, a frontend is not as the naive model of
//! the specification has it when all is quiet again, or something is left over.

mod askers;
mod events;
mod judge;
mod leaks;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::askers::Asked;
use self::events::Events;
use self::judge::Judgement;
use crate::cluster::{TARGET, web};
use crate::control_plane::ControlPlane;
use crate::kube_proxy::CLUSTER_CIDR;
use crate::lab::Lab;
use crate::manifest::PodObject;
use crate::topology::Topology;
use crate::{Agent, Server};

/// Pods of each node; the first lasts, the others come and go.
const PODS: u8 = 3;

/// How long controllers and agents may take, once all is quiet, to have things as they should be.
const SETTLED: Duration = Duration::from_secs(60);

/// How much happens.
#[derive(Clone, Debug)]
pub struct Options {
    /// For how long.
    pub length: Duration,
    /// What happens follows from it; when it happens does not.
    pub seed: u64,
    /// The agent's binary, as in [`Topology`].
    pub binary: Option<std::path::PathBuf>,
}

/// What there was, where nothing was wrong.
#[derive(Clone, Debug)]
pub struct Report {
    /// What happened, by name, and how often.
    pub events: Vec<(&'static str, u32)>,
    /// Connections and datagrams that were answered.
    pub answered: u64,
    /// Packets whose fate was compared at the end.
    pub compared: usize,
    /// Those of them that go to an endpoint.
    pub forwarded: usize,
}

/// A lab with a control plane and an agent on each node; what needs others ends before them.
pub(crate) struct World {
    agents: Vec<Agent>,
    _servers: Vec<Server>,
    plane: ControlPlane,
    lab: Lab,
}

/// Says that it is over, also where what happens panics: the askers wait for it.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Lets it happen. `say` hears how it goes; `go_on` is asked before each thing that happens, and its error ends it all.
///
/// # Errors
///
/// What is wrong in the end, with the seed; or why nothing could be tried.
pub fn run(options: &Options, say: impl Fn(&str), go_on: impl Fn() -> Result<()>) -> Result<Report> {
    let seed = options.seed;
    let mut world = World::build(options)?;
    let before = leaks::Picture::of(&world)?;
    say("everything is up");
    let over = AtomicBool::new(false);
    let askers = askers::of(&world.lab)?;
    let (events, asked) = thread::scope(|scope| -> Result<_> {
        let running: Vec<_> = askers.into_iter().map(|asker| scope.spawn(|| asker.run(&over))).collect();
        let events = {
            let _ends = Ends(&over);
            happen(&mut world, options, &say, &go_on)
        };
        let mut asked = Asked::default();
        for asker in running {
            asked.add(asker.join().map_err(|_| anyhow::anyhow!("an asker panicked"))?);
        }
        Ok((events.with_context(|| format!("seed {seed}"))?, asked))
    })?;
    let failed = asked.failed.iter().take(5);
    let failed: Vec<_> = failed.map(|(when, what)| format!("{what}{}", events.around(*when))).collect();
    ensure!(
        asked.failed.is_empty(),
        "seed {seed}: of {} questions to endpoints that last, {} failed:\n{}\n{}",
        asked.answered,
        asked.failed.len(),
        failed.join("\n"),
        world.dropped()
    );
    let events = events.counts();
    say("all is quiet; every frontend is looked at");
    let judgement = world.until_settled().with_context(|| format!("seed {seed}: {events:?}"))?;
    events::remove_all(&world.plane.api());
    before.until_again(&world).with_context(|| format!("seed {seed}: {events:?}"))?;
    Ok(Report { events, answered: asked.answered, compared: judgement.compared, forwarded: judgement.forwarded })
}

fn happen(
    world: &mut World,
    options: &Options,
    say: &impl Fn(&str),
    go_on: &impl Fn() -> Result<()>,
) -> Result<Events> {
    let mut events = Events::new(options.seed);
    let start = Instant::now();
    let mut told = start;
    while start.elapsed() < options.length {
        go_on()?;
        events.next(world)?;
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            say(&format!("{} of {} s: {}", start.elapsed().as_secs(), options.length.as_secs(), events.told()));
        }
    }
    events.calm(world)?;
    Ok(events)
}

impl World {
    fn build(options: &Options) -> Result<Self> {
        let lab = Lab::build(Topology { pods_per_node: PODS, binary: options.binary.clone(), ..Topology::default() })?;
        let servers = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
        let plane = ControlPlane::build(&lab)?;
        let api = plane.api();
        api.put(web());
        for pod in lab.pods() {
            let app = if events::lasts(pod) { "web" } else { events::APPS[0] };
            api.put(PodObject::of(pod).label("app", app));
        }
        let kubeconfig = plane.kubeconfig("proxy");
        let flags = [format!("--cluster-cidr={CLUSTER_CIDR}"), "--detect-local-mode=ClusterCIDR".to_owned()];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut agents = Vec::new();
        for node in &lab.nodes {
            agents.push(Agent::build(&lab, node, &kubeconfig, &flags)?);
        }
        let world = Self { agents, _servers: servers, plane, lab };
        world.until_settled()?;
        Ok(world)
    }

    /// What each node did with packets, for who looks for a lost one.
    fn dropped(&self) -> String {
        let counts = self.agents.iter().map(|agent| agent.cli_json(&["status"])["packets"].to_string());
        counts.collect::<Vec<_>>().join("\n")
    }

    /// Waits until every frontend of every node is as the model has it, and says what was compared.
    fn until_settled(&self) -> Result<Judgement> {
        let start = Instant::now();
        loop {
            let judgement = judge::compare(self)?;
            let Judgement { compared, wrong, .. } = &judgement;
            if wrong.is_empty() {
                return Ok(judgement);
            }
            ensure!(
                start.elapsed() < SETTLED,
                "{} of {compared} packets have another fate than the model says:\n{}",
                wrong.len(),
                wrong.iter().take(5).cloned().collect::<Vec<_>>().join("\n")
            );
            thread::sleep(Duration::from_millis(500));
        }
    }
}
