//! `clusterfs top`: what a mounted node is doing, from its daemon (see [`fuse_mount::report`]).

use std::ffi::CString;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fuse_mount::report::{REPORT_MAX, REPORT_XATTR, Report};
use mkfs::Bytes;

use crate::Error;

#[derive(clap::Args)]
pub struct Args {
    /// One JSON object per report, a line each, with counts since the mount and, for domains, since the report before
    #[arg(long)]
    json: bool,
    /// Seconds between reports
    #[arg(long, short = 'd', default_value_t = 2.0, value_parser = interval)]
    interval: f64,
    /// Reports before it ends; by default until interrupted on a terminal, otherwise 1
    #[arg(long, short = 'n')]
    count: Option<u64>,
    /// Where the volume is mounted
    dir: PathBuf,
}

fn interval(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.5..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("from 0.5 to 3600 seconds".into()) }
}

/// Prints as it goes; an error names the mount point.
pub fn run(args: &Args) -> Result<(), Error> {
    let terminal = io::stdout().is_terminal() && !args.json;
    let count = args.count.unwrap_or(if terminal { u64::MAX } else { 1 });
    let mut before = ask(&args.dir)?;
    for _ in 0..count {
        std::thread::sleep(Duration::from_secs_f64(args.interval));
        let now = ask(&args.dir)?;
        let text = if args.json { serde_json::to_string(&now)? + "\n" } else { text(&args.dir, &before, &now)? };
        // Cursor home, erase to the end of the screen.
        let screen = if terminal { "\x1b[H\x1b[J" } else { "" };
        let mut out = io::stdout().lock();
        if let Err(e) = write!(out, "{screen}{text}").and_then(|()| out.flush()) {
            // A reader that closes the pipe early has what it wanted.
            return if e.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e.into()) };
        }
        before = now;
    }
    Ok(())
}

fn ask(dir: &Path) -> Result<Report, Error> {
    let json = read_xattr(dir).map_err(|e| match e.raw_os_error() {
        // SAFETY: no arguments, cannot fail.
        Some(libc::ENODATA) if unsafe { libc::geteuid() } != 0 => {
            format!("{}: only root may ask for this", dir.display())
        }
        Some(libc::ENODATA | libc::EOPNOTSUPP) => {
            format!("{}: no clusterfs volume is mounted here (name the mount point itself)", dir.display())
        }
        _ => format!("{}: {e}", dir.display()),
    })?;
    serde_json::from_slice(&json).map_err(|e| {
        format!("{}: the mount's daemon is of another version than this program ({e})", dir.display()).into()
    })
}

fn read_xattr(dir: &Path) -> io::Result<Vec<u8>> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    let name = CString::new(REPORT_XATTR)?;
    let mut value = vec![0u8; REPORT_MAX];
    // SAFETY: both strings end with a zero byte, the buffer is as long as said.
    let n = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    value.truncate(n);
    Ok(value)
}

/// Counts per second between two reports. A mount that became a member again counts some things anew: no rate then.
struct Rates(f64);

impl Rates {
    fn of(&self, before: u64, now: u64) -> f64 {
        now.saturating_sub(before) as f64 / self.0
    }
}

