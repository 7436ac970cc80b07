//! The simulated device's table of operations and the moments at which they take effect.
//!
//! No task drives the device: whoever touches it first applies, in order, all that has become due by the (paused)
//! clock. An operation therefore takes effect even when its caller has dropped it, as on a real device, and the order
//! depends on nothing but the seed and the sequence of calls. tokio's clock wakes sleepers at whole milliseconds;
//! between operations in flight together the microseconds still decide.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

use super::fault::{Faults, WriteFault};
use super::medium::{Medium, SimImage};
use super::{NodeMode, OpKind, SimConfig};
use crate::{AlignedBuf, Caw, DevError, FenceKey, Fenced, FencingKind, Presence, Result};

/// The clock, if there is one: direct access to the contents works outside of a runtime too.
pub(super) fn clock() -> Option<Instant> {
    tokio::runtime::Handle::try_current().ok().map(|_| Instant::now())
}

#[derive(Clone)]
pub(super) enum Req {
    Read { offset: u64, lens: Vec<usize> },
    Write { offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool },
    Flush { exempt: BTreeSet<u64> },
    Caw { offset: u64, expect: Vec<u8>, new: Vec<u8> },
    Register(FenceKey),
    Unregister,
    Presence(FenceKey),
    Fence(FenceKey),
    Discard { offset: u64, len: u64 },
}

impl Req {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Req::Read { .. } => "read",
            Req::Write { .. } => "write",
            Req::Flush { .. } => "flush",
            Req::Caw { .. } => "compare-and-write",
            Req::Register(_) => "register",
            Req::Unregister => "unregister",
            Req::Presence(_) => "presence",
            Req::Fence(_) => "fence",
            Req::Discard { .. } => "discard",
        }
    }

    fn kind(&self) -> Option<OpKind> {
        match self {
            Req::Read { .. } => Some(OpKind::Read),
            Req::Write { .. } => Some(OpKind::Write),
            Req::Flush { .. } => Some(OpKind::Flush),
            Req::Caw { .. } => Some(OpKind::CompareAndWrite),
            _ => None,
        }
    }

    fn extent(&self) -> Range<u64> {
        match self {
            Req::Read { offset, lens } => *offset..*offset + lens.iter().map(|l| *l as u64).sum::<u64>(),
            Req::Write { offset, bufs, .. } => *offset..*offset + bufs.iter().map(|b| b.len() as u64).sum::<u64>(),
            Req::Caw { offset, new, .. } => *offset..*offset + new.len() as u64,
            Req::Discard { offset, len } => *offset..*offset + *len,
            _ => 0..0,
        }
    }

    /// Whether it leaves something behind on the device.
    fn has_effect(&self) -> bool {
        !matches!(self, Req::Read { .. } | Req::Presence(_) | Req::Flush { .. })
    }

    fn changes_medium(&self) -> bool {
        matches!(self, Req::Write { .. } | Req::Caw { .. } | Req::Discard { .. })
    }

    pub(super) fn unknown(&self) -> DevError {
        let r = self.extent();
        DevError::Unknown { op: self.name(), offset: r.start, len: (r.end - r.start) as usize }
    }

    fn io_error(&self, source: std::io::Error) -> DevError {
        let r = self.extent();
        DevError::Io { op: self.name(), offset: r.start, len: (r.end - r.start) as usize, source: Arc::new(source) }
    }

    fn eio(&self) -> DevError {
        self.io_error(std::io::Error::from_raw_os_error(libc::EIO))
    }
}

pub(super) enum Reply {
    Bufs(Vec<AlignedBuf>),
    Unit,
    Caw(Caw),
    Presence(Presence),
    Fenced(Fenced),
}

struct Op {
    node: usize,
    epoch: u64,
    req: Req,
    /// When it takes effect.
    moment: Instant,
    /// When its caller hears of it; not before `moment`.
    done_at: Instant,
    result: Option<Result<Reply>>,
    /// Nobody waits for the result.
    detached: bool,
}

