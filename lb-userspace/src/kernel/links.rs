//! Attaching the programs: devices by TCX or clsact, sockets by the cgroup.
//!
//! In: loaded programs, devices, the folder of links. Out: pinned links whose programs are replaced in one step. Which devices
//! there are is not decided here.
//!
//! Ingress attaches first and egress last. Pins are named by hook and ifindex; for clsact, which has no link to pin before
//! Linux 6.6, an empty folder of the same name says that the filter with [`PRIORITY`] and [`HANDLE`] is ours, and
//! `qdisc-<ifindex>` that the qdisc is.

use std::{
    fs, io, mem,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::programs::{
    TcAttachType, loaded_programs,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use tracing::{info, warn};

use super::{
    Attach, folder,
    netlink::{self, Filter},
    object::{Programs, SOCKET_HOOKS},
    sys::{self, Target},
};

/// Preference of our clsact filters: ingress before all others, egress behind.
const fn priority(hook: Hook) -> u16 {
    match hook {
        Hook::Ingress => 1,
        Hook::Egress => 0xfffe,
    }
}

/// Handle of our clsact filters ("FL").
const HANDLE: TcHandle = TcHandle::new(0, 0x464c);

/// A hook of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// Packets that the device received.
    Ingress,
    /// Packets that it will send.
    Egress,
}

impl Hook {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// Name of the program.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn attach_type(self) -> u32 {
        match self {
            Self::Ingress => sys::attach_type::TCX_INGRESS,
            Self::Egress => sys::attach_type::TCX_EGRESS,
        }
    }

    const fn order(self) -> u32 {
        match self {
            Self::Ingress => sys::FIRST,
            Self::Egress => sys::LAST,
        }
    }

    const fn clsact(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// How a program is attached to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// A TCX link.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

impl Mechanism {
    /// TCX where the kernel has it.
    pub fn available() -> Self {
        // The loopback device is always there to be asked; before Linux 6.6 the kernel knows no such hook.
        if sys::query_tcx(1, sys::attach_type::TCX_INGRESS).is_ok() { Self::Tcx } else { Self::Clsact }
    }

    /// As `--attach` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// A device as attaching needs it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// Its ifindex.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Whether its packets have an Ethernet header.
    pub ethernet: bool,
    /// Tells apart two devices that had the same ifindex one after the other.
    pub birth: u64,
}

/// Attaches and detaches within one folder of pins.
#[derive(Debug)]
pub struct Links {
    dir: PathBuf,
    mechanism: Mechanism,
    /// Whether a device may be an exception.
    auto: bool,
}

/// What stands in the folder of links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pin {
    Tcx(Hook, u32),
    Clsact(Hook, u32),
    Qdisc(u32),
    Socket,
}

fn parse(name: &str) -> Option<Pin> {
    if let Some(hook) = name.strip_prefix("sock-") {
        return SOCKET_HOOKS.iter().any(|(known, _)| *known == hook).then_some(Pin::Socket);
    }
    let (kind, ifindex) = name.rsplit_once('-')?;
    let ifindex = ifindex.parse().ok()?;
    match kind {
        "tc-ingress" => Some(Pin::Tcx(Hook::Ingress, ifindex)),
        "tc-egress" => Some(Pin::Tcx(Hook::Egress, ifindex)),
        "clsact-ingress" => Some(Pin::Clsact(Hook::Ingress, ifindex)),
        "clsact-egress" => Some(Pin::Clsact(Hook::Egress, ifindex)),
        "qdisc" => Some(Pin::Qdisc(ifindex)),
        _ => None,
    }
}

/// A program that is attached, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The device; `None` for sockets.
    pub ifindex: Option<u32>,
    /// The program's name.
    pub program: String,
    /// How; `None` for sockets.
    pub mechanism: Option<Mechanism>,
    /// Id of the link, where there is one.
    pub link: Option<u32>,
    /// Id of the program, where the kernel tells.
    pub program_id: Option<u32>,
    /// Programs and filters that run before ours at this hook: they may end the chain.
    pub before: Vec<String>,
    /// Whether the link still has its device.
    pub live: bool,
}

