//! SCTP through the programs in the kernel: its checksum is right after every change of a port, by another implementation's count.

use std::net::{IpAddr, SocketAddr};

use crc::{CRC_32_ISCSI, Crc};
use etherparse::{IpNumber, PacketBuilder};

use crate::{Loaded, NEXT, Way, in_a_namespace};

const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

fn frame(from: SocketAddr, to: SocketAddr, chunks: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([0, 0, 0, 0, 0, 2], [0; 6]);
    let net = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        ends => panic!("{ends:?}"),
    };
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let mut packet = [&ports[..], &[1, 2, 3, 4, 0, 0, 0, 0], chunks].concat();
    let sum = CRC32C.checksum(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    let mut frame = Vec::new();
    net.write(&mut frame, IpNumber::SCTP, &packet).unwrap();
    frame
}

/// Both ends of a frame, whose checksum must be right.
fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let v6 = frame[12] == 0x86;
    let (packet, addresses) = if v6 { (&frame[54..], &frame[22..54]) } else { (&frame[34..], &frame[26..34]) };
    let mut zeroed = packet.to_vec();
    zeroed[8..12].fill(0);
    assert_eq!(CRC32C.checksum(&zeroed).to_le_bytes(), packet[8..12], "the checksum of {frame:02x?}");
    let (from, to) = addresses.split_at(addresses.len() / 2);
    let addr = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(octets) => IpAddr::from(octets),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()),
    };
    let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    (SocketAddr::new(addr(from), port(0)), SocketAddr::new(addr(to), port(2)))
}

/// Through both programs: the ends after the first and after the second.
fn cross(loaded: &mut Loaded, from: SocketAddr, to: SocketAddr, chunks: &[u8]) -> [(SocketAddr, SocketAddr); 2] {
    let (verdict, _, entered) = loaded.run(Way::In, &frame(from, to, chunks));
    assert_eq!(verdict, NEXT, "{from} to {to}");
    let (verdict, _, left) = loaded.run(Way::Out, &entered);
    assert_eq!(verdict, NEXT, "{from} to {to}");
    [ends(&entered), ends(&left)]
}

#[test]
fn sctp_has_a_right_checksum_after_every_change_of_a_port() {
    in_a_namespace(|| {
        let mut loaded = Loaded::new();
        // A ClusterIP from a pod, and a NodePort from outside, which is masqueraded; by lengths that are no multiple of anything.
        for (client, service, node) in [
            ("10.244.1.7:40000", "10.96.0.10:80", None),
            ("[fd00:10:244:1::7]:40000", "[fd00:10:96::a]:80", None),
            ("198.51.100.9:40000", "10.99.0.11:30180", Some("10.99.0.11")),
            ("[2001:db8:9::9]:40000", "[fd00:99::11]:30180", Some("fd00:99::11")),
        ] {
            let [client, service]: [SocketAddr; 2] = [client, service].map(|text| text.parse().unwrap());
            let node: Option<IpAddr> = node.map(|text| text.parse().unwrap());
            for chunks in [0, 4, 7, 20, 333, 1400].map(|length| vec![0xa5; length]) {
                let [entered, left] = cross(&mut loaded, client, service, &chunks);
                assert_eq!((entered.0, entered.1.port()), (client, 8080));
                assert_eq!((left.0.ip(), left.1), (node.unwrap_or(client.ip()), entered.1));
                let [_, answer] = cross(&mut loaded, left.1, left.0, &chunks);
                assert_eq!(answer, (service, client));
            }
        }
    });
}

#[test]
fn a_second_frontend_of_the_same_endpoint_gets_another_source_port_over_sctp() {
    in_a_namespace(|| {
        let mut loaded = Loaded::new();
        // Two endpoints: of twenty clients that use two frontends, some meet one endpoint twice.
        for (client, services) in [
            ("10.244.1.7:40000", ["10.96.0.10:80", "10.99.1.10:80"]),
            ("[fd00:10:244:1::7]:40000", ["[fd00:10:96::a]:80", "[fd00:99:1::a]:80"]),
        ] {
            let base: SocketAddr = client.parse().unwrap();
            let mut shifted = 0;
            for port in 40_000..40_020 {
                let client = SocketAddr::new(base.ip(), port);
                for service in services.map(|text| text.parse().unwrap()) {
                    let [entered, left] = cross(&mut loaded, client, service, &[7; 20]);
                    shifted += u32::from(entered.0 != client);
                    assert_eq!(cross(&mut loaded, left.1, left.0, &[8; 20])[1], (service, client));
                }
            }
            assert!(shifted > 0, "no client met one endpoint twice");
        }
    });
}

#[test]
fn a_masqueraded_association_keeps_its_port_unless_another_has_it_over_sctp() {
    in_a_namespace(|| {
        let mut loaded = Loaded::new();
        for (clients, service) in [
            (["198.51.100.9", "198.51.100.10", "198.51.100.11"], "10.99.0.11:30180"),
            (["2001:db8:9::9", "2001:db8:9::a", "2001:db8:9::b"], "[fd00:99::11]:30180"),
        ] {
            let service: SocketAddr = service.parse().unwrap();
            // The port is also a NodePort once: answers are answers all the same.
            for port in [40_000, 30_180] {
                let mut ways: Vec<(SocketAddr, SocketAddr)> = Vec::new();
                // Two endpoints: of three clients, two meet at one.
                for client in clients.map(|ip| SocketAddr::new(ip.parse().unwrap(), port)) {
                    let [_, (node, endpoint)] = cross(&mut loaded, client, service, &[7; 20]);
                    let is_taken = ways.contains(&(SocketAddr::new(node.ip(), port), endpoint));
                    assert_eq!(node.port() != port, is_taken, "{client}: {node} to {endpoint}, after {ways:?}");
                    ways.push((node, endpoint));
                    assert_eq!(cross(&mut loaded, endpoint, node, &[8; 20])[1], (service, client));
                    // And the next packet goes the same way.
                    assert_eq!(cross(&mut loaded, client, service, &[9; 20])[1], (node, endpoint));
                }
            }
        }
    });
}
