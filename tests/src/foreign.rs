//! Someone else's programs on a device: count every packet, then return what they are told to. In: a namespace, a device. Out: how many
//! packets they saw. Attached until dropped.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::bpf::{Flags, attach_tcx, create_counter, load_counting_program, pin, read_counter};
use crate::netns::Netns;

/// On which side of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where packets enter.
    Ingress,
    /// Where packets leave.
    Egress,
}

/// Where in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// TCX, before all that are there.
    TcxFirst,
    /// TCX, behind all that are there.
    TcxLast,
    /// A filter of the clsact qdisc.
    Clsact,
}

/// What the program returns: go on to the next.
pub const NEXT: i32 = -1;
/// What the program returns: the packet passes, and nobody else is asked.
pub const OK: i32 = 0;

/// A counting program on a device.
#[derive(Debug)]
pub struct Foreign {
    counter: OwnedFd,
    /// The link, or the pin that `tc` took the program from.
    _link: Option<OwnedFd>,
    pin: Option<PathBuf>,
}

impl Foreign {
    /// Attaches to a device of a namespace. `bpffs` is a place for a pin.
    pub fn attach(netns: &Netns, device: &str, side: Side, place: Place, verdict: i32, bpffs: &Path) -> Self {
        Self::try_attach(netns, device, side, place, (verdict, Flags::Ignore), bpffs)
            .unwrap_or_else(|error| panic!("attaching to {device}, {side:?}, {place:?}: {error:#}"))
    }

    /// The same for one that goes on, and sets or looks at `tc_index`.
    pub fn attach_for(netns: &Netns, device: &str, side: Side, place: Place, flags: Flags, bpffs: &Path) -> Self {
        Self::try_attach(netns, device, side, place, (NEXT, flags), bpffs)
            .unwrap_or_else(|error| panic!("attaching to {device}, {side:?}, {place:?}: {error:#}"))
    }

    fn try_attach(
        netns: &Netns,
        device: &str,
        side: Side,
        place: Place,
        (verdict, flags): (i32, Flags),
        bpffs: &Path,
    ) -> Result<Self> {
        let counter = create_counter().context("creating a map")?;
        let program = load_counting_program(&counter, verdict, flags).context("loading a program")?;
        let before = match place {
            Place::TcxFirst => true,
            Place::TcxLast => false,
            Place::Clsact => {
                let side_name = if side == Side::Ingress { "ingress" } else { "egress" };
                let place = bpffs.join(format!("foreign-{device}-{side_name}"));
                pin(&program, &place).with_context(|| format!("pinning at {}", place.display()))?;
                // It may be there, as ours make one too.
                let _ = netns.exec("tc", &["qdisc", "add", "dev", device, "clsact"]);
                // `ip netns exec` has another /sys; the file is found by its path all the same.
                let path = place.display().to_string();
                let words =
                    ["filter", "add", "dev", device, side_name, "pref", "100", "bpf", "da", "object-pinned", &path];
                netns.exec("tc", &words)?;
                return Ok(Self { counter, _link: None, pin: Some(place) });
            }
        };
        let ifindex: u32 = {
            let text = netns.exec("cat", &[&format!("/sys/class/net/{device}/ifindex")])?;
            text.trim().parse().context("reading an ifindex")?
        };
        let link = netns.run(|| attach_tcx(&program, ifindex, side == Side::Ingress, before)).context("attaching")?;
        Ok(Self { counter, _link: Some(link), pin: None })
    }

    /// How many packets it has seen.
    pub fn seen(&self) -> u64 {
        read_counter(&self.counter).unwrap_or_else(|error| panic!("reading a counter: {error}"))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(pin) = &self.pin {
            let _ = fs::remove_file(pin);
        }
    }
}
