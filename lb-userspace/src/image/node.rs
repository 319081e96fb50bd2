//! Facts about the node and its networks as table entries.
//!
//! In: the whole of a table as it should be. Out: the writes for what differs.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use lb_common::{
    addr::Addr,
    layout::{Cover, Device, NodeAddress, PrefixKey, Settings, settings_flags},
};

use super::{Image, Write, put};

/// A network as key of the longest-prefix tables.
#[must_use]
pub fn prefix_key(service: u32, net: IpNet) -> PrefixKey {
    let family = if net.addr().is_ipv4() { 96 } else { 0 };
    PrefixKey { prefix_len: 32 + family + u32::from(net.prefix_len()), service, addr: net.network().into() }
}

impl Image {
    /// Addresses of this node and their flags.
    pub fn set_node_addresses(&mut self, wanted: &BTreeMap<Addr, NodeAddress>) -> Vec<Write> {
        let (new, gone) = differences(&self.memory.node_addresses, wanted);
        let new = new.into_iter().map(|(addr, flags)| Write::NodeAddress(addr, flags));
        self.put_all(new.chain(gone.into_iter().map(Write::RemoveNodeAddress)))
    }

    /// Devices by ifindex.
    pub fn set_devices(&mut self, wanted: &BTreeMap<u32, Device>) -> Vec<Write> {
        let (new, gone) = differences(&self.memory.devices, wanted);
        let new = new.into_iter().map(|(ifindex, device)| Write::Device(ifindex, device));
        self.put_all(new.chain(gone.into_iter().map(Write::RemoveDevice)))
    }

    /// One device, or its absence.
    pub fn set_device(&mut self, ifindex: u32, device: Option<Device>) -> Vec<Write> {
        let there = self.memory.devices.get(&ifindex).copied();
        self.put_all(
            (there != device).then(|| device.map_or(Write::RemoveDevice(ifindex), |it| Write::Device(ifindex, it))),
        )
    }

    /// What the local detector takes as local.
    pub fn set_local_cidrs(&mut self, nets: &[IpNet]) -> Vec<Write> {
        let wanted: BTreeSet<PrefixKey> = nets.iter().map(|net| prefix_key(0, *net)).collect();
        let there = &self.memory.local_cidrs;
        let new = wanted.difference(there).copied().map(Write::LocalCidr);
        let gone = there.difference(&wanted).copied().map(Write::RemoveLocalCidr);
        self.put_all(new.chain(gone).collect::<Vec<_>>())
    }

    /// ServiceCIDRs, and the networks that cover them.
    pub fn set_service_cidrs(&mut self, nets: &[IpNet]) -> Vec<Write> {
        let wanted: BTreeSet<PrefixKey> = nets.iter().map(|net| prefix_key(0, *net)).collect();
        let settings = Settings { cidrs_v4: cover(nets, true), cidrs_v6: cover(nets, false), ..self.memory.settings };
        let there = &self.memory.service_cidrs;
        let new = wanted.difference(there).copied().map(Write::ServiceCidr);
        let gone = there.difference(&wanted).copied().map(Write::RemoveServiceCidr);
        let changed = (settings != self.memory.settings).then_some(Write::Settings(settings));
        self.put_all(new.chain(changed).chain(gone).collect::<Vec<_>>())
    }

    /// Until when, on the programs' clock, the middle of unknown TCP connections is left to the host.
    pub fn leave_mid_flow(&mut self, until: u32) -> Vec<Write> {
        let settings = Settings { mid_flow_left_until: until, ..self.memory.settings };
        self.put_all((settings != self.memory.settings).then_some(Write::Settings(settings)))
    }

    /// Whether TCP connections are reset when their endpoint is gone.
    pub fn set_terminates(&mut self, terminates: bool) -> Vec<Write> {
        let settings =
            Settings { flags: if terminates { settings_flags::TERMINATE } else { 0 }, ..self.memory.settings };
        self.put_all((settings != self.memory.settings).then_some(Write::Settings(settings)))
    }

    fn put_all(&mut self, writes: impl IntoIterator<Item = Write>) -> Vec<Write> {
        let mut list = self.list();
        writes.into_iter().for_each(|write| put(&mut self.memory, &mut list, write));
        list.writes
    }
}

