//! Who may write the cells of a slot: bidding for a life of it before its block can be changed.
//!
//! A joining node has no cell yet by which it could exclude others. It bids for the slot's next life in the slot's bid sector:
//!
//! 1. Read the bid: only one of a life that the slot has had, of a node that is dead, or of our own by which we had the slot before
//!    may be replaced. Any other of our own may have arrived late, over that of the slot's owner.
//! 2. Write our own; from before 1 to the end of this no more than a heartbeat may pass.
//! 3. Wait a heartbeat and a quarter, and read: if it is still ours, the slot is.
//!
//! Two cannot both find theirs. Say P and Q do, and Q's write took effect later: then it did after P's last reading, a heartbeat and
//! a quarter after P's write ended, yet Q had read before P's write took effect; so Q took longer than a heartbeat, by clocks
//! that agree to a tenth, and did not count its own bid. This is the idea of M. Fischer's timed algorithm (in L. Lamport, *A fast
//! mutual exclusion algorithm*, 1987), made safe against late writes by timing oneself; sanlock's delta leases are of the kind.
//! A late bid may overwrite that of the slot's owner: that only makes others wait.
//!
//! From then on heartbeats keep the others away, as after every claim. What is written before the first heartbeat, and the first
//! change of a sector, must be submitted within a lease of the bid: later, the others may have taken us for dead.

use std::sync::Arc;

use blockdev::{DevError, IoClass, Result, WritePermit};
use tokio::time::{Instant, sleep};

use super::{Core, ROWS, since};
use crate::NodeId;
use crate::format::{Cell, CellState};
use crate::node::decode_slot;
use crate::transitions::next_life;

pub(super) struct Identity {
    node: NodeId,
    /// Before the bid was read; `None` once it was used in time.
    bid: Option<Instant>,
}

/// What may be written before there is a lease.
struct Until(Instant);

impl WritePermit for Until {
    fn valid(&self) -> bool {
        Instant::now() < self.0
    }
}

fn busy(offset: u64, len: usize, why: &str) -> DevError {
    let source = Arc::new(std::io::Error::new(std::io::ErrorKind::ResourceBusy, why));
    DevError::Io { op: "bid for a slot", offset, len, source }
}

impl Core {
    /// As whom we change sectors.
    pub(super) fn me(&self) -> Result<NodeId> {
        if !self.permitted() {
            return Err(DevError::Fenced);
        }
        let mut identity = self.identity.lock();
        let Some(i) = identity.as_mut() else { return Err(DevError::Fenced) };
        if i.bid.is_some_and(|bid| since(bid) > self.timeouts.lease()) {
            *identity = None;
            return Err(DevError::Fenced);
        }
        i.bid = None;
        Ok(i.node)
    }

    pub(super) async fn bid(&self, node: NodeId) -> Result<()> {
        *self.identity.lock() = None;
        let (at, len) = (self.bid_at(node.slot), self.layout.stride as usize);
        let patience = self.timeouts.heartbeat();
        let begun = Instant::now();
        let until: Arc<dyn WritePermit> = Arc::new(Until(begun + self.timeouts.lease()));
        *self.permit.lock() = Some(until.clone());
        self.inner.set_permit(until);
        let found = self.inner.read(IoClass::Lock, at, len).await?;
        let sector = self.inner.read(IoClass::Lock, self.layout.slot_block(node.slot), len).await?;
        let block = decode_slot(&self.layout, node.slot, &sector);
        if !block.is_ok_and(|b| next_life(&b) == node.incarnation) {
            return Err(busy(at, len, "the slot has gone on"));
        }
        // A sector that is no bid stands in nobody's way.
        let other = Cell::decode(&found, self.layout.volume, node.slot).ok().flatten();
        let other = other.filter(|_| self.won.lock().get(&node.slot).is_none_or(|won| found[..] != won[..]));
        if other.is_some_and(|c| c.node.incarnation >= node.incarnation) {
            let silent = self.silence.lock().await.look(self).await?;
            if silent.get(&node.slot).is_none_or(|s| *s < self.timeouts.dead_unfenced()) {
                return Err(busy(at, len, "another node bids for it"));
            }
        }
        let bid = self.cell(node, CellState::Bid);
        self.write(at, &bid).await?;
        if since(begun) > patience {
            return Err(busy(at, len, "the device is too slow"));
        }
        sleep(patience * 5 / 4).await;
        if self.inner.read(IoClass::Lock, at, len).await?[..] != bid[..] {
            return Err(busy(at, len, "another node was faster"));
        }
        self.won.lock().insert(node.slot, bid);
        // What an earlier bidder left raised would be taken for ours.
        for row in 0..ROWS {
            self.set(row, node, CellState::Lowered).await?;
        }
        *self.identity.lock() = Some(Identity { node, bid: Some(begun) });
        Ok(())
    }
}
