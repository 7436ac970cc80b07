//! Many seeds on all cores: one single-threaded runtime per seed, so that each is exact.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::setup::Setup;
use super::{Failure, Totals, run};

/// How much to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub first: u64,
    /// `None`: until the time is over.
    pub seeds: Option<u64>,
    pub time: Option<Duration>,
    pub threads: usize,
    /// Stop after this many failures.
    pub failures: usize,
    /// Leave out all seeds but those of volumes that are locked without compare-and-write.
    pub plain: bool,
}

#[derive(Debug, Default)]
pub struct Report {
    pub totals: Totals,
    pub failures: Vec<Failure>,
    pub time: Duration,
}

/// Runs the seeds; `tell` is called about every ten seconds, and for each failure.
pub fn soak(plan: Plan, tell: &(dyn Fn(&Report, Option<&Failure>) + Sync)) -> Report {
    let started = Instant::now();
    let (next, report) = (AtomicU64::new(plan.first), Mutex::new(Report::default()));
    let last_told = Mutex::new(Instant::now());
    std::thread::scope(|s| {
        for _ in 0..plan.threads.max(1) {
            s.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    let enough = plan.seeds.is_some_and(|n| seed - plan.first >= n)
                        || plan.time.is_some_and(|t| started.elapsed() >= t)
                        || report.lock().failures.len() >= plan.failures;
                    if enough {
                        return;
                    }
                    if plan.plain && !Setup::new(seed).plain {
                        continue;
                    }
                    let done = run(seed, false);
                    let mut r = report.lock();
                    r.time = started.elapsed();
                    match done {
                        Ok(totals) => r.totals.add(&totals),
                        Err(f) => {
                            r.totals.seeds += 1;
                            tell(&r, Some(&f));
                            r.failures.push(*f);
                        }
                    }
                    let mut last = last_told.lock();
                    if last.elapsed() > Duration::from_secs(10) {
                        *last = Instant::now();
                        tell(&r, None);
                    }
                }
            });
        }
    });
    let mut report = report.into_inner();
    report.time = started.elapsed();
    report
}
