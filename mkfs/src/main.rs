//! mkfs.clusterfs: makes a volume. The work is in the library; here are arguments, messages and exit codes.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockdev::iscsi::Settings;
use blockdev::open::{User, has_sectors_of_its_own};
use blockdev::{BlockDevice, IoClass};
use clap::{Parser, ValueEnum};
use fs_core::format::item::Time;
use fs_core::format::superblock::Superblock;
use mkfs::{FormatOptions, Locks, Progress};

/// Make a clusterfs volume on DEVICE, for all hosts that share it.
#[derive(Parser)]
#[command(name = "mkfs.clusterfs", bin_name = "mkfs.clusterfs", version)]
struct Args {
    /// Name of the volume, at most 64 bytes
    #[arg(short = 'L', long, value_name = "LABEL", default_value = "")]
    label: String,
    /// Most nodes that can mount the volume at once, 1 to 64 [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: Option<u16>,
    /// Size of each node's journal, such as 64M [default: by the size of the volume, 1M to 64M]
    #[arg(long, value_name = "SIZE", value_parser = mkfs::parse_size)]
    journal_size: Option<u64>,
    /// Size to which the volume can grow later, such as 100T [default: 16 times its size up to 16T, at least 4 times]
    #[arg(long, value_name = "SIZE", value_parser = mkfs::parse_size)]
    max_size: Option<u64>,
    /// How long a node that cannot reach the device goes on before it stops by itself, such as 6s
    #[arg(long, value_name = "TIME", value_parser = mkfs::parse_duration)]
    lease: Option<Duration>,
    /// How long a write may be on its way to the device [default: 120s]. Others wait so much longer for a node that they
    /// cannot fence
    #[arg(long, value_name = "TIME", value_parser = mkfs::parse_duration)]
    queue_time: Option<Duration>,
    /// How nodes take locks
    #[arg(long, value_enum, default_value = "caw")]
    locks: LockKind,
    /// UUID of the volume [default: random]
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    uuid: Option<[u8; 16]>,
    /// Destroy what is on the device, even a volume that nodes use
    #[arg(short, long)]
    force: bool,
    /// Print only errors
    #[arg(short, long)]
    quiet: bool,
    /// Block device, image file or iscsi://[USER@]HOST[:PORT]/TARGET/LUN
    device: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum LockKind {
    /// By the device's compare-and-write
    Caw,
    /// By reads and writes alone: slower to hand over, for kernel block devices that several hosts share
    Plain,
}

fn uuid(s: &str) -> Result<[u8; 16], String> {
    mkfs::parse_uuid(s).ok_or_else(|| format!("'{s}' is not a UUID"))
}

fn main() -> ExitCode {
    // Usage errors end with 2 here, help and version with 0.
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mkfs.clusterfs: {e}");
            ExitCode::from(1)
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    mkfs::in_use::check(&args.device)?;
    let image = std::fs::metadata(&args.device).is_ok_and(|m| m.is_file());
    let timeouts = mkfs::timeouts::choose(args.lease, args.queue_time, image)?;
    let locks = match args.locks {
        LockKind::Caw => Locks::CompareAndWrite,
        LockKind::Plain => Locks::Plain,
    };
    let mut random = [0; 48];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let now = Time { secs: i64::try_from(now.as_secs())?, nanos: now.subsec_nanos() };
    let opts = FormatOptions {
        label: args.label.clone(),
        nodes: args.nodes,
        journal_size: args.journal_size,
        max_size: args.max_size,
        uuid: args.uuid,
        force: args.force,
        timeouts,
        locks,
        ..FormatOptions::new(random, now)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let made = runtime.block_on(async {
        let dev = open(&args.device).await?;
        let mut line = ProgressLine { shown: 0, on: !args.quiet && std::io::stderr().is_terminal() };
        let made = mkfs::format(&dev, &opts, &mut |p| line.show(p)).await;
        line.clear();
        dev.unregister().await?;
        Ok::<_, Box<dyn std::error::Error>>(made.map_err(|e| format!("{}: {e}", args.device.display()))?)
    })?;
    if !args.quiet {
        writeln!(std::io::stdout(), "{}: new clusterfs volume\n{made}", args.device.display())?;
    }
    Ok(())
}

/// Opens the device. Where it holds a volume, with that volume's sector size, so that its slots can be read.
async fn open(path: &Path) -> Result<Arc<dyn BlockDevice>, Box<dyn std::error::Error>> {
    let dev = blockdev::open::open(path, User::Tool, None, &Settings::default()).await?;
    let first = dev.read(IoClass::Meta, 0, 4096).await?;
    match Superblock::decode(&first) {
        Ok(old) if old.sector_size != dev.geometry().sector_size && !has_sectors_of_its_own(dev.as_ref()) => {
            Ok(blockdev::open::open(path, User::Tool, Some(old.sector_size), &Settings::default()).await?)
        }
        _ => Ok(dev),
    }
}

/// One line on the terminal that is written over.
struct ProgressLine {
    shown: usize,
    on: bool,
}

impl ProgressLine {
    fn show(&mut self, p: Progress) {
        let percent = |done: u64| done * 100 / p.total.max(1);
        if !self.on || (p.done > 1 && percent(p.done) == percent(p.done - 1)) {
            return;
        }
        let text = format!("{}: {} %", p.what, percent(p.done));
        eprint!("\r{text:width$}", width = self.shown);
        self.shown = text.len();
    }

    fn clear(&mut self) {
        if self.shown > 0 {
            eprint!("\r{:width$}\r", "", width = self.shown);
        }
    }
}
