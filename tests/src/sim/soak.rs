//! Many seeds on all cores: one single-threaded runtime per seed, so that each is exact.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::kept::Kept;
use super::setup::Setup;
use super::{Failure, Totals, run_watched};

/// How much to run.
#[derive(Clone, Debug)]
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
    /// Where seeds that fail are kept, and those of earlier runs come from, which are run first.
    pub kept: Option<Kept>,
}

#[derive(Debug, Default)]
pub struct Report {
    pub totals: Totals,
    pub failures: Vec<Failure>,
    pub time: Duration,
}

/// Runs the seeds; `tell` is called about every ten seconds, and for each failure.
pub fn soak(plan: Plan, tell: &(dyn Fn(&Report, Option<&Failure>) + Sync)) -> std::io::Result<Report> {
    let started = Instant::now();
    let again = plan.kept.as_ref().map_or(Ok(Vec::new()), Kept::seeds)?;
    let (next_again, next, report) = (AtomicUsize::new(0), AtomicU64::new(plan.first), Mutex::new(Report::default()));
    let last_told = Mutex::new(Instant::now());
    let trouble = Mutex::new(None);
    let work = || -> std::io::Result<()> {
        loop {
            let enough = plan.time.is_some_and(|t| started.elapsed() >= t)
                || report.lock().failures.len() >= plan.failures
                || trouble.lock().is_some();
            if enough {
                return Ok(());
            }
            let seed = match again.get(next_again.fetch_add(1, Relaxed)) {
                Some(seed) => *seed,
                None => {
                    let seed = next.fetch_add(1, Relaxed);
                    if plan.seeds.is_some_and(|n| seed - plan.first >= n) {
                        return Ok(());
                    }
                    if plan.plain && !Setup::new(seed).plain {
                        continue;
                    }
                    seed
                }
            };
            let kept = plan.kept.clone();
            let done = run_watched(seed, false, move |f| {
                // The process ends here; that the seed cannot be kept changes nothing about that.
                let _ = kept.map(|k| k.failed(f.seed));
            });
            if let Some(kept) = &plan.kept {
                match &done {
                    Ok(_) if again.contains(&seed) => kept.passed(seed)?,
                    Ok(_) => {}
                    Err(f) => kept.failed(f.seed)?,
                }
            }
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
    };
    std::thread::scope(|s| {
        for _ in 0..plan.threads.max(1) {
            s.spawn(|| {
                if let Err(e) = work() {
                    trouble.lock().get_or_insert(e);
                }
            });
        }
    });
    if let Some(e) = trouble.into_inner() {
        return Err(e);
    }
    let mut report = report.into_inner();
    report.time = started.elapsed();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kept seeds run before all others, and one that passes is kept no more.
    #[test]
    fn what_failed_is_run_first() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept::new(&dir.path().join("failing-seeds"));
        kept.failed(77).unwrap();
        let plan = Plan {
            first: 1,
            seeds: Some(0),
            time: None,
            threads: 2,
            failures: 1,
            plain: false,
            kept: Some(kept.clone()),
        };
        let report = soak(plan, &|_, _| {}).unwrap();
        assert_eq!((report.totals.seeds, report.failures.len()), (1, 0));
        assert!(kept.seeds().unwrap().is_empty());
    }
}
