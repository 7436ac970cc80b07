//! What kind of cluster a seed has.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockdev::sim::{SimConfig, SimDisk, SimImage};
use blockdev::{BlockDevice, FencingKind};
use cluster::Timeouts;
use fs_core::format::layout::BLOCK;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SIZE: u64 = 64 << 20;
/// Of volumes that fill up: with the smallest journals, one to three groups.
const SMALL: [u64; 3] = [18 << 20, 24 << 20, 36 << 20];
/// Not the two minutes of a real initiator, or a run would be mostly waiting.
const QUEUE: Duration = Duration::from_secs(5);
/// The smallest that can be made.
const SMALL_JOURNAL: u64 = 1 << 20;
/// Slots: no more than the hosts need, so that slots of the dead are adopted.
const NODES: u16 = 4;

#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    /// Hosts that take part; each is at most one node at a time.
    pub hosts: usize,
    /// Clients with a tree of their own, and clients of the shared mailboxes.
    pub clients: usize,
    pub mailers: usize,
    pub mailboxes: usize,
    /// Clients that race for a lock and append to one log.
    pub racers: usize,
    /// The device fails commands for a time.
    pub errors: bool,
    pub hints: bool,
    pub loss: f64,
    pub fencing: FencingKind,
    pub write_cache: bool,
    pub split_writes: bool,
    /// How late a write of a node that died or hangs may arrive, unless the node was fenced before.
    pub late_write_delay: Duration,
    pub latency_us: (u64, u64),
    /// How long an initiator keeps what it cannot send.
    pub queue: Duration,
    /// Nodes hang or lose their path for longer than the lease.
    pub losses: bool,
    pub clock_jumps: bool,
    pub net_faults: bool,
    pub journal_bytes: u64,
    pub cache_bytes: usize,
    pub dirty_bytes: usize,
    /// Virtual time during which accidents happen.
    pub span: Duration,
    /// Longest pause between two operations of a client.
    pub think_ms: u64,
    /// Locks without compare-and-write.
    pub plain: bool,
    /// Clients that keep files open.
    pub openers: usize,
    /// Of the device.
    pub size: u64,
    /// Clients that write in bulk: until the volume is full where it is small, else until the journal is.
    pub bulk: usize,
    /// Freed blocks are discarded.
    pub discard: bool,
    /// At the end everything is removed, and the free space compared with that of the beginning.
    pub emptied: bool,
    /// At the end the device loses writes of metadata.
    pub lies: bool,
    /// The device is enlarged, and the volume grows.
    pub grows: bool,
}

