//! Giving new connections back to the host.
//!
//! In: the folder of pins. Out: tables without any frontend; programs, flows and settings stay, so connections that are open go on.
//! Runs only while no agent has the folder, and the next one fills the tables again.

use std::path::Path;

use anyhow::{Result, bail};

use super::{
    folder::Folder,
    tables::{Statistics, Stopped, Store},
};
use crate::image::Image;

/// Removes every frontend, and all that refuses or drops what is for none.
pub fn drain(root: &Path) -> Result<()> {
    let folder = Folder::open(root)?;
    // More than one where an agent ended while tables grew: devices may still run programs of the old one.
    for generation in folder.generations()? {
        let mut store = Store::open(&folder.generation(generation), Statistics::default())?;
        let mut image = Image::restore(store.read()?, 0);
        // A connection whose endpoint is gone from the tables would be reset.
        let mut writes = image.set_terminates(false);
        writes.extend(image.set_service_cidrs(&[]));
        writes.extend(image.sweep(|_| false, |_| false, 0));
        match store.apply(&writes) {
            Ok(()) => {}
            Err(Stopped::Failed(error)) => return Err(error),
            Err(Stopped::Full(table, _)) => bail!("map {} is full though entries are only removed", table.name()),
        }
    }
    Ok(())
}
