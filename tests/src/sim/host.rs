//! A host's life as a node, and what it must not lose.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering::Relaxed};

use blockdev::sim::{NodeMode, SimNode};
use cluster::simnet::SimPort;
use fs_core::{Time, Volume, WallClock};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Why a client stops what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Its node is gone: go on elsewhere.
    Down,
    /// Something failed; the run is over.
    Failed,
}

pub type Outcome<T> = Result<T, Stop>;

/// Counts the changes of all nodes in the order in which they were acknowledged.
pub type Ack = u64;

/// One life of a host as a node.
pub struct Host {
    pub index: usize,
    pub life: u32,
    pub dev: Arc<SimNode>,
    pub volume: Arc<Volume>,
    pub(super) port: Option<Arc<SimPort>>,
    /// Hung or cut off for too long: given up by everybody, though it may wake up yet.
    pub(super) lost: AtomicBool,
    pub(super) given_up: Notify,
    /// Commands of this node failed: from then on it may fail, once.
    pub(super) faulty: AtomicBool,
    /// About to unmount: clients go elsewhere.
    pub retiring: AtomicBool,
    /// Clients that work here.
    pub users: AtomicUsize,
    pub promise: Mutex<Promise>,
}

/// What a node must not lose, and what it has been found to have lost.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// Names and inodes: all changes up to this one are durable.
    pub durable: Ack,
    /// Contents: all up to this one are durable.
    pub synced: Ack,
    /// After its crash: changes up to the first were found, those from the second on were not.
    pub found: Ack,
    pub lost: Ack,
}

impl Host {
    pub fn name(&self) -> String {
        format!("h{}.{}", self.index, self.life)
    }

    pub fn dead(&self) -> bool {
        if self.faulty.load(Relaxed) && self.volume.has_failed() {
            // By a failed command in the background, which no operation has been told of yet.
            self.dev.crash();
        }
        self.lost.load(Relaxed) || self.dev.mode() == NodeMode::Crashed
    }

    /// From here on it may fail.
    pub fn commands_fail(&self) {
        self.faulty.store(true, Relaxed);
    }

    /// Waits for the end of this life.
    pub(super) async fn ended(&self) {
        let given_up = self.given_up.notified();
        tokio::pin!(given_up);
        given_up.as_mut().enable();
        if self.dead() {
            return;
        }
        tokio::select! {
            biased;
            () = self.dev.crashed() => {}
            () = given_up => {}
        }
    }

    /// A sync of the whole node that began when `upto` was the latest change has been acknowledged.
    pub fn synced(&self, upto: Ack) {
        let mut p = self.promise.lock();
        p.synced = p.synced.max(upto);
        p.durable = p.durable.max(upto);
    }

    /// The same of an fsync.
    pub fn fsynced(&self, upto: Ack) {
        let mut p = self.promise.lock();
        p.durable = p.durable.max(upto);
    }
}

/// A client's place on a host.
pub struct Seat {
    pub host: Arc<Host>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.host.users.fetch_sub(1, Relaxed);
    }
}

/// A host's wall clock, which is set now and then. Nothing but time stamps may depend on it.
pub(super) struct SimClock {
    pub(super) started: Instant,
    pub(super) offset: Arc<AtomicI64>,
}

impl WallClock for SimClock {
    fn now(&self) -> Time {
        let t = self.started.elapsed();
        Time { secs: self.offset.load(Relaxed) + t.as_secs() as i64, nanos: t.subsec_nanos() }
    }
}
