//! The server of a pod. In: a namespace, a name, addresses. Out: answers to the protocol in [`super`], until it is dropped.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;
use crate::traffic::bytes;

/// The longest request that is echoed at once.
const ECHO_LIMIT: u64 = 16 * 1024 * 1024;

/// Running servers on some addresses; they end on drop, connections included.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<TcpListener>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    stop: AtomicBool,
    next: AtomicU64,
    served: AtomicU64,
    connections: Mutex<BTreeMap<u64, TcpStream>>,
}

impl Server {
    /// Serves TCP and UDP on all of `addresses`, from when this returns.
    pub fn start(netns: &Netns, name: &str, addresses: &[SocketAddr]) -> Result<Self> {
        let mut server = Self::idle(name);
        for address in addresses {
            server.add_tcp(netns, *address)?;
            server.add_udp(netns, *address)?;
        }
        Ok(server)
    }

    /// Serves TCP only.
    pub fn tcp(netns: &Netns, name: &str, address: SocketAddr) -> Result<Self> {
        let mut server = Self::idle(name);
        server.add_tcp(netns, address)?;
        Ok(server)
    }

    /// Serves UDP only.
    pub fn udp(netns: &Netns, name: &str, address: SocketAddr) -> Result<Self> {
        let mut server = Self::idle(name);
        server.add_udp(netns, address)?;
        Ok(server)
    }

    /// How many TCP connections were accepted and datagrams received.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }

    /// How many TCP connections are open, as far as it knows.
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn idle(name: &str) -> Self {
        let shared = Shared {
            name: name.to_owned(),
            stop: AtomicBool::new(false),
            next: AtomicU64::new(0),
            served: AtomicU64::new(0),
            connections: Mutex::new(BTreeMap::new()),
        };
        Self { shared: Arc::new(shared), listeners: Vec::new(), threads: Vec::new() }
    }

    fn add_tcp(&mut self, netns: &Netns, address: SocketAddr) -> Result<()> {
        let listener =
            netns.run(|| TcpListener::bind(address)).with_context(|| format!("listening on {address} over TCP"))?;
        let shared = Arc::clone(&self.shared);
        self.listeners.push(listener.try_clone()?);
        self.threads.push(netns.spawn(move || accept(&shared, &listener)));
        Ok(())
    }

    fn add_udp(&mut self, netns: &Netns, address: SocketAddr) -> Result<()> {
        let socket =
            netns.run(|| UdpSocket::bind(address)).with_context(|| format!("listening on {address} over UDP"))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let shared = Arc::clone(&self.shared);
        self.threads.push(netns.spawn(move || answer_datagrams(&shared, &socket)));
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for listener in &self.listeners {
            // Wakes the thread in accept(2).
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        let connections = std::mem::take(&mut *self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner));
        for stream in connections.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    while let Ok((stream, peer)) = listener.accept() {
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        shared.served.fetch_add(1, Ordering::Relaxed);
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        if let Ok(copy) = stream.try_clone() {
            shared.connections.lock().unwrap_or_else(PoisonError::into_inner).insert(id, copy);
        }
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            // A client that goes away in the middle is the client's to report.
            let _ = converse(&shared.name, stream, peer);
            shared.connections.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
    }
}

fn converse(name: &str, mut stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(64 * 1024, stream.try_clone()?);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        match words.first().copied() {
            Some("who") => stream.write_all(format!("{name} {peer}\n").as_bytes())?,
            Some("echo") => {
                let mut block = vec![0; usize::try_from(number(1).min(ECHO_LIMIT)).unwrap_or(0)];
                reader.read_exact(&mut block)?;
                stream.write_all(&block)?;
            }
            Some("sum") => {
                let text = match bytes::check(&mut reader, number(1), number(2)) {
                    Ok(()) => "ok\n".to_owned(),
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => format!("{error}\n"),
                    Err(error) => return Err(error),
                };
                stream.write_all(text.as_bytes())?;
            }
            Some("give") => bytes::send(&mut stream, number(1), number(2))?,
            Some("GET") => {
                let body = format!("{name} {peer}\n");
                let head = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n";
                stream.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes())?;
                return Ok(());
            }
            _ => return Ok(()),
        }
    }
}

fn answer_datagrams(shared: &Shared, socket: &UdpSocket) {
    let mut datagram = vec![0; 65_536];
    while !shared.stop.load(Ordering::Relaxed) {
        // A time limit and an ICMP error about an earlier answer are the same here: go on.
        let Ok((length, peer)) = socket.recv_from(&mut datagram) else { continue };
        shared.served.fetch_add(1, Ordering::Relaxed);
        let _ = if datagram[..length].trim_ascii() == b"who" {
            socket.send_to(format!("{} {peer}\n", shared.name).as_bytes(), peer)
        } else {
            socket.send_to(&datagram[..length], peer)
        };
    }
}
