//! mkfs.clusterfs: makes a volume. The work is in the library; here are arguments, messages and exit codes.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use blockdev::image::{ImageFile, OpenMode};
use blockdev::{BlockDevice, IoClass};
use clap::Parser;
use fs_core::format::item::Time;
use fs_core::format::superblock::Superblock;
use mkfs::{FormatOptions, Progress};

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
    /// UUID of the volume [default: random]
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    uuid: Option<[u8; 16]>,
    /// Destroy what is on the device, even a volume that nodes use
    #[arg(short, long)]
    force: bool,
    /// Print only errors
    #[arg(short, long)]
    quiet: bool,
    /// Block device or image file
    device: PathBuf,
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
    let mut random = [0; 48];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let now = Time { secs: i64::try_from(now.as_secs())?, nanos: now.subsec_nanos() };
    let opts = FormatOptions {
        label: args.label.clone(),
        nodes: args.nodes,
        journal_size: args.journal_size,
        uuid: args.uuid,
        force: args.force,
        ..FormatOptions::new(random, now)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let made = runtime.block_on(async {
        let dev = open(&args.device).await?;
        let mut line = ProgressLine { shown: 0, on: !args.quiet && std::io::stderr().is_terminal() };
        let made = mkfs::format(&dev, &opts, &mut |p| line.show(p)).await;
        line.clear();
        Ok::<_, Box<dyn std::error::Error>>(made.map_err(|e| format!("{}: {e}", args.device.display()))?)
    })?;
    if !args.quiet {
        writeln!(std::io::stdout(), "{}: new clusterfs volume\n{made}", args.device.display())?;
    }
    Ok(())
}

/// Opens the device. Where it holds a volume, with that volume's sector size, so that its slots can be read.
async fn open(path: &Path) -> Result<Arc<dyn BlockDevice>, Box<dyn std::error::Error>> {
    let dev = ImageFile::open(path, OpenMode::ReadWrite)?;
    let first = dev.read(IoClass::Meta, 0, 4096).await?;
    match Superblock::decode(&first) {
        Ok(old) if old.sector_size != dev.geometry().sector_size => {
            Ok(ImageFile::open_with_sector_size(path, OpenMode::ReadWrite, old.sector_size)?)
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
