//! What kube-proxy lists and watches, served over HTTP by this process: for numbers of objects, and of changes a second, that a real
//! API server on a small machine doesn't reach. In: objects as JSON. Out: lists, streamed lists, watches. Never here: storage, access
//! control, validation; what has to do with those is tried with a [`crate::ControlPlane`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::iter;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::control_plane::PORT;
use crate::lab::Lab;
use crate::topology::SWITCH_V4;

/// How soon a thread notices that all is over.
const TICK: Duration = Duration::from_millis(50);

/// Resources by plural, with their kind and version.
const RESOURCES: [(&str, &str, &str); 4] = [
    ("services", "Service", "v1"),
    ("endpointslices", "EndpointSlice", "discovery.k8s.io/v1"),
    ("nodes", "Node", "v1"),
    ("servicecidrs", "ServiceCIDR", "networking.k8s.io/v1"),
];

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct WatchServer {
    kubeconfig: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    over: AtomicBool,
    /// How many connections there were, and up to which they are mute.
    connections: AtomicUsize,
    mute: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    resources: BTreeMap<&'static str, Resource>,
}

#[derive(Debug, Default)]
struct Resource {
    objects: BTreeMap<String, Arc<str>>,
    /// What watches were told, by the version that it led to.
    history: Vec<(u64, Arc<str>)>,
    watches: Vec<Sender<Arc<str>>>,
}

impl WatchServer {
    /// Starts it where a control plane would be, with a Node object for each node.
    pub fn start(lab: &Lab) -> Result<Self> {
        let address = SocketAddr::from((SWITCH_V4, PORT));
        let listener =
            lab.switch.run(|| TcpListener::bind(address)).with_context(|| format!("listening at {address}"))?;
        listener.set_nonblocking(true)?;
        let kubeconfig = lab.folder().join("watch-server.kubeconfig");
        let text = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "proxy", "user": {}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "proxy"}}],
            "current-context": "lab",
        });
        fs::write(&kubeconfig, text.to_string()).context("writing a kubeconfig")?;
        let server = Self { kubeconfig, shared: Arc::new(Shared::default()) };
        lab.nodes.iter().for_each(|node| server.put(crate::manifest::node_object(node)));
        let shared = server.shared.clone();
        thread::spawn(move || accept(&listener, &shared));
        Ok(server)
    }

    /// The kubeconfig that leads to it.
    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    /// From now on nothing is sent on the connections that there are and on those that come, which stay open.
    pub fn go_mute(&self) {
        self.shared.mute.store(usize::MAX, Ordering::Relaxed);
    }

    /// Speaks again on connections that come; those that there are stay mute.
    pub fn speak_again(&self) {
        self.shared.mute.store(self.connections(), Ordering::Relaxed);
    }

    /// How many connections were made to it.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Creates or replaces an object, and tells whoever watches.
    pub fn put(&self, object: impl Into<Value>) {
        self.shared.state().put(object.into());
    }

    /// Deletes an object by resource, namespace and name, and tells whoever watches.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        self.shared.state().delete(resource, &format!("{namespace}/{name}"));
    }
}

