//! The simulated shared device: a whole cluster in one process, on a paused clock, repeatable from a seed.
//!
//! A [`SimDisk`] is the medium with its volatile write cache; every node opens its own [`SimNode`] on it. Each
//! operation takes a random time and takes effect at a random moment within it, so that operations in flight
//! together overtake each other. What completed is visible to all nodes but, with a write cache, volatile until a flush
//! or unless written with `fua`: [`SimDisk::power_loss`] loses any part of it, torn between sectors. Nodes crash, hang
//! and lose their path with operations in flight ([`SimNode::crash`], [`SimNode::hang`], [`SimNode::cut`]).
//!
//! The order of events depends only on the seed and on the sequence of calls; [`SimDisk::trace_hash`] tells two runs
//! apart. Run it on a current-thread runtime with `start_paused`.

mod accident;
mod audit;
mod execute;
mod fault;
mod medium;
#[cfg(test)]
mod model_tests;
mod node;
mod request;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use parking_lot::Mutex;
use tokio::time::Duration;

pub use audit::{Audit, Change};
pub use fault::{FaultRates, WriteFault};
pub use medium::SimImage;
pub use node::SimNode;

use crate::{FencingKind, Geometry};
use state::State;

/// How a simulated device behaves.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// In bytes; a multiple of the sector size.
    pub size: u64,
    /// 512 to 4096, a power of two.
    pub sector_size: u32,
    pub seed: u64,
    /// Time of an operation in microseconds. tokio's clock rounds what the caller sees up to milliseconds.
    pub latency_us: RangeInclusive<u64>,
    /// Completed writes are volatile until a flush.
    pub write_cache: bool,
    pub fencing: FencingKind,
    /// Operations of a node that is cut off fail after this.
    pub cut_timeout: Duration,
    /// How late a write may arrive that was in flight when its node was cut off or hung (or, without process locks,
    /// crashed). Zero: no such delay.
    pub late_write_delay: Duration,
    /// An operation that a hung node's initiator has kept for longer fails instead of being sent when the node wakes up. Zero: it is
    /// sent however late, and only fencing can stop it.
    pub queue_limit: Duration,
    /// Each node is on a host of its own, and process locks show the own host's nodes only.
    pub others_unseen: bool,
    /// The two parts of a multi-sector write take effect at different moments: readers can see half of it.
    pub split_writes: bool,
    pub rates: FaultRates,
}

impl SimConfig {
    /// A well-behaved device with a write cache, as an image file would be.
    pub fn new(size: u64, seed: u64) -> Self {
        Self {
            size,
            sector_size: 512,
            seed,
            latency_us: 100..=2500,
            write_cache: true,
            fencing: FencingKind::ProcessLock,
            cut_timeout: Duration::from_secs(2),
            late_write_delay: Duration::ZERO,
            queue_limit: Duration::ZERO,
            others_unseen: false,
            split_writes: false,
            rates: FaultRates::default(),
        }
    }
}

/// What state a node's connection is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeMode {
    Live,
    /// Operations fail with unknown outcome after a while.
    Cut,
    /// Operations wait.
    Hung,
    /// Operations never return.
    Crashed,
}

/// The operations that [`SimNode::crash_at`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OpKind {
    Read,
    Write,
    Flush,
    CompareAndWrite,
}

/// The simulated shared device.
pub struct SimDisk {
    geometry: Geometry,
    size: AtomicU64,
    state: Mutex<State>,
}

impl SimDisk {
    /// A device full of zeros.
    ///
    /// # Panics
    /// If the sizes in `cfg` make no sense.
    pub fn new(cfg: SimConfig) -> Arc<Self> {
        let image = SimImage { size: cfg.size, pages: BTreeMap::new() };
        Self::from_snapshot(cfg, &image)
    }

    /// A device with these contents, all durable, and no history. The size in `cfg` is replaced by the image's.
    ///
    /// # Panics
    /// If the sizes make no sense.
    pub fn from_snapshot(mut cfg: SimConfig, image: &SimImage) -> Arc<Self> {
        cfg.size = image.size;
        assert!(
            cfg.sector_size.is_power_of_two() && (512..=medium::PAGE as u32).contains(&cfg.sector_size),
            "sector size {}",
            cfg.sector_size
        );
        assert!(cfg.size.is_multiple_of(u64::from(cfg.sector_size)), "size {} is not whole sectors", cfg.size);
        let geometry = Geometry {
            sector_size: cfg.sector_size,
            size: cfg.size,
            write_cache: cfg.write_cache,
            fencing: cfg.fencing,
            others_unseen: cfg.others_unseen,
        };
        Arc::new(Self {
            geometry,
            size: AtomicU64::new(geometry.size),
            state: Mutex::new(State::new(cfg, image.clone())),
        })
    }