impl Links {
    /// Chooses the mechanism: TCX where the kernel has it, unless told otherwise.
    pub fn new(dir: PathBuf, attach: Attach) -> Self {
        let mechanism = match attach {
            Attach::Tcx => Mechanism::Tcx,
            Attach::Clsact => Mechanism::Clsact,
            Attach::Auto => Mechanism::available(),
        };
        info!(?attach, ?mechanism, "programs are attached to devices by this mechanism");
        Self { dir, mechanism, auto: attach == Attach::Auto }
    }

    /// How programs are attached to devices.
    pub fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    fn path(&self, kind: &str, hook: Hook, ifindex: u32) -> PathBuf {
        self.dir.join(format!("{kind}-{}-{ifindex}", hook.name()))
    }

    /// Attaches both programs to a device, or replaces those that are attached.
    pub fn attach(&self, programs: &mut Programs, port: &Port) -> Result<()> {
        for hook in Hook::ALL {
            let what = || format!("cannot attach {} to device {} (ifindex {})", hook.name(), port.name, port.ifindex);
            match self.mechanism_for(hook, port).with_context(what)? {
                Mechanism::Tcx => {
                    let program = programs.classifier_fd(hook.name(), port.ethernet)?;
                    self.attach_tcx(program.as_fd(), hook, port).with_context(what)?;
                    self.detach_clsact(hook, port.ifindex).with_context(what)?;
                }
                Mechanism::Clsact => {
                    self.attach_clsact(programs, hook, port).with_context(what)?;
                    unpin(&self.path("tc", hook, port.ifindex)).with_context(what)?;
                }
            }
        }
        self.remove_qdisc(port.ifindex)
    }

    /// TCX runs before clsact, on the way out too. So where someone has clsact filters on the way out, ours is the last of
    /// them, unless the operator asked for TCX.
    fn mechanism_for(&self, hook: Hook, port: &Port) -> Result<Mechanism> {
        if self.auto
            && self.mechanism == Mechanism::Tcx
            && hook == Hook::Egress
            && netlink::filters(port.ifindex, false)?.iter().any(|filter| !is_ours(filter, hook))
        {
            info!(device = port.name, "egress is a clsact filter here, behind those of others");
            return Ok(Mechanism::Clsact);
        }
        Ok(self.mechanism)
    }

    fn attach_tcx(&self, program: BorrowedFd<'_>, hook: Hook, port: &Port) -> Result<()> {
        let path = self.path("tc", hook, port.ifindex);
        if let Ok(link) = sys::open_pin(&path) {
            let shape = sys::link_shape(link.as_fd())?;
            // The ifindex may have come again: only the device itself knows whether the link is still one of its own.
            let here = sys::query_tcx(port.ifindex, hook.attach_type())?.iter().any(|(_, id)| *id == shape.id);
            if here && replace(link.as_fd(), program)? {
                return Ok(());
            }
            unpin(&path)?;
        }
        let link = sys::link_create(program, Target::Device(port.ifindex), hook.attach_type(), hook.order())?;
        sys::pin(link.as_fd(), &path).with_context(|| format!("cannot pin {}", path.display()))
    }

    fn attach_clsact(&self, programs: &mut Programs, hook: Hook, port: &Port) -> Result<()> {
        let program = programs.classifier(hook.name(), port.ethernet)?;
        let path = self.path("clsact", hook, port.ifindex);
        let mut id = None;
        if path.exists() {
            let link = SchedClassifierLink::attached(&port.name, hook.clsact(), priority(hook), HANDLE, None)?;
            match program.attach_to_link(link) {
                Ok(done) => id = Some(done),
                Err(error) => {
                    warn!(device = port.name, hook = hook.name(), %error, "our filter is gone; attaching anew")
                }
            }
        }
        let id = match id {
            Some(id) => id,
            None => {
                if netlink::add_clsact(port.ifindex)? {
                    mark(&self.dir.join(format!("qdisc-{}", port.ifindex)))?;
                }
                mark(&path)?;
                let options = NlOptions { priority: priority(hook), handle: HANDLE, classid: None };
                program.attach_with_options(&port.name, hook.clsact(), TcAttachOptions::Netlink(options))?
            }
        };
        // Dropping the link would remove the filter, which outlives us like a pinned link.
        mem::forget(program.take_link(id)?);
        Ok(())
    }

