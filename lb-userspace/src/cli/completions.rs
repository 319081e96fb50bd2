//! `fairlead completions`.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

/// Print completions for a shell
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  fairlead completions bash > /etc/bash_completion.d/fairlead")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints them.
pub fn run(args: &CompletionsArgs) {
    clap_complete::generate(args.shell, &mut super::Cli::command(), "fairlead", &mut std::io::stdout());
}
