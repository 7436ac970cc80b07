//! The doorbell cell: what one node wants from another. A plain write of the sender, polled by the receiver.
//!
//! A cell is only a request to look: a torn, stale or foreign one is ignored, and the lock block decides.

use crate::{Incarnation, LockId, Mode, NodeId, Slot};

use super::{FormatError, begin, open, put, seal, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 4] = b"CDBL";
const REQUESTS: usize = 40;
const LOOK: u8 = 3;
/// Requests that fit into a cell.
pub(crate) const MAX_REQUESTS: usize = 40;

/// What is asked of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Give the lock up, or lower it.
    Want(Mode),
    /// Look at what the sender changed under the lock.
    Look,
}

/// ```text
///   0  4  magic "CDBL"
///   4  1  version
///   5  1  number of requests, at most 40
///   6  2  sender's slot
///   8  8  volume
///  16  4  sender's incarnation
///  20  4  receiver's incarnation
///  24  8  counter, +1 per write of this cell in the sender's life
///  32  2  receiver's slot
///  34     zero
///  40  8  each request: 4 number, 1 kind (0 domain, 1 group), 1 what (1 wanted shared, 2 wanted exclusive, 3 look), 2 zero
/// 496 16  checksum
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Doorbell {
    pub volume: u64,
    pub sender: NodeId,
    pub receiver: NodeId,
    pub counter: u64,
    pub requests: Vec<(LockId, Asked)>,
}

impl Doorbell {
    pub fn encode(&self, stride: u64) -> Vec<u8> {
        let mut r = begin(MAGIC, self.volume);
        put(&mut r, 6, &self.sender.slot.to_le_bytes());
        put(&mut r, 16, &self.sender.incarnation.to_le_bytes());
        put(&mut r, 20, &self.receiver.incarnation.to_le_bytes());
        put(&mut r, 24, &self.counter.to_le_bytes());
        put(&mut r, 32, &self.receiver.slot.to_le_bytes());
        let requests = &self.requests[..self.requests.len().min(MAX_REQUESTS)];
        r[5] = requests.len() as u8;
        for (i, (id, asked)) in requests.iter().enumerate() {
            let (kind, number) = kind_of(*id);
            let at = REQUESTS + 8 * i;
            put(&mut r, at, &number.to_le_bytes());
            r[at + 4] = kind;
            r[at + 5] = match asked {
                Asked::Want(mode) => mode_bits(Some(*mode)),
                Asked::Look => LOOK,
            };
        }
        seal(r, stride)
    }

    /// The incarnation of `sender` that wrote a cell, whoever it was for.
    pub fn sent_by(sector: &[u8], volume: u64, sender: Slot) -> Option<Incarnation> {
        let r = open(sector, MAGIC, volume).ok()?;
        (u16_at(&r, 6) == sender).then(|| u32_at(&r, 16))
    }

    pub fn decode(
        sector: &[u8],
        volume: u64,
        sender: Slot,
        receiver: (Slot, Incarnation),
    ) -> Result<Self, FormatError> {
        let r = open(sector, MAGIC, volume)?;
        let receiver = NodeId { slot: receiver.0, incarnation: receiver.1 };
        if u16_at(&r, 6) != sender || u16_at(&r, 32) != receiver.slot || u32_at(&r, 20) != receiver.incarnation {
            return Err(FormatError::OtherPlace);
        }
        let count = usize::from(r[5]);
        if count > MAX_REQUESTS {
            return Err(FormatError::Invalid("number of requests"));
        }
        let mut requests = Vec::with_capacity(count);
        for i in 0..count {
            let at = REQUESTS + 8 * i;
            let id = id_of(r[at + 4], u32_at(&r, at)).ok_or(FormatError::Invalid("kind"))?;
            let asked = match r[at + 5] {
                LOOK => Asked::Look,
                mode => Asked::Want(mode_of(mode)?.ok_or(FormatError::Invalid("mode"))?),
            };
            requests.push((id, asked));
        }
        let sender = NodeId { slot: sender, incarnation: u32_at(&r, 16) };
        Ok(Self { volume, sender, receiver, counter: u64_at(&r, 24), requests })
    }
}

pub(crate) fn kind_of(id: LockId) -> (u8, u32) {
    match id {
        LockId::Domain(d) => (0, d),
        LockId::Group(g) => (1, g),
    }
}

pub(crate) fn id_of(kind: u8, number: u32) -> Option<LockId> {
    match kind {
        0 => Some(LockId::Domain(number)),
        1 => Some(LockId::Group(number)),
        _ => None,
    }
}

pub(crate) fn mode_bits(mode: Option<Mode>) -> u8 {
    match mode {
        None => 0,
        Some(Mode::Shared) => 1,
        Some(Mode::Exclusive) => 2,
    }
}

pub(crate) fn mode_of(bits: u8) -> Result<Option<Mode>, FormatError> {
    match bits {
        0 => Ok(None),
        1 => Ok(Some(Mode::Shared)),
        2 => Ok(Some(Mode::Exclusive)),
        _ => Err(FormatError::Invalid("mode")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: u32) -> Doorbell {
        Doorbell {
            volume: 9,
            sender: NodeId { slot: 1, incarnation: 2 },
            receiver: NodeId { slot: 3, incarnation: 4 },
            counter: 5,
            requests: (0..n)
                .map(|i| match i % 3 {
                    0 => (LockId::Domain(i), Asked::Want(Mode::Exclusive)),
                    1 => (LockId::Group(i), Asked::Want(Mode::Shared)),
                    _ => (LockId::Domain(i), Asked::Look),
                })
                .collect(),
        }
    }

    #[test]
    fn golden_bytes() {
        let b = sample(3).encode(512);
        assert_eq!(&b[..16], b"CDBL\x01\x03\x01\x00\x09\x00\x00\x00\x00\x00\x00\x00");
        assert_eq!(&b[16..34], &[2, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
        assert_eq!(&b[40..56], &[0, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0]);
        assert_eq!(&b[56..65], &[2, 0, 0, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn round_trip_and_damage() {
        for n in [0, 1, 40] {
            let b = sample(n).encode(4096);
            assert_eq!(Doorbell::decode(&b, 9, 1, (3, 4)), Ok(sample(n)));
            assert_eq!(Doorbell::decode(&b, 9, 1, (3, 5)), Err(FormatError::OtherPlace));
            assert_eq!(Doorbell::decode(&b, 9, 2, (3, 4)), Err(FormatError::OtherPlace));
            let mut torn = b.clone();
            torn[100] ^= 1;
            assert_eq!(Doorbell::decode(&torn, 9, 1, (3, 4)), Err(FormatError::Checksum));
        }
    }
}