pub(super) struct NodeState {
    pub(super) name: String,
    pub(super) mode: NodeMode,
    /// Told at every change of `mode`. (A watch channel wakes its receivers in random order.)
    pub(super) changed: Arc<Notify>,
    registration: Option<FenceKey>,
    fenced: bool,
    /// Grows when the node is fenced and when it registers anew after that: what was called before is refused
    /// also afterwards (I12).
    pub(super) epoch: u64,
    crash_in: Option<(Option<OpKind>, u64)>,
    pub(super) issued: BTreeMap<OpKind, u64>,
    /// The device lost power since this node's last flush.
    cache_lost: bool,
    /// Tests' direct access: no latency, no faults, everything durable.
    pub(super) raw: bool,
}

/// What a caller does next.
pub(super) enum Step {
    Ready(Result<Reply>),
    Until(Instant),
    /// Until the node's mode changes.
    Wait,
    Never,
}

pub(super) struct State {
    pub(super) cfg: SimConfig,
    rng: StdRng,
    pub(super) medium: Medium,
    pub(super) faults: Faults,
    pub(super) nodes: Vec<NodeState>,
    ops: BTreeMap<u64, Op>,
    queue: BTreeSet<(Instant, u64)>,
    next_seq: u64,
    stalled_until: Option<Instant>,
    started: Option<Instant>,
    trace: u64,
}

