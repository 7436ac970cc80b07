//! The heartbeat sector: a plain write of the slot's owner, watched by the others for change.

use crate::{NodeId, Slot};

use super::{FormatError, begin, open, put, seal, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 4] = b"CHBT";

/// ```text
///   0  4  magic "CHBT"
///   4  1  version
///   5  1  zero
///   6  2  slot
///   8  8  volume
///  16  4  incarnation
///  20  4  zero
///  24  8  counter, +1 per write
///  32  8  nonce of this mount
///  40     zero
/// 496 16  checksum
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    pub volume: u64,
    pub node: NodeId,
    pub counter: u64,
    pub nonce: u64,
}

impl Heartbeat {
    pub fn encode(&self, stride: u64) -> Vec<u8> {
        let mut r = begin(MAGIC, self.volume);
        put(&mut r, 6, &self.node.slot.to_le_bytes());
        put(&mut r, 16, &self.node.incarnation.to_le_bytes());
        put(&mut r, 24, &self.counter.to_le_bytes());
        put(&mut r, 32, &self.nonce.to_le_bytes());
        seal(r, stride)
    }

    pub fn decode(sector: &[u8], volume: u64, slot: Slot) -> Result<Self, FormatError> {
        let r = open(sector, MAGIC, volume)?;
        if u16_at(&r, 6) != slot {
            return Err(FormatError::OtherPlace);
        }
        let node = NodeId { slot, incarnation: u32_at(&r, 16) };
        Ok(Self { volume, node, counter: u64_at(&r, 24), nonce: u64_at(&r, 32) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_and_round_trip() {
        let h = Heartbeat { volume: 0x0102, node: NodeId { slot: 6, incarnation: 4 }, counter: 0x55, nonce: 0x66 };
        let b = h.encode(512);
        assert_eq!(&b[..16], b"CHBT\x01\x00\x06\x00\x02\x01\x00\x00\x00\x00\x00\x00");
        assert_eq!(&b[16..40], &[4, 0, 0, 0, 0, 0, 0, 0, 0x55, 0, 0, 0, 0, 0, 0, 0, 0x66, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Heartbeat::decode(&b, 0x0102, 6), Ok(h));
        assert_eq!(Heartbeat::decode(&b, 0x0102, 5), Err(FormatError::OtherPlace));
        assert!(Heartbeat::decode(&[0; 512], 0x0102, 6).is_err());
    }
}
