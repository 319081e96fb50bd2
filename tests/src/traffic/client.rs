//! The client in a namespace. In: a destination. Out: who answered and whom it saw, or an error kind; each call has a time limit.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::netns::Netns;
use crate::traffic::bytes;
use crate::traffic::socket::{as_timeout, connect_tcp, hear_errors, udp_for};

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// A new connection for every question.
    Tcp,
    /// A new connected socket for every question.
    Udp,
    /// A new socket without connect(2) for every question.
    UdpUnconnected,
}

/// A server's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name of the server.
    pub by: String,
    /// The address that the server saw as the client's.
    pub from: SocketAddr,
}

/// Makes sockets in one namespace.
#[derive(Clone, Debug)]
pub struct Client {
    netns: Netns,
    timeout: Duration,
}

impl Client {
    /// A client that gives up after two seconds.
    pub fn new(netns: &Netns) -> Self {
        Self { netns: netns.clone(), timeout: Duration::from_secs(2) }
    }

    /// The same with another time limit for every step.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Where it is.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A TCP connection.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.netns.run(|| connect_tcp(None, to, self.timeout))
    }

    /// A TCP connection from a chosen address and port.
    pub fn connect_from(&self, source: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
        self.netns.run(|| connect_tcp(Some(source), to, self.timeout))
    }

    /// A UDP socket for talking to `to`, not connected.
    pub fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        self.netns.run(|| udp_for(None, to, self.timeout))
    }

    /// A UDP socket for talking to `to` from a chosen address and port, not connected.
    pub fn udp_from(&self, source: SocketAddr, to: SocketAddr) -> io::Result<UdpSocket> {
        self.netns.run(|| udp_for(Some(source), to, self.timeout))
    }

    /// Asks once from a new socket.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr) -> io::Result<Answer> {
        self.netns.run(|| ask_here(protocol, None, to, self.timeout))
    }

    /// Asks once from a new socket; the time is that of the question alone.
    pub fn ask_timed(&self, protocol: Protocol, to: SocketAddr) -> (Duration, io::Result<Answer>) {
        self.netns.run(|| {
            let start = Instant::now();
            let result = ask_here(protocol, None, to, self.timeout);
            (start.elapsed(), result)
        })
    }

    /// Asks once from a chosen address and port.
    pub fn ask_from(&self, protocol: Protocol, source: SocketAddr, to: SocketAddr) -> io::Result<Answer> {
        self.netns.run(|| ask_here(protocol, Some(source), to, self.timeout))
    }

    /// Asks `times` times, each from a new socket and so from another port; stops at the first error. Every answer is returned.
    pub fn ask_times(&self, protocol: Protocol, to: SocketAddr, times: usize) -> io::Result<Vec<Answer>> {
        self.netns.run(|| (0..times).map(|_| ask_here(protocol, None, to, self.timeout)).collect())
    }

    /// Asks `times` times, each from a new socket; every result is returned, errors too.
    pub fn each(&self, protocol: Protocol, to: SocketAddr, times: usize) -> Vec<io::Result<Answer>> {
        self.netns.run(|| (0..times).map(|_| ask_here(protocol, None, to, self.timeout)).collect())
    }

    /// How often each server answered out of `times` questions.
    pub fn tally(&self, protocol: Protocol, to: SocketAddr, times: usize) -> io::Result<BTreeMap<String, usize>> {
        let mut tally = BTreeMap::new();
        for answer in self.ask_times(protocol, to, times)? {
            *tally.entry(answer.by).or_insert(0) += 1;
        }
        Ok(tally)
    }

    /// Asks until `wanted` holds for an answer or error, for at most `limit`; returns the time it took.
    pub fn ask_until(
        &self,
        protocol: Protocol,
        to: SocketAddr,
        limit: Duration,
        wanted: impl Fn(&io::Result<Answer>) -> bool + Sync,
    ) -> io::Result<Duration> {
        let start = Instant::now();
        self.netns.run(|| {
            loop {
                let result = ask_here(protocol, None, to, self.timeout.min(limit));
                if wanted(&result) {
                    return Ok(start.elapsed());
                }
                if start.elapsed() > limit {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, format!("last: {result:?}")));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    }

    /// Sends `length` bytes in a stream, has the server compare them, and reads as many back, comparing them here.
    pub fn stream(&self, to: SocketAddr, length: u64) -> io::Result<()> {
        let mut stream = self.connect(to)?;
        upload(&mut stream, length, length ^ 1)?;
        download(&mut stream, length, length ^ 2)
    }

    /// Sends `count` requests of `length` bytes over one connection, each echoed and compared.
    pub fn echo(&self, to: SocketAddr, length: usize, count: u64) -> io::Result<()> {
        let mut stream = self.connect(to)?;
        (0..count).try_for_each(|seed| echo_on(&mut stream, length, seed))
    }

    /// Sends `count` datagrams of `length` bytes from one socket, each echoed and compared; one that is lost ends it as a timeout.
    pub fn echo_datagrams(&self, to: SocketAddr, length: usize, count: u64) -> io::Result<()> {
        let socket = self.udp(to)?;
        socket.connect(to)?;
        let (mut sent, mut received) = (vec![0; length], vec![0; 65_536]);
        for seed in 0..count {
            bytes::fill(&mut sent, seed, 0);
            socket.send(&sent)?;
            let got = socket.recv(&mut received).map_err(as_timeout)?;
            if received[..got] != sent {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("datagram {seed} came back changed")));
            }
        }
        Ok(())
    }
}