impl Setup {
    pub fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5e70b);
        let hosts = if rng.random_bool(0.15) { rng.random_range(5..=8) } else { rng.random_range(2..=4) };
        let pick = |rng: &mut StdRng, of: &[u64]| of[rng.random_range(0..of.len())];
        let fencing = match rng.random_range(0..20) {
            0..13 => FencingKind::ProcessLock,
            13..17 => FencingKind::Reservations,
            _ => FencingKind::None,
        };
        // Where nothing can fence, a node is waited out: nothing may arrive later than that.
        let late = [0, 3, 20][rng.random_range(0..3)];
        let late = if fencing == FencingKind::Reservations { late } else { late.min(4) };
        let mut s = Self {
            seed,
            hosts,
            clients: rng.random_range(1..=hosts.min(4)),
            mailers: rng.random_range(1..=hosts.min(4)),
            mailboxes: rng.random_range(1..=3),
            hints: rng.random_bool(0.7),
            loss: [0.0, 0.0, 0.2][rng.random_range(0..3)],
            fencing,
            write_cache: rng.random_bool(0.8),
            split_writes: rng.random_bool(0.3),
            late_write_delay: Duration::from_secs(late),
            latency_us: [(100, 2500), (50, 400), (500, 15_000)][rng.random_range(0..3)],
            queue: QUEUE,
            losses: fencing != FencingKind::ProcessLock || rng.random_bool(0.2),
            clock_jumps: rng.random_bool(0.3),
            errors: rng.random_bool(0.25),
            racers: if rng.random_bool(0.5) { rng.random_range(1..=hosts.min(4)) } else { 0 },
            net_faults: rng.random_bool(0.3),
            journal_bytes: pick(&mut rng, &[1 << 20, 1 << 20, 4 << 20]),
            cache_bytes: pick(&mut rng, &[256 << 10, 16 << 20]) as usize,
            dirty_bytes: pick(&mut rng, &[64 << 10, 8 << 20]) as usize,
            span: Duration::from_millis(rng.random_range(5_000..25_000)),
            think_ms: pick(&mut rng, &[20, 100, 200]),
            // Where nothing fences: others' nodes are waited out in any case.
            plain: fencing == FencingKind::None && rng.random_bool(0.5),
            openers: if rng.random_bool(0.5) { rng.random_range(1..=hosts.min(4)) } else { 0 },
            size: SIZE,
            bulk: 0,
            discard: seed.is_multiple_of(3),
            emptied: rng.random_bool(0.4),
            lies: false,
            grows: false,
        };
        match rng.random_range(0..100) {
            0..8 => s.fills_up(&mut rng),
            8..18 => (s.bulk, s.journal_bytes) = (rng.random_range(1..=3), SMALL_JOURNAL),
            _ => {}
        }
        s.lies = !s.emptied && rng.random_bool(0.3);
        // Who grows it takes a slot, which a host that comes back must not miss.
        s.grows = s.hosts <= 2 && !s.emptied && !s.errors;
        s
    }

    fn fills_up(&mut self, rng: &mut StdRng) {
        self.size = SMALL[rng.random_range(0..SMALL.len())];
        (self.bulk, self.journal_bytes, self.openers) = (rng.random_range(1..=2), SMALL_JOURNAL, 0);
        self.emptied = true;
    }

    /// The volume fills up.
    pub fn small(&self) -> bool {
        self.size < SIZE
    }

    /// Longest time an operation may take after the last accident: a survivor notices a dead process within a heartbeat,
    /// a silent node after its lease and two heartbeats (`cluster::Timeouts::dead_after`), plus what the recovery takes.
    /// Replay reads the blocks it changes one at a time.
    pub fn patience(&self) -> Duration {
        let t = self.timeouts();
        let work = Duration::from_secs(3) + 200 * Duration::from_micros(self.latency_us.1);
        match self.fencing {
            FencingKind::ProcessLock if !self.losses && !self.errors => work,
            // A late heartbeat of the dead looks like life.
            FencingKind::Reservations => t.dead_after() + 2 * t.heartbeat() + self.late_write_delay + work,
            _ => t.dead_unfenced() + 2 * t.heartbeat() + self.late_write_delay + work,
        }
    }

    /// ... of what writes out all contents of a node: of a thousand files, with a cache that may have nothing of where they lie.
    pub fn patience_with_floods(&self) -> Duration {
        let floods = if self.bulk > 0 { 1000 } else { 0 };
        self.patience() + floods * Duration::from_micros(self.latency_us.1)
    }

    /// Processes that lock a file: none in some runs.
    pub fn lockers(&self) -> usize {
        [0, 2, 3, 5][self.seed as usize % 4]
    }

    pub fn timeouts(&self) -> Timeouts {
        timeouts(self.queue)
    }

    pub fn nodes(&self) -> u16 {
        NODES.max(self.hosts as u16)
    }

    fn made(&self) -> Made {
        let (size, journal_bytes, plain) = (self.size, self.journal_bytes, self.plain);
        made(Shape { size, journal_bytes, nodes: self.nodes(), plain })
    }

    /// Free blocks of the volume before the first mount.
    pub fn free_blocks(&self) -> u64 {
        self.made().free_blocks
    }

    pub fn layout(&self) -> cluster::Layout {
        self.made().layout
    }

    /// Where the groups begin, in bytes.
    pub fn places(&self) -> u64 {
        self.made().places
    }

    /// A device with an empty volume.
    pub fn disk(&self) -> Arc<SimDisk> {
        let mut cfg = SimConfig::new(self.size, self.seed);
        cfg.fencing = self.fencing;
        cfg.write_cache = self.write_cache;
        cfg.split_writes = self.split_writes;
        if self.fencing != FencingKind::Reservations {
            cfg.queue_limit = self.queue;
        }
        cfg.late_write_delay = self.late_write_delay;
        cfg.latency_us = self.latency_us.0..=self.latency_us.1;
        SimDisk::from_snapshot(cfg, &self.made().image)
    }
}

fn timeouts(queue: Duration) -> Timeouts {
    Timeouts { queue_ms: queue.as_millis() as u32, ..Timeouts::default() }
}

/// A volume as mkfs leaves it.
#[derive(Clone)]
struct Made {
    image: Arc<SimImage>,
    layout: cluster::Layout,
    /// Where the groups begin, in bytes.
    places: u64,
    free_blocks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    size: u64,
    journal_bytes: u64,
    nodes: u16,
    plain: bool,
}

/// Volumes are made once per process; they do not depend on the seed.
fn made(shape: Shape) -> Made {
    static MADE: OnceLock<Mutex<BTreeMap<Shape, Made>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Default::default).lock();
    made.entry(shape).or_insert_with(|| make(shape)).clone()
}

fn make(shape: Shape) -> Made {
    let disk = SimDisk::new(SimConfig::new(shape.size, 7));
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let opts = mkfs::FormatOptions {
        nodes: Some(shape.nodes),
        journal_size: Some(shape.journal_bytes),
        timeouts: timeouts(QUEUE),
        locks: if shape.plain { mkfs::Locks::Plain } else { mkfs::Locks::CompareAndWrite },
        ..mkfs::FormatOptions::seeded(7)
    };
    let rt = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let made = std::thread::scope(|s| {
        // Not in the seed's own runtime, which may already run.
        s.spawn(|| rt.map(|rt| rt.block_on(mkfs::format(&raw, &opts, &mut |_| {})))).join()
    });
    match made {
        Ok(Ok(Ok(made))) => Made {
            image: Arc::new(disk.snapshot()),
            layout: made.superblock.layout().cluster(),
            places: made.superblock.layout().group_header(0) * BLOCK,
            free_blocks: made.free_blocks,
        },
        other => panic!("mkfs of the simulated device: {other:?}"),
    }
}
