//! The slot block: who lives in a slot. Changed by compare-and-write only (I10).

use crate::{Incarnation, Layout, NodeId, Slot};

use super::{FormatError, begin, bytes, open, put, seal, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 4] = b"CSLT";
pub(crate) const TEXT: usize = 64;

/// What a slot is being used for. `docs/LOCKS.md` has the table of who moves it between which states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotState {
    /// Nobody's; the block's incarnation has ended.
    Free,
    /// The block's incarnation lives.
    Live,
    /// The block's incarnation died and `by` replays its journal.
    Recovering { by: NodeId },
    /// The block's incarnation died and a joining node replays its journal, to live on in the slot as incarnation `next`.
    Adopting { next: Incarnation },
}

/// How the latest ended incarnation of a slot ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastEnd {
    /// No incarnation has ended yet.
    Never,
    /// Left cleanly: nothing was dirty.
    Clean,
    /// Died; its journal was replayed.
    Crash,
}

/// ```text
///   0  4  magic "CSLT"
///   4  1  version
///   5  1  state: 0 free, 1 live, 2 recovering, 3 adopting
///   6  2  slot
///   8  8  volume
///  16  8  sequence number, +1 per change (I8)
///  24  8  nonce of the latest change (I9)
///  32  4  incarnation: the living one, or the latest
///  36  4  latest ended incarnation
///  40  8  clean ends: bit k = incarnation (latest ended - k) left cleanly
///  48  4  recovering: incarnation of the recoverer; adopting: the adopter's incarnation
///  52  2  recovering: slot of the recoverer
///  54  1  length of the host name
///  55  1  length of the hint address
///  56  8  zero
///  64 64  host name, UTF-8
/// 128 64  hint address
/// 192  4  latest incarnation that an adopter took, 0 if none ever did
/// 196     zero
/// 496 16  checksum
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlotBlock {
    pub volume: u64,
    pub slot: Slot,
    pub seq: u64,
    pub nonce: u64,
    pub state: SlotState,
    pub incarnation: Incarnation,
    pub last_ended: Incarnation,
    pub clean_ends: u64,
    /// The latest incarnation that an adopter took, whether it ever lived or not: it is not used again (I8).
    pub adopter: Incarnation,
    pub host_name: String,
    pub address: Vec<u8>,
}

impl SlotBlock {
    pub fn encode(&self, stride: u64) -> Vec<u8> {
        let mut r = begin(MAGIC, self.volume);
        let (state, by) = match self.state {
            SlotState::Free => (0, NodeId { slot: 0, incarnation: 0 }),
            SlotState::Live => (1, NodeId { slot: 0, incarnation: 0 }),
            SlotState::Recovering { by } => (2, by),
            SlotState::Adopting { next } => (3, NodeId { slot: 0, incarnation: next }),
        };
        r[5] = state;
        put(&mut r, 6, &self.slot.to_le_bytes());
        put(&mut r, 16, &self.seq.to_le_bytes());
        put(&mut r, 24, &self.nonce.to_le_bytes());
        put(&mut r, 32, &self.incarnation.to_le_bytes());
        put(&mut r, 36, &self.last_ended.to_le_bytes());
        put(&mut r, 40, &self.clean_ends.to_le_bytes());
        put(&mut r, 48, &by.incarnation.to_le_bytes());
        put(&mut r, 52, &by.slot.to_le_bytes());
        let host = self.host_name.as_bytes();
        let host = &host[..host.len().min(TEXT)];
        let address = &self.address[..self.address.len().min(TEXT)];
        r[54] = host.len() as u8;
        r[55] = address.len() as u8;
        put(&mut r, 64, host);
        put(&mut r, 128, address);
        put(&mut r, 192, &self.adopter.to_le_bytes());
        seal(r, stride)
    }

    pub fn decode(sector: &[u8], volume: u64, slot: Slot) -> Result<Self, FormatError> {
        let r = open(sector, MAGIC, volume)?;
        if u16_at(&r, 6) != slot {
            return Err(FormatError::OtherPlace);
        }
        let by = NodeId { slot: u16_at(&r, 52), incarnation: u32_at(&r, 48) };
        let state = match r[5] {
            0 => SlotState::Free,
            1 => SlotState::Live,
            2 => SlotState::Recovering { by },
            3 => SlotState::Adopting { next: by.incarnation },
            _ => return Err(FormatError::Invalid("slot state")),
        };
        let text = |at: usize, len: u8| {
            let all: [u8; TEXT] = bytes(&r, at);
            all.get(..usize::from(len)).map(<[u8]>::to_vec).ok_or(FormatError::Invalid("text length"))
        };
        let block = Self {
            volume,
            slot,
            seq: u64_at(&r, 16),
            nonce: u64_at(&r, 24),
            state,
            incarnation: u32_at(&r, 32),
            last_ended: u32_at(&r, 36),
            clean_ends: u64_at(&r, 40),
            adopter: u32_at(&r, 192),
            host_name: String::from_utf8(text(64, r[54])?).map_err(|_| FormatError::Invalid("host name"))?,
            address: text(128, r[55])?,
        };
        block.check()?;
        if block.encode(sector.len() as u64) != sector {
            return Err(FormatError::Invalid("reserved bytes"));
        }
        Ok(block)
    }

