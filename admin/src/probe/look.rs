//! What can be found out without writing.

use std::sync::Arc;
use std::time::Duration;

use blockdev::{BlockDevice, IoClass};
use fs_core::format::item::Time;
use mkfs::{FormatOptions, geometry, signature};
use rand::RngExt;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Kind;
use super::report::{Level, Reads, Report};

const READ: usize = 4096;
const SINGLE_READS: usize = 400;
const DEEP_READS: usize = 3200;
const DEPTH: usize = 32;
/// No measurement takes longer, however slow the device.
const LIMIT: Duration = Duration::from_secs(5);
/// A node that has to wait for a lock waits for several commands.
const SLOW: Duration = Duration::from_millis(100);
/// As long as a heartbeat: nodes that read so slowly see nobody's in time.
const TOO_SLOW: Duration = Duration::from_secs(1);

/// Looks at everything; what the device refuses is a finding.
pub async fn look(dev: &Arc<dyn BlockDevice>, report: &mut Report) {
    size(dev.as_ref(), report);
    commands(report);
    registrations(dev.as_ref(), report).await;
    contents(dev.as_ref(), report).await;
    match reads(dev).await {
        Ok(reads) => {
            judge(&reads, report);
            report.reads = Some(reads);
        }
        Err(e) => report.add("reads", Level::Fail, e),
    }
}

fn size(dev: &dyn BlockDevice, report: &mut Report) {
    let g = dev.geometry();
    let opts = FormatOptions::new([0; 48], Time { secs: 0, nanos: 0 });
    match geometry::superblock(g.size, g.sector_size, &opts) {
        Ok(sb) => report.add("size", Level::Ok, format!("room for a volume of {} nodes", sb.nodes)),
        Err(e) => report.add("size", Level::Fail, e.to_string()),
    }
}

fn commands(report: &mut Report) {
    match (report.compare_and_write, report.announced_compare_and_write) {
        (None, _) if report.of() == Kind::BlockDevice => report.add(
            "compare-and-write",
            Level::Warn,
            "by the locks of this host's kernel, which other hosts do not see: one host, or --locks=plain",
        ),
        (None, _) => report.add("compare-and-write", Level::Ok, "by the locks of this host's kernel: one host"),
        (Some(true), _) => report.add("compare-and-write", Level::Ok, "announced, and not refused"),
        (Some(false), Some(0)) => report.add(
            "compare-and-write",
            Level::Fail,
            "the device does not announce COMPARE AND WRITE, without which nodes cannot share it",
        ),
        (Some(false), _) => report.add(
            "compare-and-write",
            Level::Fail,
            "the device announces COMPARE AND WRITE and refuses it: nodes cannot share it",
        ),
    }
    match report.reservations {
        None => {}
        Some(true) => report.add("reservations", Level::Ok, "the device answers for persistent reservations"),
        Some(false) => report.add(
            "reservations",
            Level::Warn,
            "none: a dead node is waited out for lease and queue time (two minutes) instead of being fenced",
        ),
    }
}

async fn registrations(dev: &dyn BlockDevice, report: &mut Report) {
    let r = match dev.registrations().await {
        Ok(None) => return,
        Ok(Some(r)) => r,
        Err(e) => return report.add("registered", Level::Fail, e.to_string()),
    };
    let kind = r.reservation.unwrap_or("no reservation");
    let mut keys = r.foreign.clone();
    keys.extend(r.foreign_holder.filter(|key| !keys.contains(key)));
    if !keys.is_empty() {
        let keys: Vec<String> = keys.iter().map(|key| format!("{key:#x}")).collect();
        let text = format!(
            "another program uses the device ({kind}, key {}): mkfs and mount refuse it until that program has gone and its keys \
             are removed (docs/SAN.md)",
            keys.join(", ")
        );
        return report.add("registered", Level::Fail, text);
    }
    if r.nodes.is_empty() && r.tools == 0 {
        return report.add("registered", Level::Note, "nobody");
    }
    let text = format!("{} nodes and {} programs of clusterfs; {kind}", r.nodes.len(), r.tools);
    report.add("registered", Level::Note, text);
}

async fn contents(dev: &dyn BlockDevice, report: &mut Report) {
    match signature::probe(dev).await {
        Ok(found) if found.is_empty() => report.add("contents", Level::Note, "nothing that is known"),
        Ok(found) => {
            let mut names: Vec<&str> = found.iter().map(|f| f.name).collect();
            names.dedup();
            report.add("contents", Level::Note, format!("{}: mkfs.clusterfs needs --force", names.join(", ")));
        }
        Err(e) => report.add("contents", Level::Fail, e.to_string()),
    }
}

async fn read_somewhere(dev: &dyn BlockDevice) -> Result<(), String> {
    let blocks = dev.geometry().size / READ as u64;
    let offset = rand::rng().random_range(0..blocks.max(1)) * READ as u64;
    dev.read(IoClass::Data, offset, READ).await.map(drop).map_err(|e| e.to_string())
}

async fn reads(dev: &Arc<dyn BlockDevice>) -> Result<Reads, String> {
    let started = Instant::now();
    let mut times = Vec::with_capacity(SINGLE_READS);
    while times.len() < SINGLE_READS && (times.is_empty() || started.elapsed() < LIMIT) {
        let one = Instant::now();
        read_somewhere(dev.as_ref()).await?;
        times.push(one.elapsed());
    }
    let per_second_1 = rate(times.len(), started.elapsed());
    times.sort();
    let at = |percent: usize| micros(times[(times.len() * percent / 100).min(times.len() - 1)]);
    let (p50_us, p99_us) = (at(50), at(99));

    let started = Instant::now();
    let mut readers = JoinSet::new();
    for _ in 0..DEPTH {
        let dev = dev.clone();
        readers.spawn(async move {
            let mut done = 0;
            while done < DEEP_READS / DEPTH && (done == 0 || started.elapsed() < LIMIT) {
                read_somewhere(dev.as_ref()).await?;
                done += 1;
            }
            Ok::<_, String>(done)
        });
    }
    let mut done = 0;
    while let Some(one) = readers.join_next().await {
        done += one.map_err(|e| e.to_string())??;
    }
    let per_second_32 = rate(done, started.elapsed());
    Ok(Reads { count: times.len(), p50_us, p99_us, per_second_1, per_second_32 })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn rate(count: usize, time: Duration) -> u64 {
    (count as f64 / time.as_secs_f64().max(1e-6)) as u64
}

fn judge(reads: &Reads, report: &mut Report) {
    let p99 = Duration::from_micros(reads.p99_us);
    if p99 >= TOO_SLOW {
        report.add("reads", Level::Fail, "as slow as a heartbeat: nodes would take each other for dead");
    } else if p99 >= SLOW {
        report.add("reads", Level::Warn, "slow: whatever passes from node to node takes several commands");
    } else {
        report.add("reads", Level::Ok, "fast enough");
    }
    if reads.per_second_32 < reads.per_second_1 * 3 / 2 {
        report.add("queue depth", Level::Note, "32 reads in flight are hardly faster than one after the other");
    }
}
