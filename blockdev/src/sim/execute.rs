//! What an operation does to the simulated device at the moment when it takes effect.

use std::sync::Arc;

use rand::RngExt;
use tokio::time::Instant;

use super::fault::{FaultRates, WriteFault};
use super::request::{Reply, Req};
use super::state::State;
use crate::{AlignedBuf, Caw, DevError, FenceKey, Fenced, FencingKind, IoClass, Presence, Result};

impl State {
    pub(super) fn execute_as(
        &mut self,
        seq: u64,
        node: usize,
        epoch: u64,
        issued: Instant,
        req: &Req,
    ) -> Result<Reply> {
        // A compare-and-write is told of once it has matched.
        if matches!(req, Req::Write { .. } | Req::Discard { .. }) && !self.refused(node, epoch) {
            self.witness(node, issued, req, true);
        }
        self.execute(seq, node, epoch, issued, req)
    }

    fn execute(&mut self, seq: u64, node: usize, epoch: u64, issued: Instant, req: &Req) -> Result<Reply> {
        let raw = self.nodes[node].raw;
        let writes = req.changes_medium() || matches!(req, Req::Flush { .. });
        if writes && self.refused(node, epoch) {
            return Err(DevError::Fenced);
        }
        let rates = if raw { Default::default() } else { self.faults.rates };
        let extent = req.extent();
        match req {
            Req::Read { offset, lens } => {
                let fails = self.nodes[node].reads_fail || self.faults.read_is_bad(&extent);
                if !raw && (fails || self.chance(rates.read_error)) {
                    return Err(req.eio());
                }
                let mut at = *offset;
                let mut bufs = Vec::with_capacity(lens.len());
                for len in lens {
                    let mut buf = AlignedBuf::zeroed(*len);
                    self.medium.read(at, &mut buf);
                    at += *len as u64;
                    bufs.push(buf);
                }
                Ok(Reply::Bufs(bufs))
            }
            Req::Write { class, offset, bufs, fua } => {
                if !raw {
                    match self.faults.take_armed(&extent) {
                        Some(WriteFault::Lost) => return Ok(Reply::Unit),
                        Some(WriteFault::Misdirected { to }) => {
                            self.write_some(seq, to, bufs, *fua, false);
                            return Ok(Reply::Unit);
                        }
                        None => {}
                    }
                    if self.faults.write_is_bad(&extent) || self.chance(rates.write_error) {
                        self.write_some(seq, *offset, bufs, false, true);
                        return Err(req.eio());
                    }
                    if self.chance(rates.write_unknown) {
                        self.write_some(seq, *offset, bufs, false, true);
                        return Err(req.unknown());
                    }
                    if *class == IoClass::Meta && (rates.meta_lost > 0.0 || rates.meta_misdirected > 0.0) {
                        self.write_and_lie(seq, *offset, bufs, &rates);
                        return Ok(Reply::Unit);
                    }
                }
                self.write_some(seq, *offset, bufs, *fua || raw, false);
                Ok(Reply::Unit)
            }
            Req::Flush { exempt } => {
                if std::mem::take(&mut self.nodes[node].cache_lost) || self.chance(rates.flush_error) {
                    return Err(req.eio());
                }
                self.medium.flush(seq, exempt);
                Ok(Reply::Unit)
            }
            Req::Caw { offset, expect, new } => {
                if !raw && (self.faults.write_is_bad(&extent) || self.faults.read_is_bad(&extent)) {
                    return Err(req.eio());
                }
                let unknown = self.chance(rates.caw_unknown);
                if unknown && self.rng.random_bool(0.5) {
                    return Err(req.unknown());
                }
                let mut found = vec![0; expect.len()];
                self.medium.read(*offset, &mut found);
                let matches = found == *expect && !self.chance(rates.caw_miscompare);
                if matches {
                    self.witness(node, issued, req, true);
                    self.medium.write(seq, *offset, new, raw);
                }
                match (unknown, matches) {
                    (true, _) => Err(req.unknown()),
                    (false, true) => Ok(Reply::Caw(Caw::Written)),
                    (false, false) => Ok(Reply::Caw(Caw::Mismatch(found))),
                }
            }
            Req::Register(key) => {
                let exclusive = self.cfg.fencing == FencingKind::ProcessLock && !self.cfg.others_unseen;
                if exclusive && self.slot_owner(key.slot).is_some_and(|owner| owner != node) {
                    return Err(req.io_error(std::io::ErrorKind::ResourceBusy.into()));
                }
                let n = &mut self.nodes[node];
                n.registration = Some(*key);
                n.epoch += u64::from(std::mem::take(&mut n.fenced));
                Ok(Reply::Unit)
            }
            Req::Unregister => {
                self.nodes[node].registration = None;
                Ok(Reply::Unit)
            }
            Req::Presence(key) => Ok(Reply::Presence(match self.cfg.fencing {
                FencingKind::ProcessLock
                    if self.cfg.others_unseen && self.nodes[node].registration.is_none_or(|r| r.slot != key.slot) =>
                {
                    Presence::Gone
                }
                FencingKind::ProcessLock if self.slot_owner(key.slot).is_some() => Presence::Present,
                FencingKind::ProcessLock => Presence::Gone,
                FencingKind::Reservations | FencingKind::None => Presence::Unknown,
            })),
            Req::Fence(key) => Ok(Reply::Fenced(match self.cfg.fencing {
                FencingKind::ProcessLock if self.slot_owner(key.slot).is_some() => Fenced::MustWait,
                FencingKind::ProcessLock => Fenced::Done,
                FencingKind::Reservations => {
                    self.preempt(*key);
                    Fenced::Done
                }
                FencingKind::None => Fenced::MustWait,
            })),
            Req::Discard { .. } => {
                let zeros = vec![0; self.cfg.sector_size as usize];
                for at in self.medium.written_sectors(extent.start, extent.end - extent.start) {
                    // The contents of a discarded sector are undefined.
                    if self.rng.random_bool(0.5) {
                        self.medium.write_sector(seq, at, &zeros, raw);
                    }
                }
                Ok(Reply::Unit)
            }
        }
    }

