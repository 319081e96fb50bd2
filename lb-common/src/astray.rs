//! Connected sockets that speak to nobody any more: no hook sees their packets again.
//!
//! In: where a socket's packets go and what it was told. Out: whether only its end helps, so that the process connects
//! anew. Used by the agent alone.

use crate::{
    decide::{Class, Question, classify},
    layout::protocol,
    socket::{Ends, Pair, Pairs, holds},
    tables::Tables,
};

/// What is wrong with a connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Astray {
    /// It was sent to an endpoint that is gone, or no longer that of the address which it connected to.
    EndpointGone,
    /// It connected to a frontend before that was there, or before the hooks were.
    Untranslated,
}

/// What is wrong with a socket whose packets go to `peer`. `pairs`: what it was told. `by_packets`: something on the way
/// translates what its packets say, as happens to a pod's.
#[must_use]
pub fn astray<T: Tables>(peer: &Ends, pairs: Option<&Pairs>, by_packets: bool, tables: &T) -> Option<Astray> {
    if let Some(pair) = pairs.and_then(|pairs| told(peer, pairs)) {
        // kube-proxy's connections outlive the frontend that they were made by.
        let right = if peer.proto == protocol::TCP {
            tables.endpoint(pair.endpoint_id).is_some_and(|endpoint| endpoint.serves(pair.generation))
        } else {
            holds(pair, peer.proto, tables)
        };
        return (!right).then_some(Astray::EndpointGone);
    }
    // TCP to a frontend that nobody translated is another's connection, or conntrack's.
    if by_packets || peer.proto != protocol::UDP {
        return None;
    }
    let question =
        Question { src: peer.addr, dst: peer.addr, dport: peer.port, proto: peer.proto, from_node: true, device: 0 };
    match classify(&question, tables) {
        Class::Forward(_) | Class::Reject(_) => Some(Astray::Untranslated),
        Class::Drop(_) | Class::Pass(_) => None,
    }
}

/// The pair by which a socket got its peer: the one used last.
fn told<'a>(peer: &Ends, pairs: &'a Pairs) -> Option<&'a Pair> {
    let used = pairs.pairs.iter().filter(|pair| pair.used != 0);
    let same = used.filter(|pair| pair.endpoint_port == peer.port && pair.endpoint == peer.addr);
    same.max_by_key(|pair| pair.used)
}

#[cfg(test)]
mod tests {
    use core::net::SocketAddr;

    use super::*;
    use crate::{
        addr::{Addr, Port},
        layout::{Endpoint, Frontend, FrontendKey, Range, bit_index, endpoint_flags, frontend_flags, node_flags},
        memory::{Machine, Memory},
        socket::{PAIRS, translate},
    };

    const NEW: Pairs = Pairs { pairs: [Pair::NONE; PAIRS], uses: 0, next: 0 };

    fn ends(text: &str, proto: u8) -> Ends {
        let addr: SocketAddr = text.parse().unwrap();
        Ends { addr: addr.ip().into(), port: Port::new(addr.port()), proto }
    }

    fn memory(frontend: &str, endpoint: Option<&str>, flags: u32) -> Memory {
        let mut memory = Memory::default();
        let len = u32::from(endpoint.is_some());
        if let Some(endpoint) = endpoint {
            let Ends { addr, port, .. } = ends(endpoint, protocol::UDP);
            let value = Endpoint { addr, port, flags: endpoint_flags::SERVING, service: 1, generation: 3 };
            memory.endpoints.insert(1, value);
            memory.slots.insert(1, 1);
        }
        let range = Range { offset: 1, len };
        for proto in [protocol::TCP, protocol::UDP] {
            let Ends { addr, port, .. } = ends(frontend, proto);
            memory.frontends.insert(
                FrontendKey::new(addr, port, proto),
                Frontend { internal: range, external: range, service: 1, flags, affinity: 0 },
            );
            memory.frontend_bits.insert(bit_index(&addr, port));
        }
        memory
    }

    fn machine(memory: &Memory) -> Machine {
        Machine { tables: memory.clone(), ..Machine::default() }
    }

