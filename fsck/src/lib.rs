//! fsck.clusterfs as a library: arguments, opening the device, printing the [`Outcome`]. The check itself is
//! [`fs_core::check`], what it changes [`fs_core::repair`].

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockdev::image::OpenMode;
use blockdev::iscsi::Settings;
use blockdev::open::{NameError, User, has_sectors_of_its_own};
use blockdev::{BlockDevice, IoClass};
use clap::Parser;
use clap::error::ErrorKind;
use fs_core::check::{CheckError, Options, Progress, check_with};
use fs_core::format::layout::{BLOCK, NEAR_COPY};
use fs_core::format::superblock::Superblock;
use fs_core::repair::{self, Outcome, RepairError};
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

/// Checks a clusterfs volume that no node has mounted, and repairs what it finds.
///
/// Exit codes: 0 no errors, 1 errors corrected, 4 errors left uncorrected, 8 operational error, 16 usage error, 32 cancelled.
#[derive(Debug, Parser)]
#[command(name = "fsck.clusterfs", version, disable_version_flag = true)]
pub struct Args {
    /// Only check, change nothing (what happens without any option too).
    #[arg(short = 'n', conflicts_with_all = ["preen", "yes"])]
    pub no: bool,
    /// Repair what costs nothing: journals of dead nodes, the superblock or its copy, counts, bitmaps, inodes without names.
    /// Changes no tree if anything in the trees can only be repaired by -y.
    #[arg(short = 'p', visible_short_alias = 'a', conflicts_with = "yes")]
    pub preen: bool,
    /// Repair everything that can be repaired, whatever is lost by it.
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
    /// Image file, block device or iscsi://[USER@]HOST[:PORT]/TARGET/LUN.
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
    Open(#[from] NameError),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Repair(#[from] RepairError),
}

/// Opens the device, with the sector size that the volume was made with; the superblock's copy knows it too.
pub async fn open(path: &Path, mode: OpenMode) -> Result<Arc<dyn BlockDevice>, FsckError> {
    let user = if mode == OpenMode::ReadWrite { User::Tool } else { User::Reader };
    let settings = Settings::default();
    let dev = blockdev::open::open(path, user, None, &settings).await?;
    let last = (dev.geometry().size / BLOCK).saturating_sub(1);
    for block in [0, NEAR_COPY, last] {
        let Ok(read) = dev.read(IoClass::Meta, block * BLOCK, BLOCK as usize).await else { continue };
        let Ok(sb) = Superblock::decode(&read) else { continue };
        if sb.sector_size != dev.geometry().sector_size && !has_sectors_of_its_own(dev.as_ref()) {
            return Ok(blockdev::open::open(path, user, Some(sb.sector_size), &settings).await?);
        }
        break;
    }
    Ok(dev)
}

/// Checks a device, and repairs it if that was asked for.
pub async fn run(args: &Args, progress: Option<&(dyn Fn(Progress) + Sync)>) -> Result<Outcome, FsckError> {
    let writes = args.preen || args.yes;
    let mode = if writes { OpenMode::ReadWrite } else { OpenMode::ReadOnly };
    let dev = open(&args.device, mode).await?;
    let outcome = run_on(&dev, args, progress).await;
    dev.unregister().await.map_err(CheckError::from)?;
    outcome
}

/// As [`run`], on a device that is open already.
pub async fn run_on(
    dev: &Arc<dyn BlockDevice>,
    args: &Args,
    progress: Option<&(dyn Fn(Progress) + Sync)>,
) -> Result<Outcome, FsckError> {
    let options = Options { read_contents: args.full };
    if args.preen || args.yes {
        return Ok(repair::run(dev, args.yes, options, rand::random(), progress).await?);
    }
    let report = check_with(dev, options, progress).await?;
    Ok(Outcome { repairs: Vec::new(), left: Vec::new(), report })
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
        "left_to_yes": outcome.left.iter().map(|x| lines(&x.place, &x.text)).collect::<Vec<_>>(),
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
        for l in &outcome.left {
            writeln!(out, "note: left: {l}")?;
        }
        if args.preen {
            writeln!(out, "note: run fsck.clusterfs -y: what is left can only be repaired by giving something up")?;
        } else {
            writeln!(out, "note: the errors above could not be repaired")?;
        }
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

/// What is being done, how far it is, how fast it goes, and how long it will take at that rate; `since` is how long it has been
/// going on.
pub fn progress_text(p: &Progress, since: Duration) -> String {
    let percent = 100 * p.done.min(p.total) / p.total.max(1);
    let mut text = format!("{}: {percent} %", p.phase);
    let seconds = since.as_secs_f64();
    if seconds < 1.0 || p.done == 0 {
        return text;
    }
    let rate = p.done as f64 / seconds;
    let left = (p.total.saturating_sub(p.done) as f64 / rate).round() as u64;
    let left = match left {
        0..60 => format!("{left} s"),
        60..3600 => format!("{} min {} s", left / 60, left % 60),
        _ => format!("{} h {} min", left / 3600, left % 3600 / 60),
    };
    text.push_str(&format!(" of {}, {rate:.0}/s, {left} left", p.total));
    text
}

/// The exit code for an outcome.
pub fn code(outcome: &Result<Outcome, FsckError>) -> u8 {
    match outcome {
        Ok(o) if !o.report.is_clean() && !o.repairs.is_empty() => exit::CORRECTED | exit::UNCORRECTED,
        Ok(o) if !o.report.is_clean() => exit::UNCORRECTED,
        Ok(o) if !o.repairs.is_empty() => exit::CORRECTED,
        Ok(_) => exit::CLEAN,
        Err(_) => exit::OPERATIONAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_has_rate_and_time_left() {
        let at =
            |done, total, secs| progress_text(&Progress { phase: "domains", done, total }, Duration::from_secs(secs));
        assert_eq!(at(0, 0, 0), "domains: 0 %");
        assert_eq!(at(10, 1000, 0), "domains: 1 %");
        assert_eq!(at(100, 1000, 2), "domains: 10 % of 1000, 50/s, 18 s left");
        assert_eq!(at(100, 10_000, 2), "domains: 1 % of 10000, 50/s, 3 min 18 s left");
        assert_eq!(at(100, 1_000_000, 2), "domains: 0 % of 1000000, 50/s, 5 h 33 min left");
        assert_eq!(at(7, 5, 2), "domains: 100 % of 5, 4/s, 0 s left");
    }
}