impl Drop for WatchServer {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits as long as nothing may be sent on a connection; says whether there will ever be.
    fn may_speak(&self, connection: usize) -> bool {
        while connection <= self.mute.load(Ordering::Relaxed) {
            if self.is_over() {
                return false;
            }
            thread::sleep(TICK);
        }
        true
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

impl State {
    fn put(&mut self, mut object: Value) {
        let kind = object["kind"].as_str().unwrap_or_default();
        let Some((plural, _, _)) = RESOURCES.into_iter().find(|(_, name, _)| *name == kind) else {
            panic!("no such resource is served: {object}");
        };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let metadata = &object["metadata"];
        let [namespace, name] = ["namespace", "name"].map(|field| metadata[field].as_str().unwrap_or_default());
        let (key, text) = (format!("{namespace}/{name}"), Arc::from(object.to_string()));
        let resource = self.resources.entry(plural).or_default();
        let old = resource.objects.insert(key, Arc::clone(&text));
        resource.tell(self.version, if old.is_some() { "MODIFIED" } else { "ADDED" }, &text);
    }

    fn delete(&mut self, plural: &str, key: &str) {
        self.version += 1;
        if let Some(resource) = self.resources.get_mut(plural)
            && let Some(text) = resource.objects.remove(key)
        {
            resource.tell(self.version, "DELETED", &text);
        }
    }

    fn list(&self, plural: &str, kind: &str, version: &str) -> String {
        let objects: Vec<&str> =
            self.resources.get(plural).into_iter().flat_map(|of| of.objects.values().map(AsRef::as_ref)).collect();
        format!(
            "{{\"kind\":\"{kind}List\",\"apiVersion\":\"{version}\",\"metadata\":{{\"resourceVersion\":\"{}\"}},\"items\":[{}]}}",
            self.version,
            objects.join(",")
        )
    }

    /// A new watch, with what it is told first.
    fn watch(&mut self, plural: &'static str, kind: &str, version: &str, query: &str) -> (String, Receiver<Arc<str>>) {
        let (sender, receiver) = channel();
        let now = self.version;
        let resource = self.resources.entry(plural).or_default();
        let mut first = String::new();
        if query.contains("sendInitialEvents=true") {
            resource.objects.values().for_each(|object| first += &line("ADDED", object));
            let end = json!({"kind": kind, "apiVersion": version, "metadata": {"resourceVersion": now.to_string(),
                "annotations": {"k8s.io/initial-events-end": "true"}}});
            first += &line("BOOKMARK", &end.to_string());
        } else {
            let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse::<u64>().ok());
            let missed = resource.history.iter().filter(|(version, _)| *version > from.unwrap_or(now));
            missed.for_each(|(_, line)| first += line);
        }
        resource.watches.push(sender);
        (first, receiver)
    }
}

impl Resource {
    fn tell(&mut self, version: u64, what: &str, object: &str) {
        let line: Arc<str> = line(what, object).into();
        self.history.push((version, Arc::clone(&line)));
        self.watches.retain(|watch| watch.send(Arc::clone(&line)).is_ok());
    }
}

fn line(what: &str, object: &str) -> String {
    format!("{{\"type\":\"{what}\",\"object\":{object}}}\n")
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.is_over() {
        match listener.accept() {
            Ok((stream, _)) => {
                let shared = Arc::clone(shared);
                // Whoever closes a connection ends its thread; nobody waits for either.
                let number = shared.connections.fetch_add(1, Ordering::Relaxed) + 1;
                thread::spawn(move || serve(stream, number, &shared));
            }
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn serve(stream: TcpStream, number: usize, shared: &Shared) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line == "\r\n" {
                break;
            }
            head.push(line.trim_end().to_owned());
        }
        let length = head.iter().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
        });
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body)?;
        if !shared.may_speak(number) {
            return Ok(());
        }
        let mut words = head.first().map(String::as_str).unwrap_or_default().split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let found = RESOURCES.into_iter().find(|(plural, ..)| path.ends_with(&format!("/{plural}")));
        match found {
            // Events.
            _ if method != "GET" => answer(&mut stream, 201, &body)?,
            Some((plural, kind, version)) if query.contains("watch=true") || query.contains("watch=1") => {
                let (first, lines) = shared.state().watch(plural, kind, version, query);
                return stream_lines(&mut stream, &first, &lines, (number, shared));
            }
            Some((plural, kind, version)) => {
                let list = shared.state().list(plural, kind, version);
                answer(&mut stream, 200, list.as_bytes())?;
            }
            None => {
                let one = path.rsplit_once("/nodes/").and_then(|(_, name)| {
                    shared.state().resources.get("nodes")?.objects.get(&format!("/{name}")).cloned()
                });
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "reason": "NotFound", "message": "no such path", "code": 404});
                match one {
                    Some(object) => answer(&mut stream, 200, object.as_bytes())?,
                    None => answer(&mut stream, 404, status.to_string().as_bytes())?,
                }
            }
        }
    }
}

fn answer(stream: &mut TcpStream, code: u16, body: &[u8]) -> io::Result<()> {
    let head =
        format!("HTTP/1.1 {code} Answer\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

fn stream_lines(
    stream: &mut TcpStream,
    first: &str,
    lines: &Receiver<Arc<str>>,
    (number, shared): (usize, &Shared),
) -> io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 Answer\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    let mut chunk = |text: &str| {
        if text.is_empty() { Ok(()) } else { stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()) }
    };
    chunk(first)?;
    while !shared.is_over() {
        match lines.recv_timeout(TICK) {
            Ok(_) if !shared.may_speak(number) => break,
            // As the real one: what waits goes out together.
            Ok(line) => {
                chunk(&iter::once(line).chain(lines.try_iter()).map(|line| line.to_string()).collect::<String>())?
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}
