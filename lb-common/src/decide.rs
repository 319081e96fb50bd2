//! The whole policy: what happens to a packet that starts a connection.
//!
//! [`decide`] answers for one packet; [`classify`] answers for every packet that asks the same [`Question`], without
//! choosing: `fairlead explain` lists what may be chosen. Packets of known connections never come here
//! (source: `kube-proxy.md` §3).

use crate::{
    addr::{Addr, Port},
    affinity::{Affinity, AffinityKey, Wanted},
    layout::{Endpoint, Frontend, FrontendKey, NodeAddress, Range, endpoint_flags, frontend_flags, node_flags},
    reason::Reason,
    tables::Tables,
};

/// What a decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The packet's source address; [`node_client`](crate::affinity::node_client) for a socket that is not bound.
    pub src: Addr,
    /// The packet's destination address.
    pub dst: Addr,
    /// The packet's destination port.
    pub dport: Port,
    /// IP protocol number.
    pub proto: u8,
    /// Whether a process of the node itself sends it.
    pub from_node: bool,
    /// ifindex of the device it came by; 0 for processes of the node.
    pub device: u32,
}

impl Question {
    /// Nothing is asked.
    pub const NONE: Self = Self {
        src: Addr::UNSPECIFIED_V6,
        dst: Addr::UNSPECIFIED_V6,
        dport: Port::ZERO,
        proto: 0,
        from_node: false,
        device: 0,
    };
}

/// The answer before an endpoint is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// One endpoint of the range gets it.
    Forward(Forward),
    /// It is refused at once.
    Reject(Reason),
    /// It is dropped.
    Drop(Reason),
    /// It is not ours.
    Pass(Reason),
}

/// Where a packet may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Slots of the endpoints that may be chosen; never empty.
    pub range: Range,
    /// Id of the Service port.
    pub service: u32,
    /// Flags of the frontend ([`frontend_flags`]).
    pub flags: u32,
    /// Whether the source is rewritten, whichever endpoint is chosen (but see [`Forward::masquerades`]).
    pub masquerade: bool,
    /// Seconds for which a client stays with its endpoint; 0: it doesn't.
    pub affinity: u32,
    /// The bit of [`endpoint_flags`] that the endpoints of the range have, where there is affinity.
    pub eligible: u16,
}

impl Forward {
    /// What is asked of an endpoint that is remembered of a client.
    #[must_use]
    #[inline(always)]
    pub const fn wanted(&self) -> Wanted {
        Wanted { service: self.service, timeout: self.affinity, eligible: self.eligible }
    }

    /// Whether the source is rewritten on the way to this endpoint: also where a pod reaches itself (M8).
    #[must_use]
    #[inline(always)]
    pub const fn masquerades(&self, src: &Addr, endpoint: &Endpoint) -> bool {
        let kept = self.flags & frontend_flags::PRESERVE_LOCAL != 0 && endpoint.flags & endpoint_flags::LOCAL != 0;
        self.masquerade && !kept || endpoint.addr.same(src)
    }
}

/// The answer, with an endpoint chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The destination becomes this endpoint.
    Forward(Choice),
    /// It is refused at once.
    Reject(Reason),
    /// It is dropped.
    Drop(Reason),
    /// It is not ours.
    Pass(Reason),
}

/// A chosen endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its id.
    pub id: u32,
    /// What the id stands for.
    pub endpoint: Endpoint,
    /// Id of the Service port.
    pub service: u32,
    /// Flags of the frontend ([`frontend_flags`]).
    pub flags: u32,
    /// Whether the source is rewritten.
    pub masquerade: bool,
    /// Whether the client stays with it: to be remembered once the connection begins.
    pub affinity: bool,
}

/// What happens to a packet that starts a connection: `client` goes where it went last, if the Service wants that, else `hash`
/// picks among the endpoints that may be chosen.
#[inline(always)]
pub fn decide<T: Tables>(question: &Question, client: &Addr, hash: u32, tables: &T) -> Decision {
    match classify(question, tables) {
        Class::Forward(forward) => match choose(&forward, client, hash, tables) {
            Some((id, endpoint)) => Decision::Forward(Choice {
                id,
                endpoint: *endpoint,
                service: forward.service,
                flags: forward.flags,
                masquerade: forward.masquerades(&question.src, endpoint),
                affinity: forward.affinity != 0,
            }),
            None => Decision::Drop(Reason::Internal),
        },
        Class::Reject(reason) => Decision::Reject(reason),
        Class::Drop(reason) => Decision::Drop(reason),
        Class::Pass(reason) => Decision::Pass(reason),
    }
}

