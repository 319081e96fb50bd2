//! Frames for comparing the two halves: fresh ones to what is a Service and what is not, answers to what became of earlier ones, ICMP
//! errors about them, fragments, odd headers, cut and broken bytes. In: a seed. Out: frames; the same seed makes the same ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::parse::{Headers, Part, parse};

/// The node's address, by which it masquerades.
pub const NODE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 11));
/// The same for IPv6.
pub const NODE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x11));

/// Which program looks at a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Into the host.
    In,
    /// Out of it.
    Out,
}

/// The causes that every run must have met.
pub const CAUSES: &[&str] = &[
    "unreadable",
    "new_flow",
    "established",
    "mid_flow",
    "mid_flow_foreign",
    "reply",
    "masqueraded",
    "masquerade_reply",
    "icmp_error",
    "no_endpoints",
    "unknown_port",
    "no_local_endpoints",
    "source_range",
    "unallocated",
    "mid_flow_no_endpoints",
    "fragment_without_first",
];

/// What the tables are filled from.
pub const MANIFESTS: &str = include_str!("cluster.yaml");

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
const SCTP: u8 = 132;

const FRONTENDS_V4: [(&str, u16); 12] = [
    ("10.96.0.10", 80),
    ("10.96.0.10", 81),
    ("10.96.0.10", 53),
    ("10.99.0.11", 30_080),
    ("10.99.1.10", 80),
    ("10.96.0.11", 80),
    ("10.99.0.11", 30_081),
    ("10.99.1.12", 80),
    ("10.99.1.13", 80),
    ("10.96.0.77", 80),
    ("10.244.1.11", 8080),
    ("192.0.2.1", 443),
];
const FRONTENDS_V6: [(&str, u16); 12] = [
    ("fd00:10:96::a", 80),
    ("fd00:10:96::a", 81),
    ("fd00:10:96::a", 53),
    ("fd00:99::11", 30_080),
    ("fd00:99:1::a", 80),
    ("fd00:10:96::b", 80),
    ("fd00:99::11", 30_081),
    ("fd00:99:1::c", 80),
    ("fd00:99:1::d", 80),
    ("fd00:10:96::4d", 80),
    ("fd00:10:244:1::11", 8080),
    ("2001:db8::1", 443),
];
const CLIENTS: [[&str; 4]; 2] = [
    ["10.244.1.7", "10.244.1.11", "198.51.100.9", "10.99.0.11"],
    ["fd00:10:244:1::7", "fd00:10:244:1::11", "2001:db8:9::9", "fd00:99::11"],
];

/// Makes frames.
pub struct Frames {
    state: u64,
    /// Frames of which something became, newest last.
    history: Vec<(Way, Vec<u8>)>,
    /// Frames that are to come next, such as later fragments.
    waiting: Vec<(Way, Vec<u8>)>,
}

/// What a packet says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Who sends it.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// IP protocol number.
    pub proto: u8,
}

impl Frames {
    /// The sequence that a seed names.
    pub fn new(seed: u64) -> Self {
        Self { state: seed | 1, history: Vec::new(), waiting: Vec::new() }
    }

    /// What became of a frame: it goes on to the other program, is answered, provokes errors.
    pub fn became(&mut self, way: Way, before: Vec<u8>, after: Vec<u8>) {
        if way == Way::In && self.chance(70) {
            self.waiting.push((Way::Out, after.clone()));
        }
        if self.history.len() == 200 {
            self.history.remove(0);
        }
        let kept = if self.chance(20) { before } else { after };
        self.history.push((way, kept));
    }

    /// The next frame, addressed to the device: whose it is, the host's half doesn't decide.
    pub fn next(&mut self) -> (Way, Vec<u8>) {
        let (way, mut frame) = self.any();
        frame[..6].fill(0);
        (way, frame)
    }

    fn any(&mut self) -> (Way, Vec<u8>) {
        if let Some(frame) = self.waiting.pop() {
            return frame;
        }
        let (way, mut frame) = match self.below(10) {
            0..4 => (Way::In, self.fresh()),
            4..7 => (Way::In, self.answer()),
            7 => (if self.chance(70) { Way::In } else { Way::Out }, self.error()),
            8 => self.again(),
            _ => {
                let way = if self.chance(80) { Way::In } else { Way::Out };
                let fragments = self.fragments();
                for fragment in fragments {
                    self.waiting.push((way, fragment));
                }
                return self.any();
            }
        };
        match self.below(12) {
            0 => {
                // BPF_PROG_TEST_RUN wants an IP header at least.
                let least = if frame[12] == 0x08 { 34 } else { 54 };
                let length = least + self.below(frame.len().saturating_sub(least).max(1));
                frame.truncate(length);
            }
            1 => {
                let at = 14 + self.below(frame.len().saturating_sub(14).max(1));
                let value = self.random() as u8;
                if let Some(byte) = frame.get_mut(at) {
                    *byte = value;
                }
            }
            _ => {}
        }
        (way, frame)
    }

