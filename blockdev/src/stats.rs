//! Counts of device operations, per purpose.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::IoClass;

const CLASSES: usize = 5;

#[derive(Debug, Default)]
struct Cell {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    compare_and_writes: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// Live counters of one node's device; cheap enough to be always on.
#[derive(Debug, Default)]
pub struct DeviceStats {
    cells: [Cell; CLASSES],
}

/// Counts of one class. Bytes include those of compare-and-writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassStats {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub compare_and_writes: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

impl ClassStats {
    fn combine(self, o: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            reads: f(self.reads, o.reads),
            writes: f(self.writes, o.writes),
            flushes: f(self.flushes, o.flushes),
            compare_and_writes: f(self.compare_and_writes, o.compare_and_writes),
            bytes_read: f(self.bytes_read, o.bytes_read),
            bytes_written: f(self.bytes_written, o.bytes_written),
        }
    }
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    classes: [ClassStats; CLASSES],
}

fn index(class: IoClass) -> usize {
    match class {
        IoClass::Meta => 0,
        IoClass::Data => 1,
        IoClass::Journal => 2,
        IoClass::Lock => 3,
        IoClass::Liveness => 4,
    }
}

impl DeviceStats {
    pub fn count_read(&self, class: IoClass, bytes: usize) {
        let c = &self.cells[index(class)];
        c.reads.fetch_add(1, Relaxed);
        c.bytes_read.fetch_add(bytes as u64, Relaxed);
    }

    pub fn count_write(&self, class: IoClass, bytes: usize) {
        let c = &self.cells[index(class)];
        c.writes.fetch_add(1, Relaxed);
        c.bytes_written.fetch_add(bytes as u64, Relaxed);
    }

    pub fn count_flush(&self, class: IoClass) {
        self.cells[index(class)].flushes.fetch_add(1, Relaxed);
    }

    pub fn count_compare_and_write(&self, bytes: usize) {
        let c = &self.cells[index(IoClass::Lock)];
        c.compare_and_writes.fetch_add(1, Relaxed);
        c.bytes_written.fetch_add(bytes as u64, Relaxed);
    }

    pub fn snapshot(&self) -> StatsSnapshot {
        let mut s = StatsSnapshot::default();
        for (cell, out) in self.cells.iter().zip(s.classes.iter_mut()) {
            *out = ClassStats {
                reads: cell.reads.load(Relaxed),
                writes: cell.writes.load(Relaxed),
                flushes: cell.flushes.load(Relaxed),
                compare_and_writes: cell.compare_and_writes.load(Relaxed),
                bytes_read: cell.bytes_read.load(Relaxed),
                bytes_written: cell.bytes_written.load(Relaxed),
            };
        }
        s
    }
}

impl StatsSnapshot {
    pub fn class(&self, class: IoClass) -> ClassStats {
        self.classes[index(class)]
    }

    /// Everything but the idle cost of membership.
    pub fn work(&self) -> ClassStats {
        [IoClass::Meta, IoClass::Data, IoClass::Journal, IoClass::Lock]
            .into_iter()
            .fold(ClassStats::default(), |sum, c| sum.combine(self.class(c), |a, b| a + b))
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut s = *self;
        for (a, b) in s.classes.iter_mut().zip(earlier.classes.iter()) {
            *a = a.combine(*b, |x, y| x - y);
        }
        s
    }
}