/// Asks on a connection that is open already.
pub fn ask_on(stream: &mut TcpStream) -> io::Result<Answer> {
    stream.write_all(b"who\n")?;
    let mut line = String::new();
    // One answer at a time is under way, so nothing is lost with the reader's buffer.
    BufReader::new(&*stream).read_line(&mut line).map_err(as_timeout)?;
    parse(&line)
}

/// Asks from a UDP socket, connected or not; an answer from another address than `to` is an error.
pub fn ask_datagram(socket: &UdpSocket, to: SocketAddr) -> io::Result<Answer> {
    let mut datagram = [0; 256];
    let length = if socket.peer_addr().is_ok() {
        socket.send(b"who")?;
        socket.recv(&mut datagram).map_err(as_timeout)?
    } else {
        socket.send_to(b"who", to)?;
        let (length, from) = socket.recv_from(&mut datagram).map_err(as_timeout)?;
        if from != to {
            let text = format!("asked {to}, answered by {from}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        length
    };
    parse(&String::from_utf8_lossy(&datagram[..length]))
}

/// One echoed request on an open connection.
pub fn echo_on(stream: &mut TcpStream, length: usize, seed: u64) -> io::Result<()> {
    let mut block = vec![0; length];
    bytes::fill(&mut block, seed, 0);
    stream.write_all(format!("echo {length}\n").as_bytes())?;
    stream.write_all(&block)?;
    bytes::check(stream, length as u64, seed).map_err(as_timeout)
}

/// Sends a stream that the server compares.
pub fn upload(stream: &mut TcpStream, length: u64, seed: u64) -> io::Result<()> {
    stream.write_all(format!("sum {length} {seed}\n").as_bytes())?;
    bytes::send(stream, length, seed)?;
    let mut line = String::new();
    BufReader::new(&*stream).read_line(&mut line).map_err(as_timeout)?;
    if line.trim() == "ok" { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, line)) }
}

/// Receives a stream and compares it.
pub fn download(stream: &mut (impl Read + Write), length: u64, seed: u64) -> io::Result<()> {
    stream.write_all(format!("give {length} {seed}\n").as_bytes())?;
    bytes::check(stream, length, seed).map_err(as_timeout)
}

fn ask_here(protocol: Protocol, source: Option<SocketAddr>, to: SocketAddr, timeout: Duration) -> io::Result<Answer> {
    match protocol {
        Protocol::Tcp => ask_on(&mut connect_tcp(source, to, timeout)?),
        Protocol::Udp => {
            let socket = udp_for(source, to, timeout)?;
            socket.connect(to)?;
            ask_datagram(&socket, to)
        }
        Protocol::UdpUnconnected => {
            let socket = udp_for(source, to, timeout)?;
            hear_errors(&socket)?;
            ask_datagram(&socket, to)
        }
    }
}

fn parse(line: &str) -> io::Result<Answer> {
    let bad = || io::Error::new(io::ErrorKind::UnexpectedEof, format!("not an answer: {line:?}"));
    let (by, from) = line.trim().split_once(' ').ok_or_else(bad)?;
    Ok(Answer { by: by.to_owned(), from: from.parse().map_err(|_| bad())? })
}
