//! The cell of a slot for locking without compare-and-write: whether its node wants or has the right to change a sector, or bids
//! for the slot. Plain writes of the node alone.

use crate::{NodeId, Slot};

use super::{FormatError, begin, open, put, seal, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 4] = b"CPLK";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CellState {
    Lowered,
    /// The node wants to change a sector of this row, or is changing it.
    Raised,
    /// In the slot's bid: a joining node wants to live in the slot.
    Bid,
}

/// ```text
///   0  4  magic "CPLK"
///   4  1  version
///   5  1  state: 0 lowered, 1 raised, 2 bid
///   6  2  slot
///   8  8  volume
///  16  4  incarnation
///  20  4  zero
///  24  8  counter, +1 per write of the node
///  32  8  nonce of the mount
///  40     zero
/// 496 16  checksum
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub volume: u64,
    pub node: NodeId,
    pub state: CellState,
    pub counter: u64,
    pub nonce: u64,
}

impl Cell {
    pub fn encode(&self, stride: u64) -> Vec<u8> {
        let mut r = begin(MAGIC, self.volume);
        r[5] = match self.state {
            CellState::Lowered => 0,
            CellState::Raised => 1,
            CellState::Bid => 2,
        };
        put(&mut r, 6, &self.node.slot.to_le_bytes());
        put(&mut r, 16, &self.node.incarnation.to_le_bytes());
        put(&mut r, 24, &self.counter.to_le_bytes());
        put(&mut r, 32, &self.nonce.to_le_bytes());
        seal(r, stride)
    }

    /// `None`: never written, which is lowered.
    pub fn decode(sector: &[u8], volume: u64, slot: Slot) -> Result<Option<Self>, FormatError> {
        if sector.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let r = open(sector, MAGIC, volume)?;
        if u16_at(&r, 6) != slot {
            return Err(FormatError::OtherPlace);
        }
        let state = match r[5] {
            0 => CellState::Lowered,
            1 => CellState::Raised,
            2 => CellState::Bid,
            _ => return Err(FormatError::Invalid("cell state")),
        };
        let node = NodeId { slot, incarnation: u32_at(&r, 16) };
        Ok(Some(Self { volume, node, state, counter: u64_at(&r, 24), nonce: u64_at(&r, 32) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_and_round_trip() {
        let node = NodeId { slot: 6, incarnation: 4 };
        let c = Cell { volume: 0x0102, node, state: CellState::Raised, counter: 0x55, nonce: 0x66 };
        let b = c.encode(512);
        assert_eq!(&b[..16], b"CPLK\x01\x01\x06\x00\x02\x01\x00\x00\x00\x00\x00\x00");
        assert_eq!(&b[16..40], &[4, 0, 0, 0, 0, 0, 0, 0, 0x55, 0, 0, 0, 0, 0, 0, 0, 0x66, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Cell::decode(&b, 0x0102, 6), Ok(Some(c)));
        assert_eq!(Cell::decode(&b, 0x0102, 5), Err(FormatError::OtherPlace));
        assert_eq!(Cell::decode(&[0; 512], 0x0102, 6), Ok(None));
        let mut torn = b.clone();
        torn[30] ^= 1;
        assert_eq!(Cell::decode(&torn, 0x0102, 6), Err(FormatError::Checksum));
    }
}
