//! The simulated device's table of operations and the moments at which they take effect.
//!
//! No task drives the device: whoever touches it first applies, in order, all that has become due by the (paused)
//! clock. An operation therefore takes effect even when its caller has dropped it, as on a real device, and the order
//! depends on nothing but the seed and the sequence of calls. tokio's clock wakes sleepers at whole milliseconds;
//! between operations in flight together the microseconds still decide.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

use super::audit::{Audit, Change};
use super::fault::Faults;
use super::medium::{Medium, SimImage};
use super::request::{Reply, Req};
use super::{NodeMode, OpKind, SimConfig};
use crate::{AlignedBuf, FenceKey, Result};

/// The clock, if there is one: direct access to the contents works outside of a runtime too.
pub(super) fn clock() -> Option<Instant> {
    tokio::runtime::Handle::try_current().ok().map(|_| Instant::now())
}

pub(super) struct Op {
    pub(super) node: usize,
    pub(super) epoch: u64,
    pub(super) issued: Instant,
    pub(super) req: Req,
    /// When it takes effect.
    pub(super) moment: Instant,
    /// When its caller hears of it; not before `moment`.
    pub(super) done_at: Instant,
    pub(super) result: Option<Result<Reply>>,
    /// Nobody waits for the result.
    pub(super) detached: bool,
}

pub(super) struct NodeState {
    pub(super) name: String,
    pub(super) mode: NodeMode,
    /// Told at every change of `mode`. (A watch channel wakes its receivers in random order.)
    pub(super) changed: Arc<Notify>,
    pub(super) registration: Option<FenceKey>,
    pub(super) fenced: bool,
    /// Grows when the node is fenced and when it registers anew after that: what was called before is refused
    /// also afterwards (I12).
    pub(super) epoch: u64,
    pub(super) crash_in: Option<(Option<OpKind>, u64)>,
    pub(super) issued: BTreeMap<OpKind, u64>,
    /// The device lost power since this node's last flush.
    pub(super) cache_lost: bool,
    pub(super) reads_fail: bool,
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
    pub(super) rng: StdRng,
    pub(super) medium: Medium,
    pub(super) faults: Faults,
    pub(super) nodes: Vec<NodeState>,
    pub(super) ops: BTreeMap<u64, Op>,
    pub(super) queue: BTreeSet<(Instant, u64)>,
    next_seq: u64,
    pub(super) stalled_until: Option<Instant>,
    pub(super) started: Option<Instant>,
    pub(super) audit: Option<Arc<dyn Audit>>,
    pub(super) violation: Option<String>,
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
            audit: None,
            violation: None,
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    pub(super) fn enlarge(&mut self, size: u64) {
        self.cfg.size = size;
        self.medium.enlarge(size);
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
            reads_fail: false,
            raw,
        });
        self.nodes.len() - 1
    }

    pub(super) fn trace(&self) -> u64 {
        self.trace
    }

    pub(super) fn note(&mut self, values: [u64; 4]) {
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
        // Nobody would hear of the failure of a detached one, which may be half of an acknowledged write.
        let faults = op.detached.then(|| std::mem::take(&mut self.faults));
        let result = self.execute_as(seq, op.node, op.epoch, op.issued, &op.req);
        if let Some(faults) = faults {
            self.faults = faults;
        }
        self.note([at, op.node as u64, extent.start, extent.end ^ u64::from(result.is_err()) << 63]);
        tracing::trace!(at, node = %self.nodes[op.node].name, op = op.req.name(), ?extent, ok = result.is_ok(), "sim");
        if !op.detached {
            op.result.get_or_insert(result);
            self.ops.insert(seq, op);
        }
    }

    /// Tells the audit of a change of this node's, before it takes effect.
    pub(super) fn witness(&mut self, node: usize, issued: Instant, req: &Req, arrives: bool) {
        let Some(audit) = self.audit.clone().filter(|_| !self.nodes[node].raw && self.violation.is_none()) else {
            return;
        };
        let joined: Vec<u8>;
        let (offset, new, compared): (u64, &[u8], bool) = match req {
            Req::Write { offset, bufs, .. } => {
                joined = bufs.iter().flat_map(|b| b.iter().copied()).collect();
                (*offset, &joined, false)
            }
            Req::Caw { offset, new, .. } => (*offset, new, true),
            Req::Discard { offset, .. } => (*offset, &[], false),
            _ => return,
        };
        let change = Change { node: &self.nodes[node].name, issued, offset, compared, new };
        let told = if arrives {
            let mut old = vec![0; new.len()];
            self.medium.read(offset, &mut old);
            audit.arrives(&change, &old)
        } else {
            audit.submitted(&change)
        };
        self.violation = told.err();
    }

    pub(super) fn schedule(&mut self, op: Op) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.queue.insert((op.moment, seq));
        self.ops.insert(seq, op);
        seq
    }

    /// Takes an operation of a node that is not hung. `None`: the node has crashed.
    pub(super) fn submit(&mut self, node: usize, epoch: u64, issued: Instant, mut req: Req) -> Option<u64> {
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
        self.witness(node, issued, &req, false);
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
            let seq = self.schedule(Op {
                node,
                epoch,
                issued,
                req,
                moment: now,
                done_at: now,
                result: None,
                detached: false,
            });
            self.queue.remove(&(now, seq));
            self.apply(seq);
            seq
        } else if mode == NodeMode::Cut {
            let result = Some(Err(req.unknown()));
            let done_at = now + self.cfg.cut_timeout;
            let seq = self.schedule(Op { node, epoch, issued, req, moment: now, done_at, result, detached: false });
            self.queue.remove(&(now, seq));
            seq
        } else {
            let start = self.stalled_until.map_or(now, |t| t.max(now));
            let latency = self.rng.random_range(self.cfg.latency_us.clone());
            let done_at = start + Duration::from_micros(latency);
            if self.cfg.split_writes && !self.faults.active() {
                self.split(node, epoch, issued, &mut req, start, latency);
            }
            let moment = start + Duration::from_micros(self.rng.random_range(0..=latency));
            self.schedule(Op { node, epoch, issued, req, moment, done_at, result: None, detached: false })
        };
        if crash_now {
            self.crash(node);
            return None;
        }
        Some(seq)
    }

    /// Lets the tail of a write of several sectors take effect at a moment of its own.
    fn split(&mut self, node: usize, epoch: u64, issued: Instant, req: &mut Req, start: Instant, latency: u64) {
        let Req::Write { class, offset, bufs, fua } = req else { return };
        let mut bytes = Vec::new();
        bufs.iter().for_each(|b| bytes.extend_from_slice(b));
        let sector = self.cfg.sector_size as usize;
        let sectors = bytes.len() / sector;
        if sectors < 2 {
            return;
        }
        let cut = self.rng.random_range(1..sectors) * sector;
        let tail = Req::Write {
            class: *class,
            offset: *offset + cut as u64,
            bufs: vec![Arc::new(AlignedBuf::copy_of(&bytes[cut..]))],
            fua: *fua,
        };
        *bufs = vec![Arc::new(AlignedBuf::copy_of(&bytes[..cut]))];
        let moment = start + Duration::from_micros(self.rng.random_range(0..=latency));
        self.schedule(Op { node, epoch, issued, req: tail, moment, done_at: moment, result: None, detached: true });
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
}
