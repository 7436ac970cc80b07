//! Hints: datagrams that save waiting for the doorbell or for the next look at a lock block.
//!
//! They carry a MAC with a key that only readers of the LUN know, the volume, sender, receiver and a counter; what does not
//! fit is dropped silently. A hint never grants anything: it makes its receiver look at the disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::node::{Shared, State};
use crate::{HintNet, Incarnation, LockId, Mode, NodeId, Slot};

const MAGIC: &[u8; 4] = b"CHNT";
const BODY: usize = 40;
const LEN: usize = BODY + 32;

/// ```text
///   0  4  magic "CHNT"
///   4  1  version
///   5  1  what: 0 granted, 1 wanted shared, 2 wanted exclusive, 3 look at what changed
///   6  1  kind: 0 domain, 1 group
///   7  1  zero
///   8  8  volume
///  16  2  sender's slot
///  18  2  receiver's slot
///  20  4  number of the domain or group
///  24  4  sender's incarnation
///  28  4  receiver's incarnation
///  32  8  counter, +1 per datagram in the sender's life
///  40 32  blake3 keyed hash of the above
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    pub volume: u64,
    pub sender: NodeId,
    pub receiver: NodeId,
    pub counter: u64,
    pub id: LockId,
    pub news: News,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// The receiver has been granted the lock.
    Granted,
    Wanted(Mode),
    /// Something changed under the lock that the receiver waits for.
    Look,
}

impl Hint {
    pub fn encode(&self, key: &[u8; 32]) -> Vec<u8> {
        let (kind, number) = match self.id {
            LockId::Domain(d) => (0, d),
            LockId::Group(g) => (1, g),
        };
        let what = match self.news {
            News::Granted => 0,
            News::Wanted(Mode::Shared) => 1,
            News::Wanted(Mode::Exclusive) => 2,
            News::Look => 3,
        };
        let mut b = Vec::with_capacity(LEN);
        b.extend_from_slice(MAGIC);
        b.extend_from_slice(&[1, what, kind, 0]);
        b.extend_from_slice(&self.volume.to_le_bytes());
        b.extend_from_slice(&self.sender.slot.to_le_bytes());
        b.extend_from_slice(&self.receiver.slot.to_le_bytes());
        b.extend_from_slice(&number.to_le_bytes());
        b.extend_from_slice(&self.sender.incarnation.to_le_bytes());
        b.extend_from_slice(&self.receiver.incarnation.to_le_bytes());
        b.extend_from_slice(&self.counter.to_le_bytes());
        let mac = blake3::keyed_hash(key, &b);
        b.extend_from_slice(mac.as_bytes());
        b
    }

