//! How long it takes until others go on after a node was killed.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::{Cluster, Result};

/// One round's figures.
struct Takeover {
    /// From the kill to the survivor's first answer.
    total: Duration,
    /// Of it, from the survivor's first read of the dead node's journal to the end of the replay.
    replay: Duration,
    records: u64,
    blocks: u64,
}

/// Rounds of a killed node, with journals of this size as mkfs takes it.
pub fn takeover(journal: &str, rounds: usize, image: Option<&Path>) -> Result<()> {
    let limit = Duration::from_secs(60 + 60 * rounds as u64);
    let options = ["--journal-size", journal];
    const BYTES: u64 = 8 << 30;
    let c = match image {
        Some(path) => {
            File::create_new(path).map_err(|e| format!("{}: {e}", path.display()))?.set_len(BYTES)?;
            Cluster::formatted_on(path, 3, limit, &options)?
        }
        None => Cluster::formatted_with(3, BYTES, limit, &options)?,
    };
    c.mount_with(0, "rw,noatime,log=info")?;
    let mut all = Vec::new();
    for round in 0..rounds {
        c.mount_with(1, "rw,noatime,log=info")?;
        let one = one_takeover(&c, round)?;
        println!(
            "round {round}: goes on after {} ms, {} ms of it replay of {} records into {} blocks",
            one.total.as_millis(),
            one.replay.as_millis(),
            one.records,
            one.blocks
        );
        all.push(one);
    }
    all.sort_by_key(|t| t.total);
    let (median, worst) = (&all[rounds / 2], &all[rounds - 1]);
    let mut replays: Vec<_> = all.iter().map(|t| t.replay).collect();
    replays.sort();
    println!(
        "journals of {journal}: goes on after {} ms (median), {} ms (worst); replay {} ms (median), {} ms (worst)",
        median.total.as_millis(),
        worst.total.as_millis(),
        replays[rounds / 2].as_millis(),
        replays[rounds - 1].as_millis()
    );
    c.finish();
    if let Some(path) = image {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Node 1 dies at a moment that differs from round to round, so that its journal is filled differently; not before its
/// first commit without an fsync, after 5 s.
fn one_takeover(c: &Cluster, round: usize) -> Result<Takeover> {
    let dir = c.mount_point(1).join(format!("round{round}"));
    fs::create_dir(&dir)?;
    File::open(&dir)?.sync_all()?;
    let before = c.log_text(0).len();
    let stop = AtomicBool::new(false);
    let killed = std::thread::scope(|s| {
        let maker = s.spawn(|| make_files(&dir, &stop));
        std::thread::sleep(Duration::from_millis(5500 + 370 * round as u64));
        let killed = c.kill9(1);
        stop.store(true, Ordering::Relaxed);
        // It ends with an error: its mount is gone.
        drop(maker.join());
        killed.map(|()| Instant::now())
    })?;
    let there = fs::read_dir(c.mount_point(0).join(format!("round{round}")))?.count();
    let total = killed.elapsed();
    if there == 0 {
        return Err("nothing was made: this measures nothing".into());
    }
    let log = c.log_text(0);
    let lines: Vec<&str> = log[before..].lines().collect();
    let find = |what: &str| lines.iter().find(|l| l.contains(what)).ok_or(format!("no line \"{what}\" in the log"));
    let (begin, end) = (find("replaying its journal")?, find("journal replayed")?);
    Ok(Takeover {
        total,
        replay: Duration::from_secs_f64(seconds(end)? - seconds(begin)?),
        records: number(end, "records: ")?,
        blocks: number(end, "blocks_written: ")?,
    })
}

fn make_files(dir: &Path, stop: &AtomicBool) -> std::io::Result<()> {
    for i in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        File::create(dir.join(format!("file{i:08}")))?.write_all(b"small")?;
    }
    Ok(())
}

/// The second of the day that a line of the log begins with.
fn seconds(line: &str) -> Result<f64> {
    let time = line.split_once('T').and_then(|(_, rest)| rest.split_once('Z')).map(|(time, _)| time);
    let parts: Vec<f64> = time.unwrap_or_default().split(':').filter_map(|p| p.parse().ok()).collect();
    match parts[..] {
        [h, m, s] => Ok((h * 60.0 + m) * 60.0 + s),
        _ => Err(format!("no time in: {line}").into()),
    }
}

fn number(line: &str, name: &str) -> Result<u64> {
    let digits = line.split_once(name).map(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next());
    digits.flatten().and_then(|d| d.parse().ok()).ok_or_else(|| format!("no {name} in: {line}").into())
}
