//! What can go wrong on the simulated device besides crashes, cuts and power loss.

use std::ops::Range;
use std::sync::Arc;

use crate::AlignedBuf;

/// Probabilities of faults per operation, 0 by default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FaultRates {
    /// A read returns EIO.
    pub read_error: f64,
    /// A write returns EIO; any subset of its sectors was written.
    pub write_error: f64,
    /// A write returns [`DevError::Unknown`](crate::DevError::Unknown); any subset of its sectors was written.
    pub write_unknown: f64,
    /// A flush returns EIO and made nothing durable.
    pub flush_error: f64,
    /// A compare-and-write returns [`DevError::Unknown`](crate::DevError::Unknown), done or not (I9).
    pub caw_unknown: f64,
    /// A compare-and-write whose expectation holds reports a mismatch all the same, as arrays do under load.
    pub caw_miscompare: f64,
    /// A write of metadata in its place is acknowledged, but this block of it is lost: the one before stays.
    pub meta_lost: f64,
    /// ... but gets what the device was last given for another place.
    pub meta_misdirected: f64,
}

/// A lie the device tells about one write that it acknowledges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteFault {
    /// Nothing reaches the medium: the sectors stay stale.
    Lost,
    /// The data lands at this offset instead.
    Misdirected { to: u64 },
}

#[derive(Default)]
pub(super) struct Faults {
    pub(super) rates: FaultRates,
    bad_reads: Vec<Range<u64>>,
    bad_writes: Vec<Range<u64>>,
    armed: Vec<(Range<u64>, WriteFault)>,
    /// The last block of metadata that a node wrote to a device that lies.
    pub(super) last_meta: Option<Arc<AlignedBuf>>,
    /// Blocks of metadata lost or misdirected by chance.
    pub(super) lies: u64,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Faults {
    pub(super) fn new(rates: FaultRates) -> Self {
        Self { rates, ..Self::default() }
    }

    /// Whether commands may fail.
    pub(super) fn active(&self) -> bool {
        self.rates != FaultRates::default() || !self.bad_writes.is_empty() || !self.armed.is_empty()
    }

    pub(super) fn add_bad_reads(&mut self, range: Range<u64>) {
        self.bad_reads.push(range);
    }

    pub(super) fn add_bad_writes(&mut self, range: Range<u64>) {
        self.bad_writes.push(range);
    }

    pub(super) fn clear_bad(&mut self) {
        self.bad_reads.clear();
        self.bad_writes.clear();
    }

    pub(super) fn arm(&mut self, range: Range<u64>, fault: WriteFault) {
        self.armed.push((range, fault));
    }

    pub(super) fn read_is_bad(&self, range: &Range<u64>) -> bool {
        self.bad_reads.iter().any(|bad| overlap(bad, range))
    }

    pub(super) fn write_is_bad(&self, range: &Range<u64>) -> bool {
        self.bad_writes.iter().any(|bad| overlap(bad, range))
    }

    /// Takes the fault armed for a write of `range`, if any.
    pub(super) fn take_armed(&mut self, range: &Range<u64>) -> Option<WriteFault> {
        let i = self.armed.iter().position(|(armed, _)| overlap(armed, range))?;
        Some(self.armed.remove(i).1)
    }
}
