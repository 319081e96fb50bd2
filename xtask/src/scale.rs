//! `cargo xtask scale`: a folder of manifests with many Services.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

/// What to write where.
#[derive(Args)]
pub struct Options {
    /// The folder; made if it isn't there, files of the same names are replaced
    folder: PathBuf,
    /// Number of Services
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Number of endpoints of each Service
    #[arg(long, default_value_t = 4)]
    endpoints: u32,
}

/// Writes the folder.
pub fn run(options: &Options) -> Result<ExitCode> {
    let files = tests::scale::write(&options.folder, options.services, options.endpoints)?;
    println!(
        "{}: {} Services with {} endpoints each in {files} files; service-0 is {}:80",
        options.folder.display(),
        options.services,
        options.endpoints,
        tests::scale::cluster_ip(0),
    );
    Ok(ExitCode::SUCCESS)
}