    /// xorshift64* (Vigna, 2016).
    fn random(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.random() % limit as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// A packet of a client to something.
    fn fresh(&mut self) -> Vec<u8> {
        let ends = self.ends();
        let segment = self.segment(&ends, None);
        self.packet(&ends, segment)
    }

    fn ends(&mut self) -> Ends {
        let v6 = self.chance(50);
        let (to, port) = if v6 { FRONTENDS_V6 } else { FRONTENDS_V4 }[self.below(12)];
        let from = CLIENTS[usize::from(v6)][self.below(4)];
        let from_port = 40_000 + self.below(40) as u16;
        let proto = match self.below(20) {
            0..9 => TCP,
            9..17 => UDP,
            17 => SCTP,
            18 => {
                if v6 {
                    58
                } else {
                    1
                }
            }
            _ => 47,
        };
        Ends {
            from: SocketAddr::new(from.parse().unwrap(), from_port),
            to: SocketAddr::new(to.parse().unwrap(), port),
            proto,
        }
    }

    /// An answer to an earlier frame, as that is by now.
    fn answer(&mut self) -> Vec<u8> {
        let Some(ends) = self.earlier() else { return self.fresh() };
        let ends = Ends { from: ends.to, to: ends.from, proto: ends.proto };
        let flags = [0x12, 0x10, 0x18, 0x11, 0x14, 0x04, 0x02][self.below(7)];
        let segment = self.segment(&ends, Some(flags));
        self.packet(&ends, segment)
    }

    /// An earlier frame, once more.
    fn again(&mut self) -> (Way, Vec<u8>) {
        if self.history.is_empty() {
            return (Way::In, self.fresh());
        }
        let index = self.below(self.history.len());
        let (way, frame) = self.history[index].clone();
        if self.chance(30) {
            return (way, frame);
        }
        // Further on in the same connection.
        match ends_of(&frame) {
            Some(ends) => {
                let segment = self.segment(&ends, Some(0x10));
                (way, self.packet(&ends, segment))
            }
            None => (way, frame),
        }
    }

    /// An ICMP error about an earlier frame.
    fn error(&mut self) -> Vec<u8> {
        let index = self.below(self.history.len().max(1));
        let Some((_, frame)) = self.history.get(index) else { return self.fresh() };
        let frame = frame.clone();
        let Some(Ends { from, to, .. }) = ends_of(&frame) else { return self.fresh() };
        let v6 = from.is_ipv6();
        let router: IpAddr = if v6 { "2001:db8:ff::1" } else { "203.0.113.1" }.parse().unwrap();
        let source = if self.chance(40) { to.ip() } else { router };
        let room = [28, 40, 60, 200, 1200][self.below(5)];
        let quote = &frame[14..frame.len().min(14 + room)];
        let (kind, code) = if v6 {
            [(1, 4), (2, 0), (3, 0), (4, 0), (137, 0), (128, 0)][self.below(6)]
        } else {
            [(3, 3), (3, 4), (11, 0), (12, 0), (5, 1), (8, 0)][self.below(6)]
        };
        let mut message = vec![kind, code, 0, 0, 0, 0, 0x05, 0x14];
        message.extend_from_slice(quote);
        let ends = Ends { from: (source, 0).into(), to: (from.ip(), 0).into(), proto: if v6 { 58 } else { 1 } };
        let pseudo = if v6 { pseudo_header(&ends, message.len()) } else { Vec::new() };
        let sum = checksum(&[&pseudo, &message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        self.packet(&ends, message)
    }

    /// Fragments of one datagram, last first, sometimes in the wrong order or without the first.
    fn fragments(&mut self) -> Vec<Vec<u8>> {
        let ends = if self.chance(40) {
            match self.earlier() {
                Some(ends) if self.chance(50) => Ends { from: ends.to, to: ends.from, proto: ends.proto },
                Some(ends) => ends,
                None => self.ends(),
            }
        } else {
            self.ends()
        };
        let segment = self.segment(&ends, None);
        let cut = (segment.len() / 2).next_multiple_of(8).min(segment.len());
        let id = self.random() as u32 & 0xffff;
        let (first, second) = segment.split_at(cut);
        let mut frames = vec![fragment(&ends, id, cut as u16, false, second), fragment(&ends, id, 0, true, first)];
        match self.below(5) {
            0 => frames.reverse(),
            1 => frames.truncate(1),
            _ => {}
        }
        frames
    }

    fn earlier(&mut self) -> Option<Ends> {
        let index = self.below(self.history.len().max(1));
        ends_of(&self.history.get(index)?.1)
    }

    /// A transport header and data with a right checksum, or none where UDP allows that.
    fn segment(&mut self, ends: &Ends, flags: Option<u8>) -> Vec<u8> {
        let length = [0, 1, 7, 32, 333, 1000][self.below(6)];
        let data: Vec<u8> = (0..length).map(|_| self.random() as u8).collect();
        let ports = [ends.from.port(), ends.to.port()].map(u16::to_be_bytes).concat();
        let (mut segment, at) = match ends.proto {
            TCP => {
                let flags = flags.unwrap_or_else(|| [0x02, 0x02, 0x02, 0x10, 0x18, 0x11, 0x04, 0xc2][self.below(8)]);
                let options = self.below(4) * 4;
                let mut header = ports;
                header.extend_from_slice(&(self.random() as u32).to_be_bytes());
                header.extend_from_slice(&(self.random() as u32).to_be_bytes());
                header.extend_from_slice(&[(((20 + options) / 4) << 4) as u8, flags, 0xff, 0, 0, 0, 0, 0]);
                header.extend(std::iter::repeat_n(1, options));
                (header, 16)
            }
            UDP => {
                let mut header = ports;
                header.extend_from_slice(&(8 + length as u16).to_be_bytes());
                header.extend_from_slice(&[0, 0]);
                (header, 6)
            }
            SCTP => (ports.into_iter().chain([0, 0, 0, 1, 1, 2, 3, 4]).collect(), usize::MAX),
            1 => (vec![8, 0, 0, 0, 1, 2, 3, 4], usize::MAX),
            58 => (vec![[128, 128, 135, 136][self.below(4)], 0, 0, 0, 1, 2, 3, 4], usize::MAX),
            _ => (vec![0; 4], usize::MAX),
        };
        segment.extend(data);
        let without = ends.proto == UDP && ends.from.is_ipv4() && self.chance(10);
        if at < segment.len() && !without {
            let sum = checksum(&[&pseudo_header(ends, segment.len()), &segment]);
            let sum = if sum == 0 { 0xffff } else { sum };
            segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        segment
    }

    /// The frame of a whole packet, now and then with options or extension headers.
    fn packet(&mut self, ends: &Ends, payload: Vec<u8>) -> Vec<u8> {
        if ends.from.is_ipv4() {
            let options = if self.chance(10) { self.below(11) * 4 } else { 0 };
            return v4(ends, 0x4000, 7, options, &payload);
        }
        let mut next = ends.proto;
        let mut headers = Vec::new();
        let count = if self.chance(15) { 1 + self.below(8) } else { 0 };
        for _ in 0..count {
            let kind = [0, 60, 43, 51, 44][self.below(5)];
            let extra = self.below(3);
            let mut header = match kind {
                44 => vec![next, 0, 0, 0, 0, 0, 0, 9],
                51 => vec![next, (extra * 2) as u8, 0, 0, 0, 0, 0, 0],
                _ => vec![next, extra as u8, 0, 0, 0, 0, 0, 0],
            };
            if kind != 44 {
                header.extend(std::iter::repeat_n(0, extra * 8));
            }
            header.extend(headers);
            headers = header;
            next = kind;
        }
        headers.extend(payload);
        v6(ends, next, &headers)
    }
}

pub fn ends_of(frame: &[u8]) -> Option<Ends> {
    let mut headers = Headers::NONE;
    let v6 = match frame.get(12..14)? {
        [0x08, 0x00] => false,
        [0x86, 0xdd] => true,
        _ => return None,
    };
    parse(&frame.to_vec(), 14, v6, &mut headers)?;
    if !matches!(headers.part, Part::Whole) {
        return None;
    }
    let from = SocketAddr::new(headers.src.into(), headers.sport.number());
    Some(Ends { from, to: SocketAddr::new(headers.dst.into(), headers.dport.number()), proto: headers.proto })
}

fn ethernet(v6: bool) -> Vec<u8> {
    let mut frame = vec![0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1];
    frame.extend_from_slice(if v6 { &[0x86, 0xdd] } else { &[0x08, 0x00] });
    frame
}

pub fn v4(ends: &Ends, fragment: u16, id: u16, options: usize, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![(0x45 + options / 4) as u8, 0];
    for word in [(20 + options + payload.len()) as u16, id, fragment] {
        header.extend_from_slice(&word.to_be_bytes());
    }
    header.extend_from_slice(&[64, ends.proto, 0, 0]);
    header.extend(octets(ends.from.ip()));
    header.extend(octets(ends.to.ip()));
    header.extend(std::iter::repeat_n(1, options));
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [ethernet(false), header, payload.to_vec()].concat()
}

pub fn v6(ends: &Ends, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    header.extend_from_slice(&[next, 64]);
    header.extend(octets(ends.from.ip()));
    header.extend(octets(ends.to.ip()));
    [ethernet(true), header, payload.to_vec()].concat()
}

pub fn fragment(ends: &Ends, id: u32, offset: u16, more: bool, part: &[u8]) -> Vec<u8> {
    if ends.from.is_ipv4() {
        return v4(ends, (offset / 8) | (u16::from(more) << 13), id as u16, 0, part);
    }
    let mut payload = vec![ends.proto, 0];
    payload.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
    payload.extend_from_slice(&id.to_be_bytes());
    payload.extend_from_slice(part);
    v6(ends, 44, &payload)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub fn pseudo_header(ends: &Ends, length: usize) -> Vec<u8> {
    let mut header = octets(ends.from.ip());
    header.extend(octets(ends.to.ip()));
    header.extend_from_slice(&(length as u32).to_be_bytes());
    header.extend_from_slice(&[0, 0, 0, ends.proto]);
    header
}

pub fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