    pub fn decode(datagram: &[u8], key: &[u8; 32]) -> Option<Self> {
        let d: &[u8; LEN] = datagram.try_into().ok()?;
        let (body, mac) = d.split_at(BODY);
        let mac: [u8; 32] = mac.try_into().ok()?;
        // Hash compares in constant time.
        if blake3::keyed_hash(key, body) != blake3::Hash::from_bytes(mac) || body[..4] != *MAGIC || body[4] != 1 {
            return None;
        }
        let u16_at = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([d[at], d[at + 1], d[at + 2], d[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let news = match d[5] {
            0 => News::Granted,
            1 => News::Wanted(Mode::Shared),
            2 => News::Wanted(Mode::Exclusive),
            3 => News::Look,
            _ => return None,
        };
        let id = match d[6] {
            0 => LockId::Domain(u32_at(20)),
            1 => LockId::Group(u32_at(20)),
            _ => return None,
        };
        Some(Self {
            volume: u64_at(8),
            sender: NodeId { slot: u16_at(16), incarnation: u32_at(24) },
            receiver: NodeId { slot: u16_at(18), incarnation: u32_at(28) },
            counter: u64_at(32),
            id,
            news,
        })
    }
}

/// Which counters of a sender were seen: a sliding window as in RFC 4303, so that a recorded datagram cannot be used to
/// make a node drop its locks again and again.
#[derive(Default)]
pub(crate) struct ReplayWindow {
    incarnation: Incarnation,
    highest: u64,
    seen: u64,
}

impl ReplayWindow {
    pub fn accept(&mut self, incarnation: Incarnation, counter: u64) -> bool {
        if incarnation > self.incarnation {
            *self = Self { incarnation, highest: 0, seen: 0 };
        }
        if incarnation < self.incarnation || counter == 0 {
            return false;
        }
        if counter > self.highest {
            let shift = u32::try_from(counter - self.highest).unwrap_or(u32::MAX);
            self.seen = self.seen.checked_shl(shift).unwrap_or(0) | 1;
            self.highest = counter;
            return true;
        }
        let Some(bit) = u32::try_from(self.highest - counter).ok().and_then(|back| 1u64.checked_shl(back)) else {
            return false;
        };
        let new = self.seen & bit == 0;
        self.seen |= bit;
        new
    }
}

impl Shared {
    fn send_hint(&self, receiver: NodeId, id: LockId, news: News) -> bool {
        let Some(net) = &self.net else { return false };
        let Some(address) = self.table.lock().address(receiver).map(<[u8]>::to_vec) else { return false };
        let counter = {
            let mut counter = self.hint_counter.lock();
            *counter += 1;
            *counter
        };
        let hint = Hint { volume: self.layout.volume, sender: self.me, receiver, counter, id, news };
        net.send(&address, hint.encode(&self.hint_key));
        self.stats.hints_sent.one();
        true
    }

    /// False if the doorbell should be rung without waiting for the hint to be answered.
    pub fn hint_demand(&self, receiver: NodeId, id: LockId, wanted: Mode) -> bool {
        let works = self.hints_seem_to_work(receiver);
        self.send_hint(receiver, id, News::Wanted(wanted)) && works
    }

    /// As [`hint_demand`](Self::hint_demand).
    pub fn hint_look(&self, receiver: NodeId, id: LockId) -> bool {
        let works = self.hints_seem_to_work(receiver);
        self.send_hint(receiver, id, News::Look) && works
    }

    fn hints_seem_to_work(&self, receiver: NodeId) -> bool {
        self.hints_work.lock().get(&receiver.slot).copied().unwrap_or(true)
    }

    /// A hint to this node had no effect within a poll of the doorbell.
    pub fn doubt_hints(&self, receiver: NodeId) {
        self.hints_work.lock().insert(receiver.slot, false);
    }

    pub fn hint_granted(&self, receiver: NodeId, id: LockId) {
        self.send_hint(receiver, id, News::Granted);
    }

    fn receive_hint(self: &Arc<Self>, datagram: &[u8]) {
        let Some(hint) = Hint::decode(datagram, &self.hint_key).filter(|h| {
            h.volume == self.layout.volume
                && h.receiver == self.me
                && h.sender.slot != self.me.slot
                && h.sender.slot < self.layout.nodes
                && !self.table.lock().ended(h.sender)
                && accept(&mut self.hint_windows.lock(), h)
        }) else {
            self.stats.hints_rejected.one();
            return;
        };
        self.stats.hints_received.one();
        self.hints_work.lock().insert(hint.sender.slot, true);
        match hint.news {
            News::Wanted(mode) => self.asked_for(hint.id, mode, hint.sender),
            News::Look => self.woken(hint.id),
            News::Granted => {
                if let Some(l) = self.locks.lock().get(&hint.id).filter(|l| l.waiting.is_some()) {
                    l.wake.notify_one();
                }
            }
        }
    }
}

fn accept(windows: &mut BTreeMap<Slot, ReplayWindow>, hint: &Hint) -> bool {
    windows.entry(hint.sender.slot).or_default().accept(hint.sender.incarnation, hint.counter)
}

/// The task that receives hints.
pub(crate) async fn receive(shared: Arc<Shared>, net: Arc<dyn HintNet>) {
    loop {
        let datagram = tokio::select! {
            biased;
            _ = shared.not_live() => return,
            datagram = net.recv() => datagram,
        };
        if *shared.state.borrow() == State::Live {
            shared.receive_hint(&datagram);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Hint {
        Hint {
            volume: 0x0807060504030201,
            sender: NodeId { slot: 1, incarnation: 2 },
            receiver: NodeId { slot: 3, incarnation: 4 },
            counter: 5,
            id: LockId::Group(6),
            news: News::Wanted(Mode::Exclusive),
        }
    }

    #[test]
    fn golden_bytes() {
        let b = sample().encode(&[7; 32]);
        assert_eq!(&b[..16], b"CHNT\x01\x02\x01\x00\x01\x02\x03\x04\x05\x06\x07\x08");
        assert_eq!(&b[16..40], &[1, 0, 3, 0, 6, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&b[40..], blake3::keyed_hash(&[7; 32], &b[..40]).as_bytes());
        assert_eq!(Hint::decode(&b, &[7; 32]), Some(sample()));
    }

    #[test]
    fn forgeries_are_dropped() {
        let b = sample().encode(&[7; 32]);
        assert_eq!(Hint::decode(&b, &[8; 32]), None);
        assert_eq!(Hint::decode(&b[..71], &[7; 32]), None);
        for at in 0..b.len() {
            let mut bad = b.clone();
            bad[at] ^= 1;
            assert_eq!(Hint::decode(&bad, &[7; 32]), None, "byte {at}");
        }
    }

    #[test]
    fn replays_are_dropped() {
        let mut w = ReplayWindow::default();
        assert!(w.accept(3, 1) && w.accept(3, 5) && w.accept(3, 4) && w.accept(3, 200) && w.accept(3, 140));
        assert!(!w.accept(3, 5) && !w.accept(3, 200) && !w.accept(3, 136) && !w.accept(2, 300));
        assert!(w.accept(4, 1) && !w.accept(4, 1));
    }
}