/// So often a question is asked anew whose frontend was replaced meanwhile.
const AGAIN: u32 = 2;

/// What happens to packets that ask this question.
///
/// Since Linux 6.1 (`bpf_mem_alloc`) a freed element of a hash table is given to the next entry at once, also while a program
/// reads it: what was read counts only if the entry is still the same one behind it.
#[inline(always)]
pub fn classify<T: Tables>(question: &Question, tables: &T) -> Class {
    let mut asked = 0;
    loop {
        let mut key = FrontendKey::new(question.dst, question.dport, question.proto);
        let frontend = find_by(&mut key, &question.dst, question.dport, tables);
        let class = class_of(question, frontend, tables);
        asked += 1;
        let Some(frontend) = frontend else { return class };
        if asked > AGAIN || tables.frontend(&key).is_some_and(|now| core::ptr::eq(now, frontend)) {
            return class;
        }
        // At the end of the function, so that older kernels follow the loop (`xtask/src/loops.rs`).
        core::hint::cold_path();
    }
}

#[inline(always)]
fn class_of<T: Tables>(question: &Question, frontend: Option<&Frontend>, tables: &T) -> Class {
    let Question { src, dst, from_node, device, .. } = question;
    let Some(frontend) = frontend else {
        return if tables.in_service_cidr(dst) {
            Class::Drop(Reason::Unallocated)
        } else {
            Class::Pass(Reason::NotService)
        };
    };
    let Frontend { internal, external, service, flags, affinity } = *frontend;
    // What comes by a device and claims to be for localhost is left to the stack, which drops it (CVE-2020-8558).
    if flags & frontend_flags::NODE_PORT != 0 && !from_node && dst.is_loopback() {
        return Class::Pass(Reason::OwnAddress);
    }
    // A node-local DNS cache has the ClusterIP of the Service that it stands before.
    if flags & (frontend_flags::CLUSTER_IP | frontend_flags::ANY_PORT) != 0
        && tables.node_address(dst) & node_flags::LOCAL != 0
    {
        return Class::Pass(Reason::OwnAddress);
    }
    if flags & frontend_flags::ANY_PORT != 0 {
        return Class::Reject(Reason::UnknownPort);
    }
    // Before anything else, also for a frontend without endpoints (nftables' order, `kube-proxy.md` §3).
    if flags & frontend_flags::SOURCE_RANGES != 0 && !tables.in_source_ranges(service, src) {
        return Class::Drop(Reason::SourceRange);
    }
    let mut masquerade = flags & frontend_flags::MASQUERADE != 0;
    let mut inside = true;
    if flags & frontend_flags::EXTERNAL_LOCAL != 0 {
        if tables.is_local_source(src, *device) {
            masquerade = false;
        } else {
            inside = *from_node || tables.node_address(src) & node_flags::LOCAL != 0;
            masquerade = inside;
        }
    } else if flags & frontend_flags::MASQUERADE_UNDETECTED != 0 {
        masquerade |= !tables.is_local_source(src, *device);
    }
    let (range, drops) =
        if inside { (internal, frontend_flags::INTERNAL_DROP) } else { (external, frontend_flags::EXTERNAL_DROP) };
    if range.len == 0 {
        return if flags & drops != 0 {
            Class::Drop(Reason::NoLocalEndpoints)
        } else {
            Class::Reject(Reason::NoEndpoints)
        };
    }
    let local = !inside || flags & frontend_flags::INTERNAL_LOCAL != 0;
    let eligible = if local { endpoint_flags::IN_LOCAL } else { endpoint_flags::IN_CLUSTER };
    Class::Forward(Forward { range, service, flags, masquerade, affinity, eligible })
}

#[inline(always)]
fn choose<'a, T: Tables>(forward: &Forward, client: &Addr, hash: u32, tables: &'a T) -> Option<(u32, &'a Endpoint)> {
    if forward.affinity != 0
        && let Some(affinity) = last(client, forward.service, tables)
        && stays(affinity, &forward.wanted(), tables)
        && let Some(endpoint) = tables.endpoint(affinity.endpoint_id)
    {
        return Some((affinity.endpoint_id, endpoint));
    }
    select(&forward.range, hash, tables)
}

