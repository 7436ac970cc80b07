//! fsck.clusterfs as a library: arguments, opening the device, printing a [`Report`]. The check itself is
//! [`fs_core::check`].

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::image::{ImageFile, OpenError, OpenMode};
use blockdev::{BlockDevice, IoClass};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use fs_core::check::{CheckError, Options, Progress, Report, check_with};
use fs_core::format::layout::BLOCK;
use fs_core::format::superblock::Superblock;

/// Exit codes of fsck(8).
pub mod exit {
    pub const CLEAN: u8 = 0;
    pub const UNCORRECTED: u8 = 4;
    pub const OPERATIONAL: u8 = 8;
    pub const USAGE: u8 = 16;
    pub const CANCELLED: u8 = 32;
}

/// Checks a clusterfs volume that no node has mounted.
///
/// Exit codes: 0 no errors, 4 errors left uncorrected, 8 operational error, 16 usage error, 32 cancelled.
#[derive(Debug, Parser)]
#[command(name = "fsck.clusterfs", version, disable_version_flag = true)]
pub struct Args {
    /// Only check, change nothing (what happens without any option too).
    #[arg(short = 'n', conflicts_with_all = ["preen", "yes"])]
    pub no: bool,
    /// Repair what is safe to repair. Not in this version.
    #[arg(short = 'p', conflicts_with = "yes")]
    pub preen: bool,
    /// Repair everything. Not in this version.
    #[arg(short = 'y')]
    pub yes: bool,
    /// Read also the contents of all files, to find sectors that the device cannot give back.
    #[arg(short = 'f')]
    pub full: bool,
    /// Print the version.
    #[arg(short = 'V', action = clap::ArgAction::Version)]
    version: Option<bool>,
    /// Image file or block device.
    #[arg(value_name = "DEVICE")]
    pub device: PathBuf,
}

/// Parses arguments; `Err` is the exit code, with everything said already.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, u8> {
    let args = Args::try_parse_from(args).map_err(|e| {
        let _ = e.print();
        match e.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => exit::CLEAN,
            _ => exit::USAGE,
        }
    })?;
    if args.preen || args.yes {
        let e =
            Args::command().error(ErrorKind::InvalidValue, "repair is not implemented in this version; run with -n");
        let _ = e.print();
        return Err(exit::USAGE);
    }
    Ok(args)
}

#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// Opens the device read-only, with the sector size that the volume was made with.
pub async fn open(path: &Path) -> Result<Arc<dyn BlockDevice>, FsckError> {
    let dev = ImageFile::open(path, OpenMode::ReadOnly)?;
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await.map_err(CheckError::from)?;
    match Superblock::decode(&first) {
        Ok(sb) if sb.sector_size != dev.geometry().sector_size => {
            Ok(ImageFile::open_with_sector_size(path, OpenMode::ReadOnly, sb.sector_size)?)
        }
        _ => Ok(dev),
    }
}

/// Checks a device.
pub async fn run(args: &Args, progress: Option<&(dyn Fn(Progress) + Sync)>) -> Result<Report, FsckError> {
    let dev = open(&args.device).await?;
    Ok(check_with(&dev, Options { read_contents: args.full }, progress).await?)
}

/// Prints the findings, one per line, and a summary.
pub fn print(out: &mut dyn Write, device: &Path, args: &Args, report: &Report) -> std::io::Result<()> {
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
    if !args.no {
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
pub fn code(outcome: &Result<Report, FsckError>) -> u8 {
    match outcome {
        Ok(r) if r.is_clean() => exit::CLEAN,
        Ok(_) => exit::UNCORRECTED,
        Err(_) => exit::OPERATIONAL,
    }
}
