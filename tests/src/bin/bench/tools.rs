//! How long it takes to make a filesystem and to check one.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use clusterfs_tests::bench::place::program;
use clusterfs_tests::cluster::{Cluster, Result, umount};
use clusterfs_tests::mail::{Mailer, make_maildir};

const BYTES: u64 = 16 << 30;
const MESSAGES: usize = 10_000;
const LIMIT: Duration = Duration::from_secs(600);

/// Prints the median of each program's times, with a volume of [`MESSAGES`] messages in 10 mailboxes to check.
pub fn tools(store: &Path, rounds: usize) -> Result<()> {
    let store = tempfile::tempdir_in(store)?;
    let mut times: Vec<(&str, Vec<Duration>, Vec<Duration>)> =
        ["clusterfs", "ext4", "xfs"].map(|kind| (kind, Vec::new(), Vec::new())).into();
    for _ in 0..rounds {
        for (kind, mkfs, check) in &mut times {
            let (made, checked) = match *kind {
                "clusterfs" => clusterfs(store.path())?,
                kind => local(kind, store.path())?,
            };
            mkfs.push(made);
            check.push(checked);
        }
    }
    println!("| | mkfs of 16 GiB, ms | check with {MESSAGES} messages, ms |\n|---|--:|--:|");
    for (kind, mkfs, check) in times {
        println!("| {kind} | {} | {} |", median(mkfs).as_millis(), median(check).as_millis());
    }
    Ok(())
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort();
    of[of.len() / 2]
}

fn timed(f: impl FnOnce() -> Result<String>) -> Result<Duration> {
    let begin = Instant::now();
    f().map(|_| begin.elapsed())
}

fn image(store: &Path, kind: &str) -> Result<std::path::PathBuf> {
    let path = store.join(format!("{kind}.img"));
    File::create(&path)?.set_len(BYTES)?;
    Ok(path)
}

fn fill(root: &Path) -> Result<()> {
    let mut mailer = Mailer::new(1).largest(16 << 10);
    for b in 0..10 {
        let to = root.join(format!("box{b}"));
        make_maildir(&to)?;
        (0..MESSAGES / 10).try_for_each(|n| fs::write(to.join(format!("new/{n}")), mailer.message().bytes))?;
    }
    Ok(())
}

fn clusterfs(store: &Path) -> Result<(Duration, Duration)> {
    let image = image(store, "clusterfs")?;
    let begin = Instant::now();
    let c = Cluster::formatted_on(&image, 4, LIMIT, &[])?;
    let made = begin.elapsed();
    c.mount(0)?;
    fill(&c.mount_point(0))?;
    c.unmount(0)?;
    Ok((made, timed(|| c.program("fsck.clusterfs", &["-n"]))?))
}

fn local(kind: &str, store: &Path) -> Result<(Duration, Duration)> {
    let image = image(store, kind)?;
    let image = image.to_str().ok_or("a name is not UTF-8")?;
    let made = timed(|| program(&format!("mkfs.{kind}"), &["-q", image]))?;
    let dir = tempfile::tempdir()?;
    let on = dir.path().to_str().ok_or("a name is not UTF-8")?;
    program("mount", &["-t", kind, "-o", "loop", image, on])?;
    let filled = fill(dir.path());
    umount(dir.path(), 0)?;
    filled?;
    let checked = match kind {
        "ext4" => timed(|| program("e2fsck", &["-f", "-n", image]))?,
        _ => timed(|| program("xfs_repair", &["-n", "-f", image]))?,
    };
    Ok((made, checked))
}