/// What is remembered of a client. (Two functions, for the stack's sake: `open` leaves 32 bytes to each.)
#[inline(never)]
fn last<'a, T: Tables>(client: &Addr, service: u32, tables: &'a T) -> Option<&'a Affinity> {
    let key = AffinityKey { client: *client, service };
    // Each of the client's connections replaces it: as for frontends.
    tables.affinity(&key).or_else(|| tables.affinity(&key))
}

/// Whether a client goes where it went last.
#[inline(never)]
fn stays<T: Tables>(affinity: &Affinity, wanted: &Wanted, tables: &T) -> bool {
    let Some(endpoint) = tables.endpoint(affinity.endpoint_id) else { return false };
    affinity.holds(endpoint, wanted, tables.ticks())
}

/// The frontend that a packet is sent to: of its address, else of the NodePort, else of any port of the address.
#[inline(always)]
pub fn find<'a, T: Tables>(dst: &Addr, dport: Port, proto: u8, tables: &'a T) -> Option<&'a Frontend> {
    find_by(&mut FrontendKey::new(*dst, dport, proto), dst, dport, tables)
}

/// The same; `key` becomes what was found by. One key for all three look-ups, for the stack's sake.
#[inline(always)]
fn find_by<'a, T: Tables>(key: &mut FrontendKey, dst: &Addr, dport: Port, tables: &'a T) -> Option<&'a Frontend> {
    if tables.may_be_frontend(dst, dport)
        && let Some(frontend) = look(key, tables)
    {
        return Some(frontend);
    }
    key.addr = dst.unspecified();
    if tables.may_be_frontend(&key.addr, dport)
        && node_address(dst, tables) & node_flags::NODE_PORTS != 0
        && let Some(frontend) = look(key, tables)
    {
        return Some(frontend);
    }
    if !tables.may_be_frontend(dst, Port::ZERO) {
        return None;
    }
    *key = FrontendKey::any_port(*dst);
    look(key, tables)
}

/// What an address is to the node. All of `127.0.0.0/8` is its own (routing table `local`), although hardly one is on an interface.
#[inline(always)]
fn node_address<T: Tables>(addr: &Addr, tables: &T) -> NodeAddress {
    let flags = tables.node_address(addr);
    if flags == 0 && addr.is_v4() && addr.is_loopback() {
        return tables.node_address(&Addr::LOOPBACK_NET_V4);
    }
    flags
}

/// A frontend, which is not there only if it is missed twice. The kernel replaces an element of a hash table by putting the new one in front
/// of its bucket and then taking the old one out (`htab_map_update_elem`): who is between the two in the bucket sees neither.
#[inline(always)]
fn look<'a, T: Tables>(key: &FrontendKey, tables: &'a T) -> Option<&'a Frontend> {
    tables.frontend(key).or_else(|| tables.frontend(key))
}

/// The endpoint of a range that a hash picks, with its id.
#[inline(always)]
pub fn select<'a, T: Tables>(range: &Range, hash: u32, tables: &'a T) -> Option<(u32, &'a Endpoint)> {
    let index = range.offset.wrapping_add(hash.checked_rem(range.len)?);
    let id = tables.slot(index)?;
    Some((id, tables.endpoint(id)?))
}

#[cfg(test)]
mod tests {
    use core::{cell::Cell, net::SocketAddr};

    use super::*;
    use crate::{
        layout::{bit_index, protocol},
        memory::Memory,
    };

    /// Tables in which a frontend's element becomes another entry's, time and again, while it is read, or is missed by one look-up.
    struct Reused {
        tables: Memory,
        elements: [Frontend; 2],
        reuses: u32,
        missed: Option<u32>,
        found: Cell<u32>,
        given: Option<(AffinityKey, Affinity)>,
    }