fn text(dir: &Path, before: &Report, now: &Report) -> Result<String, std::fmt::Error> {
    let mut s = String::new();
    let rates = Rates((now.uptime_ms.saturating_sub(before.uptime_ms) as f64 / 1000.0).max(0.001));
    let label = if now.label.is_empty() { String::new() } else { format!(" \"{}\"", now.label) };
    let up = Duration::from_secs(now.uptime_ms / 1000);
    writeln!(
        s,
        "{}: {}{label}, node {}.{}, up {}",
        dir.display(),
        now.device,
        now.slot,
        now.incarnation,
        duration(up)
    )?;
    let (j, jb) = (&now.journal, &before.journal);
    writeln!(
        s,
        "journal {} of {} in use, {:.1} records/s, {}/s",
        Bytes(j.used),
        Bytes(j.size),
        rates.of(jb.records, j.records),
        Bytes(rates.of(jb.record_bytes, j.record_bytes) as u64),
    )?;
    let (d, db) = (&now.device_io, &before.device_io);
    writeln!(
        s,
        "device {:.1} reads/s ({}/s), {:.1} writes/s ({}/s), {:.1} flushes/s, {:.1} compare-and-writes/s",
        rates.of(db.reads, d.reads),
        Bytes(rates.of(db.bytes_read, d.bytes_read) as u64),
        rates.of(db.writes, d.writes),
        Bytes(rates.of(db.bytes_written, d.bytes_written) as u64),
        rates.of(db.flushes, d.flushes),
        rates.of(db.compare_and_writes, d.compare_and_writes),
    )?;
    let (l, lb) = (&now.locks, &before.locks);
    writeln!(
        s,
        "locks {:.1} acquired/s, {:.1} waited for/s, {:.1} handovers/s, {:.1} hints/s, {:.1} doorbells/s; {} recoveries",
        rates.of(lb.acquires, l.acquires),
        rates.of(lb.waits, l.waits),
        rates.of(lb.handovers, l.handovers),
        rates.of(lb.hints_sent, l.hints_sent),
        rates.of(lb.doorbells_written, l.doorbells_written),
        l.recoveries,
    )?;
    writeln!(s, "requests/s {}", requests(&rates, before, now))?;
    let period = (now.period_ms as f64 / 1000.0).max(0.001);
    writeln!(s, "\n{:>12} {:>12} {:>10}  {:<9}  directory", "operations/s", "given up/s", "acquired/s", "held")?;
    for d in &now.domains {
        let per_second = |n: u64| n as f64 / period;
        let path = d.path.clone().unwrap_or_else(|| format!("(domain {})", d.domain));
        writeln!(
            s,
            "{:>12.1} {:>12.1} {:>10.1}  {:<9}  {path}",
            per_second(d.operations),
            per_second(d.given_up),
            per_second(d.acquired),
            d.held.as_deref().unwrap_or("-"),
        )?;
    }
    Ok(s)
}

/// The most frequent kinds first.
fn requests(rates: &Rates, before: &Report, now: &Report) -> String {
    let rate = |kind: &String, n: &u64| rates.of(before.requests.get(kind).copied().unwrap_or(0), *n);
    let mut kinds: Vec<(f64, &String)> = now.requests.iter().map(|(kind, n)| (rate(kind, n), kind)).collect();
    kinds.retain(|(r, _)| *r > 0.0);
    kinds.sort_by(|a, b| b.0.total_cmp(&a.0));
    let words: Vec<String> = kinds.iter().take(8).map(|(r, kind)| format!("{kind} {r:.1}")).collect();
    if words.is_empty() { "none".into() } else { words.join(", ") }
}

fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match (s / 86400, s / 3600 % 24, s / 60 % 60, s % 60) {
        (0, 0, m, s) => format!("{m}:{s:02}"),
        (0, h, m, s) => format!("{h}:{m:02}:{s:02}"),
        (d, h, m, _) => format!("{d}d {h}:{m:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_and_durations() {
        assert_eq!(interval("2"), Ok(2.0));
        assert!(interval("0").is_err() && interval("x").is_err() && interval("NaN").is_err());
        assert_eq!(duration(Duration::from_secs(65)), "1:05");
        assert_eq!(duration(Duration::from_secs(3 * 3600 + 61)), "3:01:01");
        assert_eq!(duration(Duration::from_secs(2 * 86400 + 60)), "2d 0:01");
    }

    #[test]
    fn a_directory_that_is_no_mount_is_refused_with_the_reason() {
        let e = ask(Path::new("/proc")).unwrap_err().to_string();
        assert!(e.contains("/proc: no clusterfs volume is mounted here"), "{e}");
        let e = ask(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(e.contains("/nowhere: No such file"), "{e}");
    }
}
