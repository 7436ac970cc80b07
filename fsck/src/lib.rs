//! fsck.clusterfs as a library: arguments, opening the device, printing the [`Outcome`]. The check itself is
//! [`fs_core::check`], what it changes [`fs_core::repair`].

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::image::{ImageFile, OpenError, OpenMode};
use blockdev::{BlockDevice, IoClass};
use clap::Parser;
use clap::error::ErrorKind;
use fs_core::check::{CheckError, Options, Progress, Report, check_with};
use fs_core::format::layout::BLOCK;
use fs_core::format::superblock::Superblock;
use fs_core::repair::{self, Repair, RepairError};
use serde_json::json;

/// Exit codes of fsck(8).
pub mod exit {
    pub const CLEAN: u8 = 0;
    pub const CORRECTED: u8 = 1;
    pub const UNCORRECTED: u8 = 4;
    pub const OPERATIONAL: u8 = 8;
    pub const USAGE: u8 = 16;
    pub const CANCELLED: u8 = 32;
}

/// Checks a clusterfs volume that no node has mounted, and repairs a part of what it finds.
///
/// Exit codes: 0 no errors, 1 errors corrected, 4 errors left uncorrected, 8 operational error, 16 usage error, 32 cancelled.
#[derive(Debug, Parser)]
#[command(name = "fsck.clusterfs", version, disable_version_flag = true)]
pub struct Args {
    /// Only check, change nothing (what happens without any option too).
    #[arg(short = 'n', conflicts_with_all = ["preen", "yes"])]
    pub no: bool,
    /// Replay the journals of dead nodes, and write a damaged superblock from its copy or the copy from the superblock.
    #[arg(short = 'p', visible_short_alias = 'a', conflicts_with = "yes")]
    pub preen: bool,
    /// As -p, and bring back a superblock that was zeroed. Trees, bitmaps and counts are not repaired in this version.
    #[arg(short = 'y')]
    pub yes: bool,
    /// Read also the contents of all files, to find sectors that the device cannot give back.
    #[arg(short = 'f')]
    pub full: bool,
    /// Print the outcome as one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Print the version.
    #[arg(short = 'V', action = clap::ArgAction::Version)]
    version: Option<bool>,
    /// Image file or block device.
    #[arg(value_name = "DEVICE")]
    pub device: PathBuf,
}

/// Parses arguments; `Err` is the exit code, with everything said already.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, u8> {
    Args::try_parse_from(args).map_err(|e| {
        let _ = e.print();
        match e.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => exit::CLEAN,
            _ => exit::USAGE,
        }
    })
}

#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Repair(#[from] RepairError),
}

/// What was done, and what there is after it.
pub struct Outcome {
    pub repairs: Vec<Repair>,
    pub report: Report,
}

/// Opens the device, with the sector size that the volume was made with.
pub async fn open(path: &Path, mode: OpenMode) -> Result<Arc<dyn BlockDevice>, FsckError> {
    let dev = ImageFile::open(path, mode)?;
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await.map_err(CheckError::from)?;
    match Superblock::decode(&first) {
        Ok(sb) if sb.sector_size != dev.geometry().sector_size => {
            Ok(ImageFile::open_with_sector_size(path, mode, sb.sector_size)?)
        }
        _ => Ok(dev),
    }
}

/// Checks a device, and repairs it if that was asked for.
pub async fn run(args: &Args, progress: Option<&(dyn Fn(Progress) + Sync)>) -> Result<Outcome, FsckError> {
    let options = Options { read_contents: args.full };
    let writes = args.preen || args.yes;
    let mode = if writes { OpenMode::ReadWrite } else { OpenMode::ReadOnly };
    let mut dev = open(&args.device, mode).await?;
    // Also refuses a volume that is mounted, before anything is written.
    let mut report = check_with(&dev, options, progress).await?;
    let mut repairs = Vec::new();
    if writes {
        if let Some(r) = repair::superblock(&dev, args.yes).await? {
            repairs.push(r);
            // Only now the right sector size may be known.
            dev = open(&args.device, mode).await?;
        }
        if report.replayable {
            repairs.extend(repair::recover(&dev, &report.dead, rand::random()).await?);
        }
        if !repairs.is_empty() {
            report = check_with(&dev, options, progress).await?;
        }
    }
    Ok(Outcome { repairs, report })
}

/// The outcome as JSON; the keys are those of the manual page.
pub fn to_json(device: &Path, outcome: &Outcome) -> serde_json::Value {
    let r = &outcome.report;
    let lines = |place: &str, text: &str| json!({ "place": place, "text": text });
    json!({
        "device": device.to_string_lossy(),
        "label": r.label,
        "clean": r.is_clean(),
        "repairs": outcome.repairs.iter().map(|x| lines(&x.place, &x.text)).collect::<Vec<_>>(),
        "errors": r.violations.iter().map(|x| lines(&x.place, &x.text)).collect::<Vec<_>>(),
        "error_count": r.violation_count,
        "notes": r.notes,
        "files": r.files,
        "directories": r.dirs,
        "symlinks": r.symlinks,
        "others": r.specials,
        "orphans": r.orphans,
        "bytes": r.bytes,
        "domains": r.domains,
        "tree_nodes": r.tree_nodes,
        "blocks_used": r.blocks_used,
        "blocks_free": r.blocks_free,
    })
}

/// Prints the findings, one per line, and a summary.
pub fn print(out: &mut dyn Write, device: &Path, args: &Args, outcome: &Outcome) -> std::io::Result<()> {
    if args.json {
        return writeln!(out, "{}", to_json(device, outcome));
    }
    let report = &outcome.report;
    for r in &outcome.repairs {
        writeln!(out, "repaired: {r}")?;
    }
    for v in &report.violations {
        writeln!(out, "{v}")?;
    }
    let rest = report.violation_count.saturating_sub(report.violations.len() as u64);
    if rest > 0 {
        writeln!(out, "and {rest} more")?;
    }
    for n in &report.notes {
        writeln!(out, "note: {n}")?;
    }
    let writes = args.preen || args.yes;
    if writes && !report.is_clean() {
        let more = if args.preen { " (-y also brings back a zeroed superblock, nothing else)" } else { "" };
        writeln!(out, "note: this version cannot repair the errors above{more}")?;
    }
    if !args.no && !writes {
        writeln!(out, "note: nothing was changed: without an option, as with -n, the volume is only checked")?;
    }
    let r = report;
    let state = match r.violation_count {
        0 => "clean".to_string(),
        1 => "1 error".to_string(),
        n => format!("{n} errors"),
    };
    let total = r.blocks_used + r.blocks_free;
    writeln!(
        out,
        "{}: clusterfs: {state}, {} files ({} bytes), {} directories, {} symbolic links, {} others, {} domains, {} of {total} blocks in use",
        device.display(),
        r.files,
        r.bytes,
        r.dirs,
        r.symlinks,
        r.specials,
        r.domains,
        r.blocks_used,
    )
}

/// The exit code for an outcome.
pub fn code(outcome: &Result<Outcome, FsckError>) -> u8 {
    match outcome {
        Ok(o) if !o.report.is_clean() => exit::UNCORRECTED,
        Ok(o) if !o.repairs.is_empty() => exit::CORRECTED,
        Ok(_) => exit::CLEAN,
        Err(_) => exit::OPERATIONAL,
    }
}
