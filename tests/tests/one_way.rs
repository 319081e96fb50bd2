//! Senders of datagrams that never stop, never change their port and hear nothing: whatever happens to the Service, what they send gets
//! to an endpoint that is one, and to nobody else.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster};
use tests::manifest::{PodObject, Service};
use tests::traffic::socket::udp_for;
use tests::{Netns, Topology};

/// Where endpoints listen, and answer nothing.
const PORT: u16 = 9091;
/// The number of the Service, and that of its second ClusterIP.
const NUMBERS: [u16; 2] = [31, 32];
const NODE_PORT: u16 = 30_031;
const SOON: Duration = Duration::from_secs(3);
/// In this time every sender sends some twenty datagrams.
const A_WHILE: Duration = Duration::from_millis(60);

/// How many datagrams of each sender came to each endpoint.
type Arrivals = BTreeMap<String, BTreeMap<String, u32>>;

/// A thread that stops when it is dropped.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(netns: &Netns, work: impl FnOnce(&AtomicBool) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Self { stop, thread: Some(netns.spawn(move || work(&stopped))) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || matches!(result, Some(Ok(()))), "a worker ended early");
    }
}

/// Receives at one address of a pod.
fn sink(netns: &Netns, name: &str, address: SocketAddr, arrivals: &Arc<Mutex<Arrivals>>) -> Worker {
    let socket = netns.run(|| UdpSocket::bind(address)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let (name, arrivals) = (name.to_owned(), Arc::clone(arrivals));
    Worker::start(netns, move |stop| {
        let mut datagram = [0; 64];
        while !stop.load(Ordering::Relaxed) {
            let Ok((length, _)) = socket.recv_from(&mut datagram) else { continue };
            let sender = String::from_utf8_lossy(&datagram[..length]).into_owned();
            *arrivals.lock().unwrap().entry(sender).or_default().entry(name.clone()).or_default() += 1;
        }
    })
}

/// A sender and where it sends to.
struct Sender {
    name: String,
    by: By,
    family: usize,
    to: Arc<Mutex<SocketAddr>>,
    _worker: Worker,
}

impl Sender {
    fn start(netns: &Netns, name: &str, by: By, family: usize, connects: bool) -> Self {
        let to = Arc::new(Mutex::new(address(by, family, 0)));
        let name = format!("{name}, IPv{}{}", [4, 6][family], if connects { ", connected" } else { "" });
        let (aim, marker) = (Arc::clone(&to), name.clone());
        let worker = Worker::start(netns, move |stop| {
            let mut to = *aim.lock().unwrap();
            // Chosen, so that the kernel leaves it to a socket that is ended.
            let any = if to.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0_u16; 8]) };
            // An IPv6 socket has the IPv4 port, too.
            let port = if to.is_ipv4() { 43_000 } else { 43_002 } + u16::from(connects);
            let socket = udp_for(Some((any, port).into()), to, SOON).unwrap();
            if connects {
                socket.connect(to).unwrap();
            }
            while !stop.load(Ordering::Relaxed) {
                let aim = *aim.lock().unwrap();
                if connects {
                    // As a process does that was told of an error, or of another address.
                    if socket.send(marker.as_bytes()).is_err() || to != aim {
                        let _ = socket.connect(aim);
                    }
                } else {
                    // Refusals are errors of sendto(2), and no reason to stop.
                    let _ = socket.send_to(marker.as_bytes(), aim);
                }
                to = aim;
                thread::sleep(Duration::from_millis(3));
            }
            assert_eq!(socket.local_addr().unwrap().port(), port, "{marker}");
        });
        Self { name, by, family, to, _worker: worker }
    }

    fn aim(&self, number: usize) {
        *self.to.lock().unwrap() = address(self.by, self.family, number);
    }
}

fn address(by: By, family: usize, number: usize) -> SocketAddr {
    match by {
        By::NodePort(_) => SocketAddr::new(by.addresses(0)[family].ip(), NODE_PORT),
        By::ClusterIp | By::LoadBalancer => by.addresses(NUMBERS[number])[family],
    }
}

fn service(number: usize) -> Service {
    Service::new("one-way")
        .selector("app", "sink")
        .dual_stack(NUMBERS[number])
        .node_port("udp", "UDP", 80, PORT, NODE_PORT)
}

struct Stage {
    cluster: Cluster,
    /// The two pods that may be endpoints: their nodes and numbers.
    pods: [(u8, u8); 2],
    senders: Vec<Sender>,
    arrivals: Arc<Mutex<Arrivals>>,
    _sinks: Vec<Worker>,
}