    fn check(&self) -> Result<(), FormatError> {
        let ended = match self.state {
            SlotState::Free => self.last_ended == self.incarnation,
            _ => self.last_ended < self.incarnation,
        };
        if !ended {
            return Err(FormatError::Invalid("ended incarnation"));
        }
        // Headroom: a counter that could overflow is damage, not age.
        if self.seq >= u64::MAX / 2 || self.incarnation.max(self.adopter) >= u32::MAX / 2 {
            return Err(FormatError::Invalid("counter"));
        }
        match self.state {
            SlotState::Adopting { next } if next <= self.incarnation || next >= u32::MAX / 2 => {
                Err(FormatError::Invalid("adopter"))
            }
            _ => Ok(()),
        }
    }

    /// The block after one more change, to be filled in by the caller.
    pub(crate) fn successor(&self, nonce: u64) -> Self {
        Self { seq: self.seq + 1, nonce, ..self.clone() }
    }

    /// Ends every incarnation up to `last`; of those only the latest may have left cleanly.
    pub(crate) fn end(&mut self, last: Incarnation, clean: bool) {
        let passed = last.saturating_sub(self.last_ended);
        self.clean_ends = self.clean_ends.checked_shl(passed).unwrap_or(0) | u64::from(clean);
        self.last_ended = last;
        self.incarnation = last;
        self.state = SlotState::Free;
    }

    /// The incarnation that writes the heartbeat and owns the fence key now.
    pub fn writer(&self) -> Option<NodeId> {
        match self.state {
            SlotState::Live => Some(NodeId { slot: self.slot, incarnation: self.incarnation }),
            SlotState::Adopting { next } => Some(NodeId { slot: self.slot, incarnation: next }),
            SlotState::Free | SlotState::Recovering { .. } => None,
        }
    }

    pub fn last_end(&self) -> LastEnd {
        match (self.last_ended, self.clean_ends & 1) {
            (0, _) => LastEnd::Never,
            (_, 1) => LastEnd::Clean,
            _ => LastEnd::Crash,
        }
    }
}

/// What mkfs writes to a slot's block: free and never used.
pub fn initial_slot_block(layout: &Layout, slot: Slot) -> Vec<u8> {
    let block = SlotBlock {
        volume: layout.volume,
        slot,
        seq: 1,
        nonce: 0,
        state: SlotState::Free,
        incarnation: 0,
        last_ended: 0,
        clean_ends: 0,
        adopter: 0,
        host_name: String::new(),
        address: Vec::new(),
    };
    block.encode(layout.stride)
}

impl NodeId {
    pub(crate) fn fence_key(self) -> blockdev::FenceKey {
        blockdev::FenceKey { slot: self.slot, incarnation: self.incarnation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SlotBlock {
        SlotBlock {
            volume: 0x1122334455667788,
            slot: 3,
            seq: 9,
            nonce: 0xabcd,
            state: SlotState::Recovering { by: NodeId { slot: 2, incarnation: 7 } },
            incarnation: 5,
            last_ended: 4,
            clean_ends: 0b101,
            adopter: 6,
            host_name: "mail1".into(),
            address: b"10.0.0.1:7000".to_vec(),
        }
    }

    #[test]
    fn golden_bytes() {
        let b = sample().encode(512);
        assert_eq!(&b[..8], b"CSLT\x01\x02\x03\x00");
        assert_eq!(&b[8..16], &[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(&b[16..32], &[9, 0, 0, 0, 0, 0, 0, 0, 0xcd, 0xab, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&b[32..56], &[5, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 5, 13]);
        assert_eq!(&b[64..70], b"mail1\0");
        assert_eq!(&b[128..142], b"10.0.0.1:7000\0");
        assert_eq!(&b[192..197], &[6, 0, 0, 0, 0]);
        assert_eq!(b[496..512], blake3::hash(&b[..496]).as_bytes()[..16]);
    }

    #[test]
    fn round_trip_and_damage() {
        for stride in [512, 4096] {
            let bytes = sample().encode(stride);
            assert_eq!(bytes.len() as u64, stride);
            assert_eq!(SlotBlock::decode(&bytes, sample().volume, 3), Ok(sample()));
            assert_eq!(SlotBlock::decode(&bytes, sample().volume, 4), Err(FormatError::OtherPlace));
            assert_eq!(SlotBlock::decode(&bytes, 1, 3), Err(FormatError::OtherVolume));
            for at in 0..bytes.len() {
                let mut bad = bytes.clone();
                bad[at] ^= 0x10;
                assert!(SlotBlock::decode(&bad, sample().volume, 3).is_err(), "byte {at}");
            }
        }
    }

    #[test]
    fn clean_history() {
        let mut b = SlotBlock { state: SlotState::Live, ..sample() };
        b.end(5, true);
        assert_eq!((b.clean_ends, b.last_end()), (0b1011, LastEnd::Clean));
        b.end(7, false);
        assert_eq!((b.clean_ends, b.last_end()), (0b101100, LastEnd::Crash));
        b.end(200, true);
        assert_eq!(b.clean_ends, 1);
    }
}
