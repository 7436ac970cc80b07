//! `cargo xtask`: everything that is done to this repository by a command: setting up, the whole test gate, the demo,
//! installing. It only calls other programs, so that it builds in seconds.

#[cfg(test)]
mod format_doc;
mod gate;
mod install;
mod programs;
mod run;
mod setup;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install missing Debian packages, build the programs and put them into target/bin
    Setup,
    /// Three nodes on one image file: deliver mail, kill a node, lose nothing
    Demo {
        /// Passed on to the demo
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The whole gate: formatting, lints, unit and property tests, the simulator, real mounts
    Test {
        /// Passed on to the test runner, such as a part of a test's name
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Random clusters on a simulated device, with crashes, on all cores: see docs/TESTING.md
    Soak {
        /// Passed on, such as --seconds 600
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Random operations on the contents of files on two real mounts, a million by default: [--fsx N] [--shared N] [--seed N]
    Exercise {
        /// Passed on to clusterfs-exercise
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// How long things take, on real mounts: run [SCENARIO...], list, tools, takeover; see docs/PERFORMANCE.md
    Bench {
        /// Passed on to clusterfs-bench
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Install the programs so that `mount -t clusterfs` works; needs root for the default prefix
    Install {
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
    },
    /// Remove what install put there
    Uninstall {
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
    },
}

/// What went wrong, in words; the command that failed has shown its own output.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let result = match Args::parse().task {
        Task::Setup => setup::setup(),
        Task::Demo { args } => gate::demo(&args),
        Task::Test { args } => gate::test(&args),
        Task::Soak { args } => gate::soak(&args),
        Task::Exercise { args } => gate::exercise(&args),
        Task::Bench { args } => gate::bench(&args),
        Task::Install { prefix } => install::install(&prefix),
        Task::Uninstall { prefix } => install::uninstall(&prefix),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e}");
            ExitCode::FAILURE
        }
    }
}
