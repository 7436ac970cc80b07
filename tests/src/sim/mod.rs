//! The whole-cluster crash simulator: several nodes with the real cluster, journal and volume code in one process, on one
//! simulated device under a paused clock, working at random while accidents happen to them; everything follows from a seed.
//!
//! What is checked against models, at every moment and after every crash:
//! - all nodes show one state: what an operation returned on one node, every node shows from then on;
//! - what was made durable (fsync, sync, or another node having seen it) is there after any loss of nodes and of power;
//! - of the rest a prefix of the dead node's changes of names and inodes is there, and contents are those of a moment
//!   between the last sync and the crash (see `docs/SEMANTICS.md`);
//! - no two processes hold conflicting file locks, and every wait for one ends;
//! - survivors get on within a few seconds; nobody hangs;
//! - the check of fsck finds nothing, neither with the journals of the dead unreplayed nor at the end.
//!
//! [`world`] has the hosts ([`host`]) and their lives, [`tree`] the model of a private directory tree and [`client`] the work on it,
//! [`mail`] mailboxes that all nodes share, [`shared`] a dot-lock and a log they fight over, [`locker`] file locks,
//! [`opened`] files that are removed while open, [`bulk`] floods of changes and full volumes, [`emptying`] what is left when all is
//! removed, [`lies`] a device that loses metadata, [`witness`] what the device sees, [`fate`] the accidents ([`device`] those of the device) and the end, [`soak`] runs seeds on all cores,
//! [`kept`] keeps those that failed.

mod bulk;
mod client;
mod device;
mod emptying;
mod fate;
mod growing;
mod host;
pub mod kept;
mod lies;
mod locker;
mod mail;
mod opened;
mod reading;
mod setup;
mod shared;
pub mod soak;
mod trace;
mod tree;
mod witness;
mod world;

use std::cell::RefCell;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use setup::Setup;
use world::World;

/// What a seed did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub seeds: u64,
    /// Operations that returned.
    pub operations: u64,
    pub crashes: u64,
    /// Losses of all nodes at once.
    pub blackouts: u64,
    /// Times that a client found the volume full.
    pub full: u64,
    /// Errors that told of damage.
    pub damaged: u64,
    /// Mounts, of which all but the first of each host follow a crash or an unmount.
    pub mounts: u64,
    /// Trees and messages compared with what was allowed after a crash.
    pub verified: u64,
    /// Hash of everything that happened, with its time.
    pub digest: u64,
}

impl Totals {
    pub fn add(&mut self, other: &Totals) {
        self.seeds += other.seeds;
        self.operations += other.operations;
        self.crashes += other.crashes;
        self.blackouts += other.blackouts;
        self.full += other.full;
        self.damaged += other.damaged;
        self.mounts += other.mounts;
        self.verified += other.verified;
        self.digest ^= other.digest;
    }
}

/// A seed that showed something that must not be.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    pub what: String,
    pub setup: String,
    /// The last events before it.
    pub tail: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in &self.tail {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "  {}", self.setup)?;
        write!(f, "seed {} failed: {}", self.seed, self.what)
    }
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The runtime swallows panics of spawned tasks; each is a failure of the seed that its thread runs.
fn catch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANIC.with_borrow_mut(|p| p.get_or_insert_with(|| info.to_string()).truncate(4000));
            usual(info);
        }));
    });
}

/// Longest virtual time of a run: nobody may wait for ever.
const BOUND: Duration = Duration::from_secs(3600);

/// Most processor time of a run. Virtual time stands still while a task turns in a circle without ever waiting.
const WORK_BOUND: Duration = Duration::from_secs(180);
/// Longest real time of a run, for a thread that waits for something that is not simulated. Other work may keep it from the processor.
const REAL_BOUND: Duration = Duration::from_secs(3600);

/// The processor time of a thread since it was made.
struct Worked {
    clock: libc::clockid_t,
    before: Duration,
}

impl Worked {
    fn of_this_thread() -> Self {
        let mut clock = 0;
        // SAFETY: the calling thread, and a place for the number of its clock.
        let failed = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        assert_eq!(failed, 0, "a thread without a clock");
        let mut worked = Self { clock, before: Duration::ZERO };
        worked.before = worked.so_far();
        worked
    }

    /// Zero once the thread has ended.
    fn so_far(&self) -> Duration {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a place for the time; the clock of a thread that has ended gives an error.
        match unsafe { libc::clock_gettime(self.clock, &mut t) } {
            0 => Duration::new(t.tv_sec as u64, t.tv_nsec as u32).saturating_sub(self.before),
            _ => Duration::ZERO,
        }
    }
}

/// Ends the process when a run does not end: nothing can stop its thread. Ends with the value returned.
fn watch(world: Arc<World>, endless: impl FnOnce(&Failure) + Send + 'static) -> Sender<()> {
    let (running, ended) = channel();
    let (worked, started) = (Worked::of_this_thread(), Instant::now());
    std::thread::spawn(move || {
        while ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
            let (work, time) = (worked.so_far(), started.elapsed());
            if work < WORK_BOUND && time < REAL_BOUND {
                continue;
            }
            let what = format!(
                "it does not end, after {} s of work in {} s: some task turns in a circle",
                work.as_secs(),
                time.as_secs()
            );
            let setup = format!("{:?}", world.setup);
            let failure = Failure { seed: world.setup.seed, what, setup, tail: world.trace.tail() };
            endless(&failure);
            eprintln!("{failure}");
            std::process::exit(101);
        }
    });
    running
}

/// Runs a seed. `verbose` prints every event as it happens.
pub fn run(seed: u64, verbose: bool) -> Result<Totals, Box<Failure>> {
    run_watched(seed, verbose, |_| {})
}

/// ... and is told of a run that does not end, before the process does.
pub fn run_watched(
    seed: u64,
    verbose: bool,
    endless: impl FnOnce(&Failure) + Send + 'static,
) -> Result<Totals, Box<Failure>> {
    catch_panics();
    PANIC.take();
    let setup = Setup::new(seed);
    let world = World::new(setup.clone(), verbose);
    let _watch = watch(world.clone(), endless);
    let rt = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let done = match rt {
        Ok(rt) => rt.block_on(async {
            let all = std::panic::AssertUnwindSafe(Box::pin(fate::live(world.clone())));
            tokio::time::timeout(BOUND, all.0).await.unwrap_or_else(|_| Err("the run hangs".into()))
        }),
        Err(e) => Err(format!("no runtime: {e}")),
    };
    let done = match (PANIC.take(), world.disk.violation()) {
        (Some(panic), _) => Err(panic),
        (None, Some(broken)) => Err(broken),
        (None, None) => done,
    };
    done.map_err(|what| {
        let tail = world.trace.tail();
        Box::new(Failure { seed, what, setup: format!("{setup:?}"), tail })
    })?;
    Ok(totals(&world))
}

fn totals(world: &Arc<World>) -> Totals {
    Totals { seeds: 1, digest: world.trace.digest() ^ world.disk.trace_hash(), ..*world.totals.lock() }
}

/// A seed from the clock, for runs that are to find something new.
pub fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |t| t.as_micros() as u64) % 1_000_000_000_000
}