/// Entries that are new or other than before, and keys that are gone.
fn differences<K: Ord + Copy, V: PartialEq + Copy>(
    there: &BTreeMap<K, V>,
    wanted: &BTreeMap<K, V>,
) -> (Vec<(K, V)>, Vec<K>) {
    let new = wanted.iter().filter(|(key, value)| there.get(key) != Some(value));
    let gone = there.keys().filter(|key| !wanted.contains_key(key));
    (new.map(|(key, value)| (*key, *value)).collect(), gone.copied().collect())
}

/// The smallest network that holds all those of a family.
fn cover(nets: &[IpNet], v4: bool) -> Cover {
    let bits = |addr| Addr::from(addr).words.iter().fold(0, |bits, word| bits << 32 | u128::from(u32::from_be(*word)));
    let of_family = nets.iter().filter(|net| net.addr().is_ipv4() == v4);
    let ends = of_family.flat_map(|net| [bits(net.network()), bits(net.broadcast())]);
    let Some((first, last)) = ends.fold(None, |range, end| {
        let (first, last) = range.unwrap_or((end, end));
        Some((end.min(first), end.max(last)))
    }) else {
        return Cover::default();
    };
    match (first ^ last).leading_zeros() {
        0 => Cover::EVERYTHING,
        common => {
            let mask = u128::MAX << 128_u32.saturating_sub(common).min(127);
            let mask = if common == 128 { u128::MAX } else { mask };
            let addr = |bits: u128| Addr { words: [96, 64, 32, 0].map(|shift| ((bits >> shift) as u32).to_be()) };
            Cover { network: addr(first & mask), mask: addr(mask) }
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::tables::Tables;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn addr(text: &str) -> Addr {
        text.parse::<std::net::IpAddr>().unwrap().into()
    }

    #[test]
    fn service_cidrs_are_found_whatever_covers_them() {
        for (cidrs, inside, outside) in [
            (&[][..], &[][..], &["10.96.0.1", "::", "0.0.0.0", "fd00::1"][..]),
            (&["10.96.0.0/16"], &["10.96.0.0", "10.96.255.255"], &["10.97.0.0", "::1"]),
            (&["10.96.0.1/32"], &["10.96.0.1"], &["10.96.0.0", "10.96.0.2"]),
            (
                &["10.96.0.0/16", "172.30.0.0/16", "fd00:1::/108"],
                &["10.96.1.1", "172.30.9.9", "fd00:1::7"],
                &["11.0.0.1"],
            ),
            (&["fd00:1::/108", "2001:db8::/112"], &["fd00:1::7", "2001:db8::9"], &["fe80::1", "10.0.0.1"]),
            (&["0.0.0.0/0"], &["0.0.0.0", "255.255.255.255"], &["::1"]),
            (&["::1/128"], &["::1"], &["::2"]),
        ] {
            let mut image = Image::default();
            image.set_service_cidrs(&nets(cidrs));
            assert!(inside.iter().all(|text| image.memory().in_service_cidr(&addr(text))), "{cidrs:?}");
            assert!(!outside.iter().any(|text| image.memory().in_service_cidr(&addr(text))), "{cidrs:?}");
        }
    }

    #[test]
    fn only_what_differs_is_written() {
        let mut image = Image::default();
        let old = [(addr("10.0.0.1"), 1), (addr("10.0.0.2"), 1)].into();
        assert_eq!(image.set_node_addresses(&old).len(), 2);
        let new = [(addr("10.0.0.1"), 1), (addr("10.0.0.3"), 3)].into();
        let writes = [Write::NodeAddress(addr("10.0.0.3"), 3), Write::RemoveNodeAddress(addr("10.0.0.2"))];
        assert_eq!(image.set_node_addresses(&new), writes);
        assert_eq!(image.set_node_addresses(&new), []);
        assert_eq!(image.set_local_cidrs(&nets(&["10.0.0.0/8"])).len(), 1);
        assert_eq!(image.set_local_cidrs(&nets(&["10.0.0.0/9"])).len(), 2);
        assert_eq!(image.set_service_cidrs(&nets(&["10.0.0.0/9"])).len(), 2);
        assert_eq!(image.set_service_cidrs(&nets(&["10.0.0.0/9"])), []);
        assert_eq!(image.leave_mid_flow(7).len(), 1);
        assert_eq!(image.leave_mid_flow(7), []);
        let device = Device { bridge: 7, ..Device::default() };
        assert_eq!(image.set_device(3, Some(device)), [Write::Device(3, device)]);
        assert_eq!(image.set_devices(&[(3, device)].into()), []);
        assert_eq!(image.set_device(3, None), [Write::RemoveDevice(3)]);
        assert_eq!(image.set_device(3, None), []);
    }
}