    #[test]
    fn a_socket_is_astray_once_its_endpoint_is_gone() {
        for [service, endpoint] in [["10.96.0.10:53", "10.244.1.1:53"], ["[fd00:96::10]:53", "[fd00::1]:53"]] {
            for proto in [protocol::TCP, protocol::UDP] {
                let mut memory = memory(service, Some(endpoint), 0);
                let (mut pairs, mut peer) = (NEW, ends(service, proto));
                translate(&mut peer, &Addr::UNSPECIFIED_V6, true, 0, true, &mut pairs, &mut machine(&memory));
                assert_eq!(peer, ends(endpoint, proto));
                assert_eq!(astray(&peer, Some(&pairs), false, &memory), None);
                // Whoever connected to the endpoint by its own address is left alone, whatever becomes of it.
                assert_eq!(astray(&peer, None, false, &memory), None);
                memory.endpoints.get_mut(&1).unwrap().flags = 0;
                assert_eq!(astray(&peer, Some(&pairs), false, &memory), Some(Astray::EndpointGone));
                assert_eq!(astray(&peer, Some(&pairs), true, &memory), Some(Astray::EndpointGone));
                assert_eq!(astray(&peer, None, false, &memory), None);
                assert_eq!(astray(&ends("10.244.9.9:53", proto), Some(&pairs), false, &memory), None);
                // The id belongs to another endpoint now.
                let other = Endpoint { flags: endpoint_flags::SERVING, generation: 4, ..memory.endpoints[&1] };
                memory.endpoints.insert(1, other);
                assert_eq!(astray(&peer, Some(&pairs), false, &memory), Some(Astray::EndpointGone));
            }
        }
    }

    #[test]
    fn a_datagram_socket_is_astray_once_its_address_is_another_services() {
        for (proto, expected) in [(protocol::TCP, None), (protocol::UDP, Some(Astray::EndpointGone))] {
            let mut memory = memory("192.0.2.1:53", Some("10.244.1.1:53"), 0);
            let (mut pairs, mut peer) = (NEW, ends("192.0.2.1:53", proto));
            translate(&mut peer, &Addr::UNSPECIFIED_V6, true, 0, true, &mut pairs, &mut machine(&memory));
            let mut moved = memory.clone();
            moved.frontends.values_mut().for_each(|frontend| frontend.service = 2);
            assert_eq!(astray(&peer, Some(&pairs), false, &moved), expected);
            memory.frontends.clear();
            assert_eq!(astray(&peer, Some(&pairs), false, &memory), expected);
        }
    }

    #[test]
    fn a_socket_that_went_past_a_frontend_is_astray_where_nothing_translates_its_packets() {
        let found = Some(Astray::Untranslated);
        for (name, endpoint, flags, expected) in [
            ("endpoints", Some("10.244.1.1:53"), 0, found),
            ("refused", None, 0, found),
            ("dropped", None, frontend_flags::INTERNAL_DROP, None),
        ] {
            let memory = memory("10.96.0.10:53", endpoint, flags);
            let peer = ends("10.96.0.10:53", protocol::UDP);
            assert_eq!(astray(&peer, None, false, &memory), expected, "{name}");
            assert_eq!(astray(&peer, Some(&NEW), false, &memory), expected, "{name}");
            assert_eq!(astray(&peer, None, true, &memory), None, "{name}, from a pod");
            assert_eq!(astray(&ends("10.96.0.10:53", protocol::TCP), None, false, &memory), None, "{name}, TCP");
            assert_eq!(astray(&ends("10.96.0.11:53", protocol::UDP), None, false, &memory), None, "{name}, another");
        }
        let mut memory = memory("10.96.0.10:53", Some("10.244.1.1:53"), frontend_flags::CLUSTER_IP);
        let peer = ends("10.96.0.10:53", protocol::UDP);
        memory.node_addresses.insert(peer.addr, node_flags::LOCAL);
        assert_eq!(astray(&peer, None, false, &memory), None, "a node-local DNS cache");
    }
}