    pub fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Relaxed), ..self.geometry }
    }

    /// The device gets more sectors, all zeros. Connections that are open learn it when they ask.
    ///
    /// # Panics
    /// If that makes it smaller, or is not whole sectors.
    pub fn enlarge(&self, size: u64) {
        assert!(size >= self.geometry().size && size.is_multiple_of(u64::from(self.geometry.sector_size)));
        self.state.lock().enlarge(size);
        self.size.store(size, Relaxed);
    }

    /// Connects a node; one connection per incarnation.
    pub fn open(self: &Arc<Self>, name: &str) -> Arc<SimNode> {
        Arc::new(SimNode::new(self.clone(), name, false))
    }

    /// A connection without latency or faults whose writes are durable at once, for mkfs and fsck in tests. It works
    /// outside of a runtime's clock too.
    pub fn open_raw(self: &Arc<Self>) -> Arc<SimNode> {
        Arc::new(SimNode::new(self.clone(), "raw", true))
    }

    /// What a read at this instant would return.
    pub fn read_raw(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut state = self.state.lock();
        state.advance();
        state.medium.read(offset, &mut bytes);
        bytes
    }

    /// Changes the contents, durably, at any offset.
    pub fn write_raw(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state.lock();
        state.advance();
        state.medium.write_raw(offset, bytes);
    }

    /// The contents as reads see them at this instant, unflushed writes included, those in flight not.
    pub fn snapshot(&self) -> SimImage {
        let mut state = self.state.lock();
        state.advance();
        state.medium.image().clone()
    }

    /// Lets everything in flight take effect at once, also what nobody waits for any more.
    pub fn settle(&self) {
        self.state.lock().settle();
    }

    /// The device loses power: of the writes in flight and of those unflushed any part is lost, torn between sectors.
    /// Nodes that are still alive learn it from their next flush, which fails. To lose the power of everything,
    /// [`crash_all`](Self::crash_all) first.
    pub fn power_loss(&self) {
        self.state.lock().power_loss();
    }

    /// Crashes every node.
    pub fn crash_all(&self) {
        let mut state = self.state.lock();
        for id in 0..state.nodes.len() {
            if !state.nodes[id].raw {
                state.crash(id);
            }
        }
    }

    /// The device does nothing for `time`: all that is in flight or issued meanwhile is late.
    pub fn stall(&self, time: Duration) {
        self.state.lock().stall(time);
    }

    /// From here on operations take this long.
    pub fn set_latency(&self, latency_us: RangeInclusive<u64>) {
        self.state.lock().cfg.latency_us = latency_us;
    }

    /// Who watches over the changes of all nodes.
    pub fn set_audit(&self, audit: Arc<dyn Audit>) {
        self.state.lock().audit = Some(audit);
    }

    /// The first rule that was broken, as the audit says.
    pub fn violation(&self) -> Option<String> {
        self.state.lock().violation.clone()
    }

    /// How many sectors a power loss now could change.
    pub fn volatile_sectors(&self) -> usize {
        let mut state = self.state.lock();
        state.advance();
        state.medium.volatile_sectors()
    }

    /// Changes the probabilities of faults from here on.
    pub fn set_rates(&self, rates: FaultRates) {
        self.state.lock().faults.rates = rates;
    }

    /// How many blocks of metadata were acknowledged and lost, or misdirected, by chance.
    pub fn lies(&self) -> u64 {
        self.state.lock().faults.lies
    }

    /// Reads that touch this range fail with EIO.
    pub fn fail_reads(&self, range: Range<u64>) {
        self.state.lock().faults.add_bad_reads(range);
    }

    /// Writes that touch this range fail with EIO; of their other sectors any may be written.
    pub fn fail_writes(&self, range: Range<u64>) {
        self.state.lock().faults.add_bad_writes(range);
    }

    /// Ends [`fail_reads`](Self::fail_reads) and [`fail_writes`](Self::fail_writes).
    pub fn heal(&self) {
        self.state.lock().faults.clear_bad();
    }

    /// The next write that touches `range` is acknowledged but goes wrong.
    pub fn arm_write(&self, range: Range<u64>, fault: WriteFault) {
        self.state.lock().faults.arm(range, fault);
    }

    /// Overwrites a range with random bytes.
    pub fn corrupt(&self, offset: u64, len: usize) {
        self.state.lock().corrupt(offset, len);
    }

    /// A hash of all events so far: equal for equal runs.
    pub fn trace_hash(&self) -> u64 {
        self.state.lock().trace()
    }
}
