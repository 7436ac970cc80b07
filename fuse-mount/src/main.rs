//! `mount.clusterfs`: see mount.clusterfs(8). Exit statuses are those of mount(8).

use std::io::IsTerminal;
use std::process::ExitCode;

use fuse_mount::daemon::{Forked, Syslog, detach, fork};
use fuse_mount::mount::{Error, serve};
use fuse_mount::options::{Cli, Options, USAGE, command_line};
use fuse_mount::wake::helper;

/// Blocks are 4096 bytes at multiples of 4096: the C library's allocator spends twice as much memory on each.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SYSTEM: u8 = 2;
const FAILED: u8 = 32;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|a| a == helper::ARGUMENT) {
        return helper::run(args);
    }
    let cli: Cli = match command_line() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    let options = match Options::parse(&cli) {
        Ok(options) => options,
        Err(e) => return complain(&e, USAGE),
    };
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        return complain("only root can mount", USAGE);
    }
    if cli.foreground { foreground(&cli, &options) } else { background(&cli, &options) }
}

fn complain(what: &str, status: u8) -> ExitCode {
    eprintln!("mount.clusterfs: {what}");
    ExitCode::from(status)
}

/// Errors of the device name it themselves.
fn of_device(device: &str, e: &Error) -> String {
    let text = e.to_string();
    if text.starts_with(device) { text } else { format!("{device}: {text}") }
}

fn log_filter(options: &Options) -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::new(options.log.as_deref().unwrap_or("warn"))
}

fn foreground(cli: &Cli, options: &Options) -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(log_filter(options))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match serve(&cli.device, &cli.dir, options, || ()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => complain(&of_device(&cli.device, &e), FAILED),
    }
}

fn background(cli: &Cli, options: &Options) -> ExitCode {
    let parent = match fork() {
        Ok(Forked::Parent { status: 0, .. }) => return ExitCode::SUCCESS,
        Ok(Forked::Parent { status, message }) => return complain(&message, status.try_into().unwrap_or(FAILED)),
        Ok(Forked::Child(parent)) => parent,
        Err(e) => return complain(&format!("cannot start the daemon: {e}"), SYSTEM),
    };
    tracing_subscriber::fmt()
        .with_env_filter(log_filter(options))
        .without_time()
        .with_ansi(false)
        .with_writer(|| Syslog)
        .init();
    let mut parent = Some(parent);
    let result = serve(&cli.device, &cli.dir, options, || {
        if let Err(e) = detach() {
            tracing::warn!("cannot let go of the terminal: {e}");
        }
        if let Some(p) = parent.take() {
            p.tell(0, "");
        }
    });
    match (result, parent) {
        (Ok(()), _) => ExitCode::SUCCESS,
        (Err(e), Some(p)) => {
            p.tell(FAILED, &of_device(&cli.device, &e));
            ExitCode::from(FAILED)
        }
        (Err(e), None) => {
            tracing::error!("{}", of_device(&cli.device, &e));
            ExitCode::from(FAILED)
        }
    }
}
