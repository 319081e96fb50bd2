//! The binary `fairlead`.

use std::process::ExitCode;

fn main() -> ExitCode {
    fairlead::cli::main()
}