impl State {
    pub(super) fn new(cfg: SimConfig, image: SimImage) -> Self {
        Self {
            rng: StdRng::seed_from_u64(cfg.seed),
            medium: Medium::new(image, cfg.sector_size as usize, cfg.write_cache),
            faults: Faults::new(cfg.rates),
            cfg,
            nodes: Vec::new(),
            ops: BTreeMap::new(),
            queue: BTreeSet::new(),
            next_seq: 1,
            stalled_until: None,
            started: None,
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    pub(super) fn add_node(&mut self, name: &str, raw: bool) -> usize {
        self.nodes.push(NodeState {
            name: name.to_owned(),
            mode: NodeMode::Live,
            changed: Arc::new(Notify::new()),
            registration: None,
            fenced: false,
            epoch: 0,
            crash_in: None,
            issued: BTreeMap::new(),
            cache_lost: false,
            raw,
        });
        self.nodes.len() - 1
    }

    pub(super) fn trace(&self) -> u64 {
        self.trace
    }

    fn note(&mut self, values: [u64; 4]) {
        for value in values {
            for byte in value.to_le_bytes() {
                self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
    }

    /// Applies all that has become due.
    pub(super) fn advance(&mut self) {
        let Some(now) = clock() else { return };
        while let Some(&(moment, seq)) = self.queue.first() {
            if moment > now {
                break;
            }
            self.queue.pop_first();
            self.apply(seq);
        }
    }

    /// Applies all that is in flight, due or not.
    pub(super) fn settle(&mut self) {
        while let Some((_, seq)) = self.queue.pop_first() {
            self.apply(seq);
        }
    }

    fn apply(&mut self, seq: u64) {
        let Some(mut op) = self.ops.remove(&seq) else { return };
        let started = *self.started.get_or_insert(op.moment);
        let extent = op.req.extent();
        let at = op.moment.saturating_duration_since(started).as_micros() as u64;
        let result = self.execute(seq, op.node, op.epoch, &op.req);
        self.note([at, op.node as u64, extent.start, extent.end ^ u64::from(result.is_err()) << 63]);
        tracing::trace!(at, node = %self.nodes[op.node].name, op = op.req.name(), ?extent, ok = result.is_ok(), "sim");
        if !op.detached {
            op.result.get_or_insert(result);
            self.ops.insert(seq, op);
        }
    }

    fn schedule(&mut self, op: Op) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.queue.insert((op.moment, seq));
        self.ops.insert(seq, op);
        seq
    }

    /// Takes an operation of a node that is not hung. `None`: the node has crashed.
    pub(super) fn submit(&mut self, node: usize, epoch: u64, mut req: Req) -> Option<u64> {
        self.advance();
        let now = clock().unwrap_or_else(Instant::now);
        let mode = self.nodes[node].mode;
        if mode == NodeMode::Crashed {
            return None;
        }
        if let Req::Flush { exempt } = &mut req {
            let unfinished = |op: &Op| op.req.changes_medium() && (op.result.is_none() || op.done_at > now);
            exempt.extend(self.ops.iter().filter(|(_, op)| unfinished(op)).map(|(seq, _)| *seq));
        }
        let n = &mut self.nodes[node];
        let mut crash_now = false;
        if let Some(kind) = req.kind() {
            *n.issued.entry(kind).or_default() += 1;
            if let Some((only, left)) = &mut n.crash_in
                && only.is_none_or(|k| k == kind)
            {
                *left = left.saturating_sub(1);
                crash_now = *left == 0;
            }
        }
        let seq = if n.raw {
            let seq = self.schedule(Op { node, epoch, req, moment: now, done_at: now, result: None, detached: false });
            self.queue.remove(&(now, seq));
            self.apply(seq);
            seq
        } else if mode == NodeMode::Cut {
            let result = Some(Err(req.unknown()));
            let done_at = now + self.cfg.cut_timeout;
            let seq = self.schedule(Op { node, epoch, req, moment: now, done_at, result, detached: false });
            self.queue.remove(&(now, seq));
            seq
        } else {
            let start = self.stalled_until.map_or(now, |t| t.max(now));
            let latency = self.rng.random_range(self.cfg.latency_us.clone());
            let done_at = start + Duration::from_micros(latency);
            if self.cfg.split_writes {
                self.split(node, epoch, &mut req, start, latency);
            }
            let moment = start + Duration::from_micros(self.rng.random_range(0..=latency));
            self.schedule(Op { node, epoch, req, moment, done_at, result: None, detached: false })
        };
        if crash_now {
            self.crash(node);
            return None;
        }
        Some(seq)
    }

    /// Lets the tail of a write of several sectors take effect at a moment of its own.
    fn split(&mut self, node: usize, epoch: u64, req: &mut Req, start: Instant, latency: u64) {
        let Req::Write { offset, bufs, fua } = req else { return };
        let mut bytes = Vec::new();
        bufs.iter().for_each(|b| bytes.extend_from_slice(b));
        let sector = self.cfg.sector_size as usize;
        let sectors = bytes.len() / sector;
        if sectors < 2 {
            return;
        }
        let cut = self.rng.random_range(1..sectors) * sector;
        let tail = Req::Write {
            offset: *offset + cut as u64,
            bufs: vec![Arc::new(AlignedBuf::copy_of(&bytes[cut..]))],
            fua: *fua,
        };
        *bufs = vec![Arc::new(AlignedBuf::copy_of(&bytes[..cut]))];
        let moment = start + Duration::from_micros(self.rng.random_range(0..=latency));
        self.schedule(Op { node, epoch, req: tail, moment, done_at: moment, result: None, detached: true });
    }

    pub(super) fn step(&mut self, seq: u64) -> Step {
        self.advance();
        let Some(op) = self.ops.get(&seq) else { return Step::Never };
        let node = &self.nodes[op.node];
        match node.mode {
            NodeMode::Crashed => return Step::Never,
            NodeMode::Hung if !node.raw => return Step::Wait,
            _ => {}
        }
        if !node.raw && clock().is_some_and(|now| op.done_at > now) {
            return Step::Until(op.done_at);
        }
        match self.ops.remove(&seq) {
            Some(Op { result: Some(result), .. }) => Step::Ready(result),
            // `done_at` is never before `moment`, so what is done has been applied.
            Some(op) => unreachable!("simulated {} done before it took effect", op.req.name()),
            None => Step::Never,
        }
    }

    /// The caller has gone: the operation takes effect all the same.
    pub(super) fn detach(&mut self, seq: u64) {
        if let Some(op) = self.ops.get_mut(&seq) {
            op.detached = true;
            if !self.queue.contains(&(op.moment, seq)) {
                self.ops.remove(&seq);
            }
        }
    }

    fn execute(&mut self, seq: u64, node: usize, epoch: u64, req: &Req) -> Result<Reply> {
        let raw = self.nodes[node].raw;
        let writes = req.changes_medium() || matches!(req, Req::Flush { .. });
        if writes && self.refused(node, epoch) {
            return Err(DevError::Fenced);
        }
        let rates = if raw { Default::default() } else { self.faults.rates };
        let extent = req.extent();
        match req {
            Req::Read { offset, lens } => {
                if !raw && (self.faults.read_is_bad(&extent) || self.chance(rates.read_error)) {
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
            Req::Write { offset, bufs, fua } => {
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
                    self.medium.write(seq, *offset, new, raw);
                }
                match (unknown, matches) {
                    (true, _) => Err(req.unknown()),
                    (false, true) => Ok(Reply::Caw(Caw::Written)),
                    (false, false) => Ok(Reply::Caw(Caw::Mismatch(found))),
                }
            }
            Req::Register(key) => {
                let exclusive = self.cfg.fencing == FencingKind::ProcessLock;
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

    fn refused(&self, node: usize, epoch: u64) -> bool {
        self.nodes[node].fenced || self.nodes[node].epoch != epoch
    }

    fn chance(&mut self, p: f64) -> bool {
        p > 0.0 && self.rng.random_bool(p.min(1.0))
    }

    /// Writes `bufs` from `offset`: all of it, or if `torn` some of the good sectors.
    fn write_some(&mut self, seq: u64, offset: u64, bufs: &[Arc<AlignedBuf>], durable: bool, torn: bool) {
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

    fn slot_owner(&self, slot: u16) -> Option<usize> {
        self.nodes.iter().position(|n| n.registration.is_some_and(|key| key.slot == slot))
    }

    fn in_flight(&self, belongs: impl Fn(usize) -> bool) -> Vec<u64> {
        self.ops.iter().filter(|(_, op)| belongs(op.node)).map(|(seq, _)| *seq).collect()
    }

    /// Ends an operation in flight: it has arrived wholly, partly or not at all, and whoever waits cannot know.
    fn abort(&mut self, seq: u64) {
        let Some(mut op) = self.ops.remove(&seq) else { return };
        let queued = self.queue.remove(&(op.moment, seq));
        if queued {
            match (&op.req, self.rng.random_range(0..3)) {
                (Req::Write { offset, bufs, .. }, 0) if !self.refused(op.node, op.epoch) => {
                    let (offset, bufs) = (*offset, bufs.clone());
                    self.write_some(seq, offset, &bufs, false, true);
                }
                (req, 1) if req.has_effect() => {
                    let req = req.clone();
                    // Its outcome is unknown to the caller, whatever it was.
                    let _ = self.execute(seq, op.node, op.epoch, &req);
                }
                _ => {}
            }
            self.note([
                op.moment.saturating_duration_since(self.started.unwrap_or(op.moment)).as_micros() as u64,
                seq,
                0,
                1,
            ]);
        }
        let unfinished = queued || clock().is_some_and(|now| op.done_at > now);
        if unfinished {
            op.result = Some(Err(op.req.unknown()));
        }
        if !op.detached {
            self.ops.insert(seq, op);
        }
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

    fn set_mode(&mut self, node: usize, mode: NodeMode) {
        let n = &mut self.nodes[node];
        n.mode = mode;
        n.changed.notify_waiters();
    }

    pub(super) fn crash_after(&mut self, node: usize, kind: Option<OpKind>, n: u64) {
        self.nodes[node].crash_in = Some((kind, n.max(1)));
    }

    pub(super) fn crash(&mut self, node: usize) {
        self.advance();
        if self.nodes[node].mode == NodeMode::Crashed {
            return;
        }
        for seq in self.in_flight(|n| n == node) {
            // With a process lock the node counts as gone at once; elsewhere its last writes may be on their way.
            let late = self.cfg.fencing != FencingKind::ProcessLock && self.rng.random_bool(0.33);
            if !(late && self.send_late(seq)) {
                self.abort(seq);
                self.ops.remove(&seq);
            }
        }
        if self.cfg.fencing == FencingKind::ProcessLock {
            self.nodes[node].registration = None;
        }
        self.set_mode(node, NodeMode::Crashed);
    }

    /// Turns an operation that has not taken effect into one that will, later, with nobody waiting.
    fn send_late(&mut self, seq: u64) -> bool {
        let Some(op) = self.ops.get(&seq) else { return false };
        let (Some(now), true) = (clock(), op.req.changes_medium()) else { return false };
        if self.cfg.late_write_delay.is_zero() || !self.queue.remove(&(op.moment, seq)) {
            return false;
        }
        let (node, epoch, req) = (op.node, op.epoch, op.req.clone());
        self.ops.remove(&seq);
        let delay = self.rng.random_range(0..=self.cfg.late_write_delay.as_micros() as u64);
        let moment = now + Duration::from_micros(delay);
        self.schedule(Op { node, epoch, req, moment, done_at: moment, result: None, detached: true });
        true
    }

    pub(super) fn cut(&mut self, node: usize, cut: bool) {
        self.advance();
        match (self.nodes[node].mode, cut) {
            (NodeMode::Live | NodeMode::Hung, true) => {}
            (NodeMode::Cut, false) => return self.set_mode(node, NodeMode::Live),
            _ => return,
        }
        let now = clock().unwrap_or_else(Instant::now);
        for seq in self.in_flight(|n| n == node) {
            let Some(op) = self.ops.get(&seq) else { continue };
            if op.detached || (op.result.is_some() && op.done_at <= now) {
                continue;
            }
            let (epoch, req) = (op.epoch, op.req.clone());
            let (moment, queued) = (op.moment, op.result.is_none());
            if !(queued && self.rng.random_bool(0.5) && self.send_late(seq)) {
                if queued && req.has_effect() && self.rng.random_bool(0.5) {
                    let req = req.clone();
                    self.schedule(Op { node, epoch, req, moment, done_at: moment, result: None, detached: true });
                }
                self.queue.remove(&(moment, seq));
            }
            let result = Some(Err(req.unknown()));
            let done_at = now + self.cfg.cut_timeout;
            self.ops.insert(seq, Op { node, epoch, req, moment, done_at, result, detached: false });
        }
        self.set_mode(node, NodeMode::Cut);
    }

    pub(super) fn hang(&mut self, node: usize, hang: bool) {
        self.advance();
        match (self.nodes[node].mode, hang) {
            (NodeMode::Live | NodeMode::Cut, true) => {}
            (NodeMode::Hung, false) => return self.set_mode(node, NodeMode::Live),
            _ => return,
        }
        let late = self.cfg.late_write_delay.as_micros() as u64;
        for seq in self.in_flight(|n| n == node) {
            let (Some(now), Some(op)) = (clock(), self.ops.get_mut(&seq)) else { continue };
            if late > 0
                && op.req.changes_medium()
                && self.queue.contains(&(op.moment, seq))
                && self.rng.random_bool(0.5)
            {
                self.queue.remove(&(op.moment, seq));
                op.moment = now + Duration::from_micros(self.rng.random_range(0..=late));
                op.done_at = op.done_at.max(op.moment);
                self.queue.insert((op.moment, seq));
            }
        }
        self.set_mode(node, NodeMode::Hung);
    }

    /// Nothing takes effect for `time`; what is in flight is late by as much.
    pub(super) fn stall(&mut self, time: Duration) {
        self.advance();
        let Some(now) = clock() else { return };
        self.queue = self.queue.iter().map(|(moment, seq)| (*moment + time, *seq)).collect();
        for op in self.ops.values_mut() {
            op.moment += time;
            if op.done_at > now {
                op.done_at += time;
            }
        }
        self.stalled_until = Some(self.stalled_until.map_or(now, |t| t.max(now)) + time);
    }

    pub(super) fn power_loss(&mut self) {
        self.advance();
        for seq in self.in_flight(|_| true) {
            self.abort(seq);
        }
        self.medium.power_loss(&mut self.rng);
        for n in &mut self.nodes {
            n.cache_lost = !n.raw;
        }
    }

    pub(super) fn corrupt(&mut self, offset: u64, len: usize) {
        self.advance();
        self.medium.corrupt(offset, len, &mut self.rng);
    }

    /// The node's process has ended without a crash.
    pub(super) fn close(&mut self, node: usize) {
        if self.cfg.fencing == FencingKind::ProcessLock {
            self.nodes[node].registration = None;
        }
    }
}