    fn detach_clsact(&self, hook: Hook, ifindex: u32) -> Result<()> {
        let path = self.path("clsact", hook, ifindex);
        if path.exists() {
            netlink::remove_filter(ifindex, hook == Hook::Ingress, priority(hook), HANDLE.into())?;
            fs::remove_dir(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Removes the qdisc if it is ours and no filter of ours is in it.
    fn remove_qdisc(&self, ifindex: u32) -> Result<()> {
        let path = self.dir.join(format!("qdisc-{ifindex}"));
        let needed = Hook::ALL.iter().any(|hook| self.path("clsact", *hook, ifindex).exists());
        if path.exists() && !needed {
            netlink::remove_clsact_if_unused(ifindex)?;
            fs::remove_dir(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Detaches both programs from a device, which may be gone, or in another network namespace.
    pub fn detach(&self, ifindex: u32) -> Result<()> {
        for hook in Hook::ALL {
            let path = self.path("tc", hook, ifindex);
            if let Ok(link) = sys::open_pin(&path)
                && let Err(error) = sys::link_detach(link.as_fd())
                && error.raw_os_error() != Some(libc::ENOLINK)
            {
                warn!(ifindex, hook = hook.name(), %error, "cannot detach the link; unpinning it");
            }
            unpin(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            self.detach_clsact(hook, ifindex)?;
        }
        self.remove_qdisc(ifindex)
    }

    /// Devices that something is pinned for.
    pub fn devices(&self) -> Result<Vec<u32>> {
        let mut devices: Vec<u32> = folder::names(&self.dir)?
            .iter()
            .filter_map(|name| match parse(name)? {
                Pin::Tcx(_, ifindex) | Pin::Clsact(_, ifindex) | Pin::Qdisc(ifindex) => Some(ifindex),
                Pin::Socket => None,
            })
            .collect();
        devices.sort_unstable();
        devices.dedup();
        Ok(devices)
    }

    /// Attaches the socket programs to a cgroup, or replaces those that are attached.
    pub fn attach_sockets(&self, programs: &mut Programs, cgroup: BorrowedFd<'_>) -> Result<()> {
        for (name, attach_type) in SOCKET_HOOKS {
            let program = programs.socket_fd(name)?;
            let path = self.dir.join(format!("sock-{name}"));
            let attached = match sys::open_pin(&path) {
                Ok(link) => replace(link.as_fd(), program.as_fd())?,
                Err(_) => false,
            };
            if !attached {
                unpin(&path)?;
                // Without flags: for links that means "beside others", and any flag is refused.
                let link = sys::link_create(program.as_fd(), Target::Cgroup(cgroup), attach_type, 0)
                    .with_context(|| format!("cannot attach {name} to the cgroup (--cgroup)"))?;
                sys::pin(link.as_fd(), &path).with_context(|| format!("cannot pin {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Whether socket programs are attached.
    pub fn has_sockets(&self) -> Result<bool> {
        Ok(folder::names(&self.dir)?.iter().any(|name| parse(name) == Some(Pin::Socket)))
    }

    /// Detaches the socket programs.
    pub fn detach_sockets(&self) -> Result<()> {
        for (name, _) in SOCKET_HOOKS {
            let path = self.dir.join(format!("sock-{name}"));
            if let Ok(link) = sys::open_pin(&path)
                && let Err(error) = sys::link_detach(link.as_fd())
                && error.raw_os_error() != Some(libc::ENOLINK)
            {
                warn!(name, %error, "cannot detach the link; unpinning it");
            }
            unpin(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// What is attached.
    pub fn status(&self) -> Result<Vec<Attached>> {
        status(&self.dir)
    }
}

/// What is attached, from the folder of links.
pub fn status(dir: &Path) -> Result<Vec<Attached>> {
    let mut attached = Vec::new();
    for name in folder::names(dir)? {
        let Some(pin) = parse(&name) else { continue };
        let shape = || sys::open_pin(&dir.join(&name)).and_then(|link| sys::link_shape(link.as_fd()));
        match pin {
            Pin::Tcx(hook, ifindex) => {
                let Ok(shape) = shape() else { continue };
                let chain = sys::query_tcx(ifindex, hook.attach_type()).unwrap_or_default();
                let place = chain.iter().position(|(_, id)| *id == shape.id);
                let before = named(chain.iter().take(place.unwrap_or(0)));
                attached.push(Attached {
                    ifindex: Some(ifindex),
                    program: hook.name().into(),
                    mechanism: Some(Mechanism::Tcx),
                    link: Some(shape.id),
                    program_id: Some(shape.program),
                    before,
                    live: place.is_some(),
                });
            }
            Pin::Clsact(hook, ifindex) => {
                let filters = netlink::filters(ifindex, hook == Hook::Ingress).unwrap_or_default();
                let place = filters.iter().position(|filter| is_ours(filter, hook));
                let mut before = named(sys::query_tcx(ifindex, hook.attach_type()).unwrap_or_default().iter());
                before.extend(filters.iter().take(place.unwrap_or(0)).map(|filter| {
                    format!("{} (filter, pref {}, handle {:#x})", filter.name, filter.priority, filter.handle)
                }));
                attached.push(Attached {
                    ifindex: Some(ifindex),
                    program: hook.name().into(),
                    mechanism: Some(Mechanism::Clsact),
                    link: None,
                    program_id: None,
                    before,
                    live: place.is_some(),
                });
            }
            Pin::Qdisc(_) => {}
            Pin::Socket => {
                let Ok(shape) = shape() else { continue };
                attached.push(Attached {
                    ifindex: None,
                    program: name.trim_start_matches("sock-").into(),
                    mechanism: None,
                    link: Some(shape.id),
                    program_id: Some(shape.program),
                    before: Vec::new(),
                    live: true,
                });
            }
        }
    }
    Ok(attached)
}

fn is_ours(filter: &Filter, hook: Hook) -> bool {
    (filter.priority, filter.handle) == (priority(hook), HANDLE.into())
}

fn named<'a>(chain: impl Iterator<Item = &'a (u32, u32)>) -> Vec<String> {
    let name = |id| {
        let infos = loaded_programs().filter_map(Result::ok).find(|info| info.id() == id)?;
        Some(infos.name_as_str()?.to_owned())
    };
    chain.map(|(id, _)| format!("{} (program {id})", name(*id).unwrap_or_default())).collect()
}

/// Replaces a link's program; false if what it was attached to is gone.
fn replace(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<bool> {
    match sys::link_update(link, program) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(error).context("cannot replace the program of a pinned link"),
    }
}

fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn mark(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_tell_hook_and_device() {
        for (name, pin) in [
            ("tc-ingress-12", Some(Pin::Tcx(Hook::Ingress, 12))),
            ("tc-egress-3", Some(Pin::Tcx(Hook::Egress, 3))),
            ("clsact-egress-3", Some(Pin::Clsact(Hook::Egress, 3))),
            ("qdisc-3", Some(Pin::Qdisc(3))),
            ("sock-connect4", Some(Pin::Socket)),
            ("sock-bind4", None),
            ("tc-ingress-x", None),
            ("other", None),
        ] {
            assert_eq!(parse(name), pin, "{name}");
        }
    }
}