    pub(super) fn refused(&self, node: usize, epoch: u64) -> bool {
        self.nodes[node].fenced || self.nodes[node].epoch != epoch
    }

    fn chance(&mut self, p: f64) -> bool {
        p > 0.0 && self.rng.random_bool(p.min(1.0))
    }

    /// Writes `bufs` from `offset`: all of it, or if `torn` some of the good sectors.
    pub(super) fn write_some(&mut self, seq: u64, offset: u64, bufs: &[Arc<AlignedBuf>], durable: bool, torn: bool) {
        let sector = self.cfg.sector_size as usize;
        let sectors = bufs.iter().map(|b| b.len() / sector).sum::<usize>();
        // Half of the torn writes stop somewhere, the others have holes.
        let prefix = (torn && self.rng.random_bool(0.5)).then(|| self.rng.random_range(0..=sectors));
        let mut at = offset;
        for (i, bytes) in bufs.iter().flat_map(|b| b.chunks(sector)).enumerate() {
            let arrives = match prefix {
                _ if !torn => true,
                Some(n) => i < n,
                None => self.rng.random_bool(0.5),
            };
            let range = at..at + sector as u64;
            if arrives && !(torn && self.faults.write_is_bad(&range)) && range.end <= self.cfg.size {
                self.medium.write_sector(seq, at, bytes, durable);
            }
            at = range.end;
        }
    }

    /// Each block for itself arrives, is lost, or is another.
    fn write_and_lie(&mut self, seq: u64, offset: u64, bufs: &[Arc<AlignedBuf>], rates: &FaultRates) {
        let mut at = offset;
        for buf in bufs {
            let before = self.faults.last_meta.replace(buf.clone());
            let other = before.filter(|b| b.len() == buf.len());
            if self.chance(rates.meta_lost) {
                self.faults.lies += 1;
            } else if let Some(other) = other.filter(|_| self.chance(rates.meta_misdirected)) {
                self.faults.lies += 1;
                self.write_some(seq, at, &[other], false, false);
            } else {
                self.write_some(seq, at, std::slice::from_ref(buf), false, false);
            }
            at += buf.len() as u64;
        }
    }

    fn slot_owner(&self, slot: u16) -> Option<usize> {
        self.nodes.iter().position(|n| n.registration.is_some_and(|key| key.slot == slot))
    }

    fn preempt(&mut self, key: FenceKey) {
        for victim in 0..self.nodes.len() {
            if self.nodes[victim].registration == Some(key) {
                for seq in self.in_flight(|node| node == victim) {
                    self.abort(seq);
                }
                let n = &mut self.nodes[victim];
                n.registration = None;
                n.fenced = true;
                n.epoch += 1;
            }
        }
    }
}
