//! `clusterfs probe`: whether a device will do for a volume.
//!
//! | module | job |
//! |---|---|
//! | [`look`] | what the device says of itself, and how fast it reads: nothing is written |
//! | [`kernel`] | what this host's kernel says of a block device |
//! | [`scratch`] | a blank place to write to, on a device that carries nothing |
//! | [`write`] | with `--write`: compare-and-write races, durable writes, fencing |
//! | [`report`] | the verdicts, for people and as JSON |

mod kernel;
mod look;
mod report;
mod scratch;
#[cfg(test)]
mod tests;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::iscsi::Settings;
use blockdev::open::{User, is_iscsi};
use blockdev::{BlockDevice, FencingKind};

use crate::Error;
use report::{Finding, Level, Report};

/// Connections that race for one sector: each is to the device what a node of its own is.
const CONNECTIONS: usize = 4;

#[derive(clap::Args)]
pub struct Args {
    /// Also write to a blank place of a device that carries nothing, and put back what was there
    #[arg(long)]
    write: bool,
    /// Machine-readable output
    #[arg(long)]
    json: bool,
    /// Block device, image file or iscsi://[USER@]HOST[:PORT]/TARGET/LUN
    device: PathBuf,
}

/// What kind of device a name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Iscsi,
    BlockDevice,
    Image,
}

impl Kind {
    fn of(path: &Path) -> Self {
        use std::os::unix::fs::FileTypeExt;
        if is_iscsi(path) {
            Self::Iscsi
        } else if std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device()) {
            Self::BlockDevice
        } else {
            Self::Image
        }
    }
}

/// The report, and whether the device is fit.
pub async fn run(args: &Args) -> Result<(String, bool), Error> {
    let report = probe(&args.device, args.write).await?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() };
    Ok((text, report.fit))
}

async fn probe(path: &Path, write: bool) -> Result<Report, Error> {
    let kind = Kind::of(path);
    let dev = blockdev::open::open(path, User::Reader, None, &Settings::default()).await?;
    let mut report = Report::new(path.display().to_string(), kind, dev.as_ref());
    if kind == Kind::BlockDevice {
        report.kernel = kernel::queue(path);
    }
    look::look(&dev, &mut report).await;
    let dev = dev as Arc<dyn BlockDevice>;
    if write {
        if report.fit() {
            write_to(path, &dev, &mut report).await;
        } else {
            report.add("writes", Level::Note, "not tried on a device that is not fit anyway");
        }
    }
    report.conclude(write);
    Ok(report)
}

/// Opens the connections and does what needs them; a device that must not be written to is not.
async fn write_to(path: &Path, reader: &Arc<dyn BlockDevice>, report: &mut Report) {
    if let Err(e) = mkfs::in_use::check(path) {
        return report.push(Finding::new("scratch", Level::Fail, e.to_string()));
    }
    let place = match scratch::find(reader.as_ref()).await {
        Ok(place) => place,
        Err(why) => return report.push(Finding::new("scratch", Level::Fail, why)),
    };
    let mut devices: Vec<Arc<dyn BlockDevice>> = Vec::new();
    for number in 0..CONNECTIONS {
        // As a node: nothing is registered yet.
        let user = if number > 0 && one_path(report) { User::BesideNode } else { User::Node };
        match blockdev::open::open(path, user, None, &Settings::default()).await {
            Ok(dev) => devices.push(dev),
            Err(e) => return report.push(Finding::new("connections", Level::Fail, e.to_string())),
        }
    }
    for finding in write::check(&devices, place, one_path(report)).await {
        report.push(finding);
    }
}

/// Whether all that this host sends to the device is of one registration.
fn one_path(report: &Report) -> bool {
    report.of() == Kind::BlockDevice && report.compare_and_write.is_some()
}

/// Whether others can be kept from writing.
fn fences(dev: &dyn BlockDevice) -> bool {
    dev.geometry().fencing == FencingKind::Reservations
}
