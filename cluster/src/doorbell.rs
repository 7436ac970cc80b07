//! Doorbells: asking for locks through the device, where no hint arrives.
//!
//! A node has one cell in each other node's row and keeps in it what it currently waits for from that node. Rows are
//! polled with one read. Cells are plain writes: torn or stale ones are ignored or cost a look at a lock block.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, IoClass};
use parking_lot::Mutex;
use tokio::time::{Duration, Instant};

use crate::format::{Asked, Doorbell, MAX_REQUESTS};
use crate::node::{Shared, State, read_table};
use crate::{Incarnation, LockId, Mode, NodeId, Slot};

/// A request to look stays in the cell this long: the receiver polls its row much more often, and nobody takes it back.
const LOOK_STAYS: Duration = Duration::from_secs(1);

/// Our cell in one other node's row.
pub(crate) struct Bell {
    requests: Mutex<Requests>,
    /// Serialises the writes of the cell.
    writing: tokio::sync::Mutex<()>,
}

struct Requests {
    receiver: NodeId,
    counter: u64,
    /// Latest first; what does not fit is rung again by its waiter.
    wanted: VecDeque<(LockId, Asked, Instant)>,
    /// Changes of `wanted`, and how many of them are on disk.
    asked: u64,
    written: u64,
}

impl Shared {
    pub fn ring(self: &Arc<Self>, node: NodeId, id: LockId, mode: Mode) {
        self.ring_for(node, id, Asked::Want(mode));
    }

    /// Asks another node to look at what changed under a lock: by a hint where that works, by the doorbell if nothing came of
    /// it within two polls.
    pub fn wake(self: &Arc<Self>, node: NodeId, id: LockId) {
        self.stats.wakes.one();
        let hinted = self.hint_look(node, id);
        let shared = self.clone();
        self.spawn(async move {
            if hinted {
                tokio::time::sleep(2 * shared.timeouts.doorbell()).await;
                let unheard = shared.with_local(id, |l| l.held.as_ref().is_some_and(|h| h.demanded.is_none()));
                if !unheard {
                    return;
                }
                shared.doubt_hints(node);
            }
            shared.ring_for(node, id, Asked::Look);
        });
    }

    fn ring_for(self: &Arc<Self>, node: NodeId, id: LockId, what: Asked) {
        if node.slot >= self.layout.nodes {
            return;
        }
        let bell = self.bells.lock().entry(node.slot).or_insert_with(|| new_bell(node)).clone();
        let asked = {
            let mut r = bell.requests.lock();
            if r.receiver != node {
                r.receiver = node;
                r.wanted.clear();
            }
            let same = |a: Asked| (a == Asked::Look) == (what == Asked::Look);
            r.wanted.retain(|(other, asked, _)| *other != id || !same(*asked));
            r.wanted.push_front((id, what, Instant::now()));
            r.wanted.truncate(MAX_REQUESTS);
            r.asked += 1;
            r.asked
        };
        let shared = self.clone();
        self.spawn(async move { shared.write_cell(&bell, asked).await });
    }

    /// Nothing is waited for any more; the cell says so when it is next written.
    pub fn unring(&self, id: LockId) {
        for bell in self.bells.lock().values() {
            bell.requests.lock().wanted.retain(|(other, asked, _)| *other != id || *asked == Asked::Look);
        }
    }

    async fn write_cell(&self, bell: &Bell, asked: u64) {
        let _writing = bell.writing.lock().await;
        let (cell, covers) = {
            let mut r = bell.requests.lock();
            if r.written >= asked {
                return;
            }
            r.counter += 1;
            r.wanted.retain(|(_, asked, at)| *asked != Asked::Look || at.elapsed() < LOOK_STAYS);
            let cell = Doorbell {
                volume: self.layout.volume,
                sender: self.me,
                receiver: r.receiver,
                counter: r.counter,
                requests: r.wanted.iter().map(|(id, asked, _)| (*id, *asked)).collect(),
            };
            (cell, r.asked)
        };
        if cell.requests.is_empty() {
            return;
        }
        let offset = self.layout.doorbell_cell(cell.receiver.slot, self.me.slot);
        let sector = Arc::new(AlignedBuf::copy_of(&cell.encode(self.layout.stride)));
        self.stats.doorbells_written.one();
        match self.dev.write(IoClass::Liveness, offset, sector, false).await {
            Ok(()) => {
                let mut r = bell.requests.lock();
                r.written = r.written.max(covers);
            }
            // The waiter rings again.
            Err(e) => tracing::debug!(node = %self.me, "doorbell of slot {}: {e}", cell.receiver.slot),
        }
    }
}

fn new_bell(receiver: NodeId) -> Arc<Bell> {
    let requests = Requests { receiver, counter: 0, wanted: VecDeque::new(), asked: 0, written: 0 };
    Arc::new(Bell { requests: Mutex::new(requests), writing: tokio::sync::Mutex::new(()) })
}

/// The task that polls our own row.
pub(crate) async fn poll(shared: Arc<Shared>) {
    let mut seen: BTreeMap<Slot, (Incarnation, u64)> = BTreeMap::new();
    loop {
        tokio::select! {
            biased;
            _ = shared.not_live() => if *shared.state.borrow() != State::Leaving { return },
            () = tokio::time::sleep(shared.timeouts.doorbell()) => {}
        }
        if *shared.state.borrow() == State::Leaving {
            // What is held is given up by ending the incarnation.
            return;
        }
        match read_table(&*shared.dev, &shared.layout, shared.layout.doorbell_row(shared.me.slot)).await {
            Ok(row) => look(&shared, &row, &mut seen),
            Err(e) => tracing::debug!(node = %shared.me, "doorbell row: {e}"),
        }
    }
}

fn look(shared: &Arc<Shared>, row: &[AlignedBuf], seen: &mut BTreeMap<Slot, (Incarnation, u64)>) {
    let me = shared.me;
    for (slot, sector) in (0..).zip(row) {
        if slot == me.slot || sector[..4] == [0; 4] {
            continue;
        }
        let Ok(cell) = Doorbell::decode(sector, shared.layout.volume, slot, (me.slot, me.incarnation)) else {
            continue;
        };
        let latest = (cell.sender.incarnation, cell.counter);
        if seen.get(&slot).is_some_and(|seen| *seen >= latest) || shared.table.lock().ended(cell.sender) {
            continue;
        }
        seen.insert(slot, latest);
        shared.stats.doorbells_received.one();
        for (id, asked) in cell.requests {
            match asked {
                Asked::Want(mode) => shared.asked_for(id, mode, cell.sender),
                Asked::Look => shared.woken(id),
            }
        }
    }
}
