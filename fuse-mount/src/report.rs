//! What this node is doing, as an extended attribute of the mount's root that only root may read: `clusterfs top` asks for it. Another
//! one tells the daemon's process number to who unmounts and wants to wait for its end.
//!
//! Counters run since the mount, except those of domains, which cover the time since the previous report: of many thousand
//! directories only the busiest are told, and which those are changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::ClassStats;
use cluster::Mode;
use fs_core::activity::Usage;
use fs_core::{ROOT_INO, Volume};
use fuse_session::{Op, Reply, Request};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::convert::to_ino;
use crate::counters::Counters;

/// Names under this prefix are the daemon's and are never stored.
pub const RESERVED: &[u8] = b"trusted.clusterfs.";
/// The name of the report, JSON of a [`Report`] of at most [`REPORT_MAX`] bytes.
pub const REPORT_XATTR: &str = "trusted.clusterfs.report";
pub const REPORT_MAX: usize = 64 << 10;
/// The name of the process number, in decimal digits.
pub const PID_XATTR: &str = "trusted.clusterfs.pid";
/// Domains in a report, the busiest first.
const DOMAINS: usize = 20;
/// Bytes of a path in a report; a longer one loses its beginning.
const PATH_MAX: usize = 1024;
/// How long a domain is known by the path it once had: finding it may take a lock from another node.
const PATH_LIFE: Duration = Duration::from_secs(60);
/// For finding all paths of a report: a lock may be held by a node that does not answer.
const PATH_PATIENCE: Duration = Duration::from_secs(1);
/// A period shorter than this is not begun anew, so that two who ask at once both see something.
const SHORTEST_PERIOD: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub device: String,
    pub label: String,
    pub slot: u16,
    pub incarnation: u32,
    /// Of this mount; the incarnation may be younger.
    pub uptime_ms: u64,
    /// The kernel's requests, by kind.
    pub requests: BTreeMap<String, u64>,
    pub locks: Locks,
    pub journal: Journal,
    /// Without the idle cost of membership.
    pub device_io: ClassStats,
    /// What [`Domain`] counts cover.
    pub period_ms: u64,
    pub domains: Vec<Domain>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Locks {
    pub acquires: u64,
    /// Of these, those that waited for another node.
    pub waits: u64,
    pub handovers: u64,
    pub hints_sent: u64,
    pub doorbells_written: u64,
    pub recoveries: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Journal {
    /// Bytes.
    pub used: u64,
    pub size: u64,
    pub records: u64,
    pub record_bytes: u64,
    pub blocks_placed: u64,
    pub checkpoints: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Domain {
    pub domain: u32,
    /// From the root of the volume; `None`: could not be found in time, or the directory is gone.
    pub path: Option<String>,
    /// `shared`, `exclusive`, or `None`.
    pub held: Option<String>,
    pub operations: u64,
    pub acquired: u64,
    pub given_up: u64,
}

/// Makes the reports of one mount.
pub struct Reporter {
    device: String,
    since: Instant,
    counters: Arc<Counters>,
    period: Mutex<Period>,
    paths: Mutex<BTreeMap<u32, (Instant, String)>>,
}

/// The counts of all domains when a period began.
struct Period {
    began: Instant,
    incarnation: u32,
    before: BTreeMap<u32, Usage>,
}

/// Whether a request is for the report.
pub fn is_asked(request: &Request) -> bool {
    asks_for(request, REPORT_XATTR).is_some()
}

/// How many bytes there is room for, if a request is for the process number. It is told whether this is a node at the moment or not.
pub fn pid_asked(request: &Request) -> Option<u32> {
    asks_for(request, PID_XATTR)
}

fn asks_for(request: &Request, attribute: &str) -> Option<u32> {
    match &request.op {
        Op::Getxattr { name, size } if to_ino(request.nodeid) == ROOT_INO && name == attribute.as_bytes() => {
            Some(*size)
        }
        _ => None,
    }
}

impl Reporter {
    pub fn new(device: &str, counters: Arc<Counters>) -> Self {
        let now = Instant::now();
        let period = Period { began: now, incarnation: 0, before: BTreeMap::new() };
        Self {
            device: device.into(),
            since: now,
            counters,
            period: Mutex::new(period),
            paths: Mutex::new(BTreeMap::new()),
        }
    }

    /// Answers a request that [`is_asked`] is true for.
    pub async fn answer(&self, volume: &Volume, request: &Request, reply: Reply) {
        let Op::Getxattr { size, .. } = request.op else {
            reply.err(libc::ENODATA);
            return;
        };
        match serde_json::to_vec(&self.report(volume).await) {
            Ok(json) if json.len() <= REPORT_MAX => reply.xattr(size, &json),
            Ok(_) => reply.err(libc::E2BIG),
            Err(e) => {
                tracing::error!("the report for clusterfs top cannot be written: {e}");
                reply.err(libc::EIO)
            }
        };
    }

    async fn report(&self, volume: &Volume) -> Report {
        let (locks, journal) = (volume.lock_stats(), volume.journal_stats());
        let (period, mut domains) = self.busiest(volume);
        // What was not found by then is told without its path.
        let _ = tokio::time::timeout(PATH_PATIENCE, self.find_paths(volume, &mut domains)).await;
        Report {
            device: self.device.clone(),
            label: volume.superblock().label.clone(),
            slot: volume.node().slot,
            incarnation: volume.node().incarnation,
            uptime_ms: millis(self.since.elapsed()),
            requests: self.counters.by_kind(),
            locks: Locks {
                acquires: locks.acquires,
                waits: locks.waits,
                handovers: locks.handovers,
                hints_sent: locks.hints_sent,
                doorbells_written: locks.doorbells_written,
                recoveries: locks.recoveries,
            },
            journal: Journal {
                used: journal.used,
                size: journal.size,
                records: journal.records,
                record_bytes: journal.record_bytes,
                blocks_placed: journal.blocks_placed,
                checkpoints: journal.checkpoints,
            },
            device_io: volume.device_stats().work(),
            period_ms: millis(period),
            domains,
        }
    }

    /// The domains with the most handovers, then operations, since the period began; and how long that is.
    fn busiest(&self, volume: &Volume) -> (Duration, Vec<Domain>) {
        let mut p = self.period.lock();
        let (now, incarnation) = (Instant::now(), volume.node().incarnation);
        if p.incarnation != incarnation {
            // Counters of domains begin anew with each membership.
            *p = Period { began: p.began, incarnation, before: BTreeMap::new() };
        }
        let activity = volume.activity();
        let mut domains: Vec<Domain> = activity
            .iter()
            .map(|d| {
                let before = p.before.get(&d.domain).copied().unwrap_or_default();
                Domain {
                    domain: d.domain,
                    path: None,
                    held: d.held.map(mode_name),
                    operations: d.usage.operations - before.operations,
                    acquired: d.usage.acquired - before.acquired,
                    given_up: d.usage.given_up - before.given_up,
                }
            })
            .filter(|d| (d.operations, d.acquired, d.given_up) != (0, 0, 0))
            .collect();
        domains.sort_by_key(|d| std::cmp::Reverse((d.given_up, d.operations, d.domain)));
        domains.truncate(DOMAINS);
        let period = now - p.began;
        if period >= SHORTEST_PERIOD {
            p.began = now;
            p.before = activity.into_iter().map(|d| (d.domain, d.usage)).collect();
        }
        (period, domains)
    }

    async fn find_paths(&self, volume: &Volume, domains: &mut [Domain]) {
        self.paths.lock().retain(|_, (found, _)| found.elapsed() < PATH_LIFE);
        for d in domains {
            let known = self.paths.lock().get(&d.domain).map(|(_, path)| path.clone());
            d.path = match known {
                Some(path) => Some(path),
                None => match volume.path_of_domain(d.domain).await {
                    Ok(path) => {
                        let path = shown(&path);
                        self.paths.lock().insert(d.domain, (Instant::now(), path.clone()));
                        Some(path)
                    }
                    // Removed meanwhile.
                    Err(_) => None,
                },
            };
        }
    }
}

fn shown(path: &[u8]) -> String {
    let cut = path.len().saturating_sub(PATH_MAX);
    let text = String::from_utf8_lossy(&path[cut..]);
    if cut > 0 { format!("...{text}") } else { text.into_owned() }
}

fn mode_name(mode: Mode) -> String {
    match mode {
        Mode::Shared => "shared".into(),
        Mode::Exclusive => "exclusive".into(),
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_keep_their_end() {
        assert_eq!(shown(b"/a/b"), "/a/b");
        let long = [b"/x".repeat(2000), b"/end".to_vec()].concat();
        let text = shown(&long);
        assert!(text.starts_with("...") && text.ends_with("/x/end") && text.len() == PATH_MAX + 3);
    }
}