impl Stage {
    fn new(topology: Topology, pods: [(u8, u8); 2], flags: &[&str]) -> Self {
        let cluster = Cluster::new(Topology { cni_rules: true, ..topology }, flags, |lab| {
            for pod in lab.pods() {
                lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", "parked"));
            }
        });
        let lab = &cluster.lab;
        let arrivals = Arc::default();
        let sinks = pods
            .into_iter()
            .map(|(node, pod)| lab.pod(node, pod))
            .flat_map(|pod| {
                let addresses = [IpAddr::from(pod.v4), pod.v6.into()];
                addresses.map(|address| sink(&pod.netns, &pod.name, (address, PORT).into(), &arrivals))
            })
            .collect();
        let (pod, node) = (&lab.pod(1, 1).netns, &lab.node(1).netns);
        let senders = [
            (pod, "a pod", By::ClusterIp, false),
            (pod, "a pod", By::ClusterIp, true),
            (node, "the node", By::ClusterIp, false),
            (node, "the node", By::ClusterIp, true),
            (&lab.outside, "outside", By::NodePort(1), false),
            (&lab.outside, "outside", By::NodePort(1), true),
        ]
        .into_iter()
        .flat_map(|(netns, name, by, connects)| [0, 1].map(|family| Sender::start(netns, name, by, family, connects)))
        .collect();
        Self { cluster, pods, senders, arrivals, _sinks: sinks }
    }

    fn label(&self, endpoints: &[(u8, u8)]) {
        for (node, pod) in self.pods {
            self.cluster.relabel(node, pod, if endpoints.contains(&(node, pod)) { "sink" } else { "parked" });
        }
    }

    /// What arrives in a while.
    fn look(&self) -> Arrivals {
        self.arrivals.lock().unwrap().clear();
        thread::sleep(A_WHILE);
        self.arrivals.lock().unwrap().clone()
    }

    /// Waits until the datagrams of every sender for which `wanted` holds come to one of these endpoints each, and those of the others
    /// to none.
    fn expect(&self, what: &str, endpoints: &[&str], wanted: impl Fn(&Sender) -> bool) {
        let start = Instant::now();
        loop {
            let arrivals = self.look();
            let wrong: Vec<String> = self
                .senders
                .iter()
                .filter_map(|sender| {
                    let at: BTreeSet<&str> =
                        arrivals.get(&sender.name).into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                    let right = if wanted(sender) {
                        at.len() == 1 && at.iter().all(|name| endpoints.contains(name))
                    } else {
                        at.is_empty()
                    };
                    (!right).then(|| format!("{}: at {at:?}", sender.name))
                })
                .collect();
            if wrong.is_empty() {
                return;
            }
            assert!(start.elapsed() < SOON, "{what}:\n{}", wrong.join("\n"));
        }
    }
}

#[test]
fn a_sender_that_never_stops_reaches_endpoints_that_are_there_and_no_others() {
    // One node where sockets of all namespaces are served: the processes of a lab are in one cgroup, and a second agent would take
    // them for its own.
    let alone = Topology { nodes: 1, pods_per_node: 3, ..Topology::default() };
    for (topology, pods, flags) in
        [(Topology::default(), [(1, 2), (2, 1)], &[][..]), (alone, [(1, 2), (1, 3)], &["--socket-lb", "all"])]
    {
        let mut stage = Stage::new(topology, pods, flags);
        let manifests = stage.cluster.lab.manifests();
        let (everyone, nobody) = (|_: &Sender| true, |_: &Sender| false);
        let [one, two] = pods.map(|(node, pod)| format!("p{node}-{pod}"));
        let (one, two) = (one.as_str(), two.as_str());
        stage.expect("nothing is there yet", &[], nobody);
        manifests.write("service.json", service(0));
        stage.expect("a Service without endpoints", &[], nobody);
        stage.label(&pods);
        stage.expect("endpoints came", &[one, two], everyone);
        for (kept, endpoint) in [(pods[0], one), (pods[1], two), (pods[0], one)] {
            stage.label(&[kept]);
            stage.expect("an endpoint went", &[endpoint], everyone);
            stage.label(&pods);
            stage.expect("it came back", &[endpoint], everyone);
        }
        stage.label(&[]);
        stage.expect("scaled to zero", &[], nobody);
        stage.label(&[pods[1]]);
        stage.expect("scaled to one", &[two], everyone);
        stage.cluster.agents[0].kill();
        stage.expect("without an agent", &[two], everyone);
        stage.label(&pods);
        stage.cluster.agents[0].restart();
        stage.expect("restarted", &[two], everyone);
        manifests.remove("service.json");
        stage.expect("deleted", &[], nobody);
        manifests.write("service.json", service(0));
        stage.expect("recreated", &[one, two], everyone);
        manifests.remove("service.json");
        stage.expect("deleted again", &[], nobody);
        manifests.write("service.json", service(1));
        let stays = |sender: &Sender| matches!(sender.by, By::NodePort(_));
        stage.expect("recreated with another address", &[one, two], stays);
        stage.senders.iter().for_each(|sender| sender.aim(1));
        stage.expect("by the other address", &[one, two], everyone);
        // Without a gap between the two.
        manifests.write("service.json", service(0));
        stage.senders.iter().for_each(|sender| sender.aim(0));
        stage.expect("by the first address", &[one, two], everyone);
    }
}
