//! What fsck and a mount say of a volume, as text that is kept beside it.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use blockdev::sim::{SimConfig, SimDisk};
use blockdev::{AlignedBuf, BlockDevice, FencingKind, IoClass};
use fs_core::Volume;

use super::{Error, mount_config, names};

/// Lines of a difference that are kept.
const SHOWN: usize = 6;
const FSCK_SHOWN: usize = 24;
/// Of the paused clock.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Runs fsck on an image: how it ended, and what it said.
pub fn fsck(programs: &Path, option: &str, image: &Path) -> Result<(i32, String), Error> {
    let out = Command::new(programs.join("fsck.clusterfs")).arg(option).arg("-f").arg(image).output()?;
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).replace(&*image.to_string_lossy(), "IMAGE");
    Ok((out.status.code().unwrap_or(-1), said))
}

/// Mounts a copy of the image and compares what is in it with the listing of the undamaged volume.
fn mount(image: &Path, whole: &str) -> Result<String, Error> {
    let bytes = std::fs::read(image)?;
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
    rt.block_on(async {
        let mut cfg = SimConfig::new(bytes.len() as u64, 12);
        cfg.fencing = FencingKind::ProcessLock;
        let disk = SimDisk::new(cfg);
        let raw: Arc<dyn BlockDevice> = disk.open_raw();
        raw.write(IoClass::Meta, 0, Arc::new(AlignedBuf::copy_of(&bytes)), false).await?;
        let mounted = tokio::time::timeout(PATIENCE, Volume::mount(mount_config(disk.open("reader"), 9))).await;
        let v = match mounted {
            Ok(Ok(v)) => v,
            Ok(Err(e)) => return Ok(format!("refused: {e}\n")),
            Err(_) => return Ok("does not end\n".into()),
        };
        let Ok(seen) = tokio::time::timeout(PATIENCE, names(&v)).await else {
            return Ok("reading does not end\n".into());
        };
        Ok(compare(whole, &seen))
    })
}

fn compare(whole: &str, seen: &[String]) -> String {
    let whole: Vec<&str> = whole.lines().collect();
    let same = seen.iter().filter(|l| whole.binary_search(&l.as_str()).is_ok()).count();
    let mut out = format!("mounted: {same} of {} names are as they were\n", whole.len());
    let lost = whole.iter().filter(|l| !seen.iter().any(|s| s == *l)).map(|l| format!("- {l}"));
    let new = seen.iter().filter(|l| whole.binary_search(&l.as_str()).is_err()).map(|l| format!("+ {l}"));
    for lines in [lost.collect::<Vec<_>>(), new.collect()] {
        lines.iter().take(SHOWN).for_each(|l| out.push_str(&format!("{l}\n")));
        if lines.len() > SHOWN {
            out.push_str(&format!("  and {} more\n", lines.len() - SHOWN));
        }
    }
    out
}

/// All that is said of a damaged volume, before and after its repair. The image is repaired.
pub fn said(programs: &Path, image: &Path, whole: &str) -> Result<String, Error> {
    let preened = image.with_extension("preened");
    std::fs::copy(image, &preened)?;
    let mut out = String::new();
    let mut run = |option: &str, image: &Path, show: bool| -> Result<(), Error> {
        let (code, text) = fsck(programs, option, image)?;
        writeln!(out, "$ fsck.clusterfs {option} -f IMAGE: exit status {code}")?;
        let lines: Vec<&str> = text.lines().collect();
        let shown = if show { lines.len().min(FSCK_SHOWN) } else { 0 };
        for l in lines.iter().take(shown) {
            writeln!(out, "{l}")?;
        }
        if show && lines.len() > shown {
            writeln!(out, "  and {} more lines, the last: {}", lines.len() - shown, lines[lines.len() - 1])?;
        }
        Ok(())
    };
    run("-n", image, true)?;
    run("-p", &preened, false)?;
    std::fs::remove_file(&preened)?;
    let before = mount(image, whole)?;
    run("-y", image, true)?;
    run("-n", image, false)?;
    write!(out, "$ mount before the repair\n{before}$ mount after the repair\n{}", mount(image, whole)?)?;
    Ok(out)
}
