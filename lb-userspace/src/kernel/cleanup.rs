//! Removing every trace.
//!
//! In: the folder of pins. Out: nothing: no link, filter, qdisc of ours, pin, folder or mount of ours is left, and ports that we reserved are free. Runs only while no
//! agent has the folder.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{
    Attach,
    folder::{self, Folder},
    links::Links,
    reserved,
};

/// Removes what agents left in this folder and attached by it. Also of other layout versions.
pub fn cleanup(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let folder = Folder::open(root)?;
    for version in folder::names(root)? {
        let links = Links::new(root.join(&version).join("links"), Attach::Clsact);
        for ifindex in links.devices()? {
            links.detach(ifindex)?;
        }
        links.detach_sockets()?;
        reserved::release(&root.join(&version).join(folder::RESERVED))?;
        let dir = root.join(&version);
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    folder::remove(folder)
}
