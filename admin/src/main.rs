//! clusterfs: what administrators ask of a volume. `top` asks a mount, `grow` changes a volume; the others read the device only, mounted
//! or not, and never write to it, but for `probe --write` to one that carries nothing.

mod grow;
mod info;
mod probe;
mod status;
mod top;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Administer clusterfs volumes.
#[derive(Parser)]
#[command(name = "clusterfs", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a volume and the nodes that use it, from the device alone
    Status {
        /// Machine-readable output
        #[arg(long)]
        json: bool,
        /// Block device, image file or iscsi://[USER@]HOST[:PORT]/TARGET/LUN
        device: PathBuf,
    },
    /// Show the superblock and where everything lies on the device
    #[command(alias = "dump-super")]
    Info {
        /// Machine-readable output
        #[arg(long)]
        json: bool,
        /// Block device, image file or iscsi://[USER@]HOST[:PORT]/TARGET/LUN
        device: PathBuf,
    },
    /// Let a volume use all of its device, which was enlarged; nodes may have it mounted
    Grow {
        /// Machine-readable output
        #[arg(long)]
        json: bool,
        /// Block device, image file or iscsi://[USER@]HOST[:PORT]/TARGET/LUN
        device: PathBuf,
    },
    /// Tell whether a device will do for a volume: exit status 0 if so
    Probe(probe::Args),
    /// Show what a mount is doing: busy directories, handovers, requests, device I/O
    Top(top::Args),
}

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(r) => r,
        Err(e) => return fail(&e.into()),
    };
    let result = runtime.block_on(async {
        let text = match args.command {
            Command::Status { json, device } => status::run(&device, json).await?,
            Command::Info { json, device } => info::run(&device, json).await?,
            Command::Grow { json, device } => grow::run(&device, json).await?,
            Command::Probe(args) => return probe::run(&args).await,
            Command::Top(args) => top::run(&args).map(|()| String::new())?,
        };
        Ok((text, true))
    });
    match result {
        Ok((text, true)) => print(&text),
        Ok((text, false)) => {
            print(&text);
            ExitCode::from(1)
        }
        Err(e) => fail(&e),
    }
}

/// A reader that closes the pipe early has what it wanted.
fn print(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => fail(&e.into()),
        _ => ExitCode::SUCCESS,
    }
}

fn fail(e: &Error) -> ExitCode {
    eprintln!("clusterfs: {e}");
    ExitCode::from(1)
}

#[cfg(test)]
mod tests;
