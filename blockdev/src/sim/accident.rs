//! Accidents: what becomes of operations in flight when a node crashes, hangs, is cut off or fenced, and when the
//! device stalls or loses power.

use rand::RngExt;
use tokio::time::{Duration, Instant};

use super::request::Req;
use super::state::{Op, State, clock};
use super::{NodeMode, OpKind};
use crate::FencingKind;

impl State {
    pub(super) fn in_flight(&self, belongs: impl Fn(usize) -> bool) -> Vec<u64> {
        self.ops.iter().filter(|(_, op)| belongs(op.node)).map(|(seq, _)| *seq).collect()
    }

    /// Ends an operation in flight: it has arrived wholly, partly or not at all, and whoever waits cannot know.
    pub(super) fn abort(&mut self, seq: u64) {
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
                    let _ = self.execute_as(seq, op.node, op.epoch, op.issued, &req);
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
        let (node, epoch, issued, req) = (op.node, op.epoch, op.issued, op.req.clone());
        self.ops.remove(&seq);
        let delay = self.rng.random_range(0..=self.cfg.late_write_delay.as_micros() as u64);
        let moment = now + Duration::from_micros(delay);
        self.schedule(Op { node, epoch, issued, req, moment, done_at: moment, result: None, detached: true });
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
            let (epoch, issued, req) = (op.epoch, op.issued, op.req.clone());
            let (moment, queued) = (op.moment, op.result.is_none());
            if !(queued && self.rng.random_bool(0.5) && self.send_late(seq)) {
                if queued && req.has_effect() && self.rng.random_bool(0.5) {
                    let req = req.clone();
                    self.schedule(Op {
                        node,
                        epoch,
                        issued,
                        req,
                        moment,
                        done_at: moment,
                        result: None,
                        detached: true,
                    });
                }
                self.queue.remove(&(moment, seq));
            }
            let result = Some(Err(req.unknown()));
            let done_at = now + self.cfg.cut_timeout;
            self.ops.insert(seq, Op { node, epoch, issued, req, moment, done_at, result, detached: false });
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
            // Of a detached one nobody could be kept waiting: it may be the tail of a write whose head is acknowledged.
            if late > 0
                && !op.detached
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
}
