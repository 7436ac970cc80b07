//! What `clusterfs-bench run` measures: scenarios on places, in interleaved rounds, with the device's commands beside the
//! time.
//!
//! | module | job |
//! |---|---|
//! | `place` | what is measured: a cluster of real mounts, or a local filesystem on a loop device |
//! | `io` | what the device was asked meanwhile |
//! | `scenarios` | one module per kind of work; each is a list of [`Scenario`]s |
//! | `report` | medians of the rounds as JSON, a table and plots |
//!
//! A scenario prepares a fresh directory, untimed, and then works in it. All places of a scenario take turns, round by
//! round, so that a machine that gets slower meanwhile is slower for all of them; a result is the median of the rounds.

pub mod io;
pub mod place;
pub mod report;
pub mod scenarios;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::Result;
use io::Io;
use place::Place;

/// How much a scenario does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scale {
    /// A few operations, to see that it works.
    Smoke,
    /// About a second a round.
    Quick,
    /// What a figure should be believed for.
    Full,
}

impl Scale {
    /// `full`, or a tenth of it for a quick run.
    pub fn of(self, full: usize) -> usize {
        match self {
            Scale::Smoke => (full / 1000).clamp(2, 20),
            Scale::Quick => (full / 10).max(2),
            Scale::Full => full,
        }
    }
}

/// One kind of work, and what a reader of its figures should know.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    /// What the figure depends on.
    pub limits: &'static str,
    /// What is counted: `messages`, `MiB`.
    pub unit: &'static str,
    /// On how many nodes it makes sense; local filesystems take part where 1 is among them.
    pub nodes: &'static [usize],
    pub prepare: fn(&Work) -> Result<()>,
    pub run: fn(&Work) -> Result<Done>,
}

/// Where a scenario works and how much it does.
pub struct Work<'a> {
    pub place: &'a Place,
    /// The same directory as each node shows it.
    pub dirs: Vec<PathBuf>,
    pub scale: Scale,
}

impl Work<'_> {
    pub fn dir(&self) -> &Path {
        &self.dirs[0]
    }

    /// Runs `job(thread, directory)` on `threads` threads of each node, all at once; the threads are numbered through.
    /// The latencies that they return are put together.
    pub fn on_all(
        &self,
        threads: usize,
        job: impl Fn(usize, &Path) -> std::io::Result<Vec<Duration>> + Sync,
    ) -> Result<Done> {
        let (begin, job) = (Instant::now(), &job);
        let latencies = std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads * self.dirs.len())
                .map(|n| scope.spawn(move || job(n, &self.dirs[n % self.dirs.len()])))
                .collect();
            let mut latencies = Vec::new();
            for one in all {
                latencies.extend(one.join().map_err(|_| "a thread panicked")??);
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(latencies)
        })?;
        Ok(Done { count: latencies.len() as f64, time: begin.elapsed(), latencies })
    }
}

/// Times each of `count` operations.
pub fn repeat(count: usize, mut op: impl FnMut(usize) -> std::io::Result<()>) -> std::io::Result<Vec<Duration>> {
    (0..count)
        .map(|n| {
            let begin = Instant::now();
            op(n).map(|()| begin.elapsed())
        })
        .collect()
}

/// What one round did.
pub struct Done {
    pub count: f64,
    pub time: Duration,
    /// Of single operations, where that means something.
    pub latencies: Vec<Duration>,
}

impl Done {
    /// `count` things in one go, since `begin`.
    pub fn since(begin: Instant, count: f64) -> Done {
        Done { count, time: begin.elapsed(), latencies: Vec::new() }
    }
}

/// One round's figures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Per second.
    pub rate: f64,
    /// Milliseconds; 0: not measured.
    pub p50: f64,
    pub p99: f64,
    /// Per thing counted.
    pub io: Io,
}

/// One scenario in one place, all rounds.
pub struct Measured {
    pub scenario: &'static Scenario,
    pub place: String,
    pub nodes: usize,
    pub rounds: Vec<Figures>,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on the first of ctrl-C, SIGTERM and SIGHUP ends [`measure`] with an error as soon as what it measures is over, so that
/// everything is unmounted; the second ends the process.
pub fn end_on_signals() {
    extern "C" fn note(signal: libc::c_int) {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            // SAFETY: may be called in a signal handler.
            unsafe { libc::_exit(128 + signal) };
        }
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler does nothing that a signal handler may not.
        unsafe { libc::signal(signal, note as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
}

/// Measures the scenarios whose names contain one of `wanted` (all if there is none) in all places. `told` hears of
/// each that begins.
pub fn measure(
    places: &[Place],
    wanted: &[String],
    scale: Scale,
    rounds: usize,
    told: impl Fn(&str),
) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    let mut serial = 0;
    for scenario in scenarios::all() {
        if !wanted.is_empty() && !wanted.iter().any(|w| scenario.name.contains(w.as_str())) {
            continue;
        }
        told(scenario.name);
        let mut these: Vec<(&Place, Measured)> = Vec::new();
        for place in places {
            for &nodes in scenario.nodes.iter().filter(|n| place.has(**n)) {
                these.push((place, Measured { scenario, place: place.name(), nodes, rounds: Vec::new() }));
            }
        }
        for _ in 0..rounds {
            for (place, measured) in &mut these {
                if INTERRUPTED.load(Ordering::Relaxed) {
                    return Err("ended by a signal".into());
                }
                serial += 1;
                let failed = |e| {
                    let (on, nodes, said) = (&measured.place, measured.nodes, place.complaints());
                    format!("{} on {on} with {nodes} nodes: {e}{said}", scenario.name)
                };
                let figures = round(place, scenario, measured.nodes, scale, serial).map_err(failed)?;
                measured.rounds.push(figures);
            }
        }
        all.extend(these.into_iter().map(|(_, measured)| measured));
    }
    Ok(all)
}

fn round(place: &Place, scenario: &Scenario, nodes: usize, scale: Scale, serial: usize) -> Result<Figures> {
    let name = format!("{}.{serial}", scenario.name);
    std::fs::create_dir(place.root(0).join(&name))?;
    let dirs = (0..nodes).map(|n| place.root(n).join(&name)).collect();
    let work = Work { place, dirs, scale };
    (scenario.prepare)(&work)?;
    // What the preparation left to be written is not the scenario's.
    place.settle()?;
    let before = place.io()?;
    let done = (scenario.run)(&work)?;
    let io = place.io()?.since(&before).per(done.count);
    std::fs::remove_dir_all(place.root(0).join(&name))?;
    let mut latencies = done.latencies;
    latencies.sort();
    let at = |part: f64| latencies.get((latencies.len() as f64 * part) as usize).map_or(0.0, |l| l.as_secs_f64() * 1e3);
    Ok(Figures { rate: done.count / done.time.as_secs_f64(), p50: at(0.5), p99: at(0.99), io })
}