    impl Tables for Reused {
        fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
            let found = self.found.replace(self.found.get() + 1);
            if self.missed == Some(found) {
                return None;
            }
            if found < self.reuses { self.elements.get(found as usize % 2) } else { self.tables.frontend(key) }
        }
        fn may_be_frontend(&self, addr: &Addr, port: Port) -> bool {
            self.tables.may_be_frontend(addr, port)
        }
        fn may_be_endpoint(&self, addr: &Addr, port: Port) -> bool {
            self.tables.may_be_endpoint(addr, port)
        }
        fn slot(&self, index: u32) -> Option<u32> {
            self.tables.slot(index)
        }
        fn endpoint(&self, id: u32) -> Option<&Endpoint> {
            self.tables.endpoint(id)
        }
        fn node_address(&self, addr: &Addr) -> NodeAddress {
            self.tables.node_address(addr)
        }
        fn is_local_source(&self, addr: &Addr, device: u32) -> bool {
            self.tables.is_local_source(addr, device)
        }
        fn in_source_ranges(&self, service: u32, addr: &Addr) -> bool {
            self.tables.in_source_ranges(service, addr)
        }
        fn in_service_cidr(&self, addr: &Addr) -> bool {
            self.tables.in_service_cidr(addr)
        }
        fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
            let found = self.found.replace(self.found.get() + 1);
            let (given_to, given) = self.given.as_ref()?;
            (self.missed != Some(found) && given_to == key).then_some(given)
        }
        fn ticks(&self) -> u32 {
            self.tables.ticks()
        }
    }

    #[test]
    fn a_frontend_whose_element_became_anothers_is_looked_up_again() {
        let element =
            |service| Frontend { internal: Range { offset: service, len: 1 }, service, ..Frontend::default() };
        for service in ["10.96.0.10:80", "[fd00:96::10]:80"] {
            let service: SocketAddr = service.parse().unwrap();
            for proto in [protocol::TCP, protocol::UDP] {
                let (dst, dport) = (service.ip().into(), Port::new(service.port()));
                let mut tables = Memory::default();
                tables.frontend_bits.insert(bit_index(&dst, dport));
                tables.frontends.insert(FrontendKey::new(dst, dport, proto), element(1));
                let question = Question { dst, dport, proto, ..Question::NONE };
                for reuses in 0..=2 * AGAIN {
                    let (tables, elements) = (tables.clone(), [element(8), element(9)]);
                    let reused = Reused { tables, elements, reuses, missed: None, found: Cell::new(0), given: None };
                    let Class::Forward(forward) = classify(&question, &reused) else { panic!("{question:?}") };
                    assert_eq!((forward.service, forward.range.offset), (1, 1), "{service}, {reuses} times");
                }
            }
        }
    }

    #[test]
    fn a_frontend_that_a_look_up_misses_while_it_is_replaced_is_there_and_so_is_what_refuses_other_ports() {
        for service in ["10.96.0.10:80", "[fd00:96::10]:80"] {
            let service: SocketAddr = service.parse().unwrap();
            let (dst, dport) = (service.ip().into(), Port::new(service.port()));
            let mut tables = Memory::default();
            tables.frontend_bits.extend([bit_index(&dst, dport), bit_index(&dst, Port::ZERO)]);
            let any = Frontend { flags: frontend_flags::ANY_PORT, ..Frontend::default() };
            tables.frontends.insert(FrontendKey::any_port(dst), any);
            let one = Frontend { internal: Range { offset: 0, len: 1 }, ..Frontend::default() };
            tables.frontends.insert(FrontendKey::new(dst, dport, protocol::TCP), one);
            for (dport, is_served) in [(dport, true), (Port::new(81), false)] {
                let question = Question { dst, dport, proto: protocol::TCP, ..Question::NONE };
                for missed in (0..4).map(Some).chain([None]) {
                    let elements = [Frontend::default(); 2];
                    let tables = Reused {
                        tables: tables.clone(),
                        elements,
                        reuses: 0,
                        missed,
                        found: Cell::new(0),
                        given: None,
                    };
                    let class = classify(&question, &tables);
                    let is_right =
                        if is_served { matches!(class, Class::Forward(_)) } else { matches!(class, Class::Reject(_)) };
                    assert!(is_right, "{service}, {missed:?}: {class:?}");
                }
            }
        }
    }

    #[test]
    fn what_a_client_was_given_last_is_there_also_where_a_look_up_misses_it_while_it_is_replaced() {
        let client: SocketAddr = "10.0.0.1:1".parse().unwrap();
        let client = Addr::from(client.ip());
        let given = Some((AffinityKey { client, service: 3 }, Affinity { endpoint_id: 5, generation: 1, seen: 0 }));
        for missed in [None, Some(0)] {
            let elements = [Frontend::default(); 2];
            let tables = Reused { tables: Memory::default(), elements, reuses: 0, missed, found: Cell::new(0), given };
            assert_eq!(last(&client, 3, &tables).map(|given| given.endpoint_id), Some(5), "{missed:?}");
            tables.found.set(0);
            assert!(last(&client, 4, &tables).is_none());
        }
    }
}
