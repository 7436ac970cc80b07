//! Command descriptor blocks and what devices answer: SPC-4 and SBC-3, as far as a volume needs them. Integers are big-endian.

/// A command descriptor block of 6, 10 or 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cdb {
    pub bytes: [u8; 16],
    pub len: u8,
}

impl Cdb {
    fn new(bytes: &[u8]) -> Self {
        let mut cdb = Self { bytes: [0; 16], len: bytes.len() as u8 };
        cdb.bytes[..bytes.len()].copy_from_slice(bytes);
        cdb
    }
}

const FUA: u8 = 0x08;
/// Bytes of data that answers of variable length are asked for.
pub(crate) const ANSWER: u16 = 4096;

pub(crate) fn test_unit_ready() -> Cdb {
    Cdb::new(&[0; 6])
}

/// Whether a command can change what is on the device.
pub(crate) fn writes(cdb: &Cdb) -> bool {
    matches!(cdb.bytes[0], 0x89 | 0x8a | 0x42)
}

/// INQUIRY; `page`: vital product data.
pub(crate) fn inquiry(page: Option<u8>) -> Cdb {
    // Older devices know only one byte of length.
    Cdb::new(&[0x12, u8::from(page.is_some()), page.unwrap_or(0), 0, 252, 0])
}

pub(crate) fn read_capacity() -> Cdb {
    let mut c = [0; 16];
    (c[0], c[1], c[13]) = (0x9e, 0x10, 32);
    Cdb::new(&c)
}

/// MODE SENSE(6) of the caching page, without block descriptors.
pub(crate) fn mode_sense_caching() -> Cdb {
    Cdb::new(&[0x1a, 0x08, 0x08, 0, 252, 0])
}

fn rw16(op: u8, flags: u8, lba: u64, blocks: u32) -> Cdb {
    let mut c = [0; 16];
    (c[0], c[1]) = (op, flags);
    c[2..10].copy_from_slice(&lba.to_be_bytes());
    c[10..14].copy_from_slice(&blocks.to_be_bytes());
    Cdb::new(&c)
}

pub(crate) fn read(lba: u64, blocks: u32) -> Cdb {
    rw16(0x88, 0, lba, blocks)
}

pub(crate) fn write(lba: u64, blocks: u32, fua: bool) -> Cdb {
    rw16(0x8a, if fua { FUA } else { 0 }, lba, blocks)
}

/// COMPARE AND WRITE of `blocks` blocks (0 or 1).
pub(crate) fn compare_and_write(lba: u64, blocks: u8, fua: bool) -> Cdb {
    let mut c = [0; 16];
    (c[0], c[1], c[13]) = (0x89, if fua { FUA } else { 0 }, blocks);
    c[2..10].copy_from_slice(&lba.to_be_bytes());
    Cdb::new(&c)
}

/// Of the whole medium.
pub(crate) fn synchronize_cache() -> Cdb {
    let mut c = [0; 10];
    c[0] = 0x35;
    Cdb::new(&c)
}

/// UNMAP of one range, and its parameter list.
pub(crate) fn unmap(lba: u64, blocks: u32) -> (Cdb, [u8; 24]) {
    let mut list = [0; 24];
    (list[1], list[3]) = (22, 16);
    list[8..16].copy_from_slice(&lba.to_be_bytes());
    list[16..20].copy_from_slice(&blocks.to_be_bytes());
    (Cdb::new(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), list)
}

/// Service actions of PERSISTENT RESERVE IN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReserveIn {
    ReadKeys = 0,
    ReadReservation = 1,
    ReportCapabilities = 2,
}

pub(crate) fn reserve_in(action: ReserveIn) -> Cdb {
    let n = ANSWER.to_be_bytes();
    Cdb::new(&[0x5e, action as u8, 0, 0, 0, 0, 0, n[0], n[1], 0])
}

/// Service actions of PERSISTENT RESERVE OUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReserveOut {
    Reserve = 1,
    Release = 2,
    Preempt = 4,
    PreemptAndAbort = 5,
    RegisterAndIgnore = 6,
}

/// Write Exclusive - All Registrants: who is registered may write, everybody may read.
pub(crate) const WRITE_EXCLUSIVE_ALL_REGISTRANTS: u8 = 7;

/// PERSISTENT RESERVE OUT for a reservation of all registrants, and its parameter list.
pub(crate) fn reserve_out(action: ReserveOut, own: u64, other: u64, persist: bool) -> (Cdb, [u8; 24]) {
    let mut list = [0; 24];
    list[..8].copy_from_slice(&own.to_be_bytes());
    list[8..16].copy_from_slice(&other.to_be_bytes());
    list[20] = u8::from(persist);
    let kind = if action == ReserveOut::RegisterAndIgnore { 0 } else { WRITE_EXCLUSIVE_ALL_REGISTRANTS };
    (Cdb::new(&[0x5f, action as u8, kind, 0, 0, 0, 0, 0, 24, 0]), list)
}

/// Sense key and additional sense code with its qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sense {
    pub key: u8,
    pub code: u16,
}

/// What a sense asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    Miscompare,
    /// Something happened to the unit; the command was not done and can be sent again.
    Attention,
    /// ... namely to reservations or registrations.
    ReservationsChanged,
    /// Stopped on its way, perhaps half done.
    Aborted,
    /// Becoming ready.
    NotYet,
    /// The command or a field of it is not known here.
    Unsupported,
    NoSpace,
    Failure,
}

impl Sense {
    /// Sense data as a device sends them, of fixed or of descriptor format.
    pub fn parse(data: &[u8]) -> Option<Self> {
        match data.first()? & 0x7f {
            0x70 | 0x71 => {
                let code = be(data, 12).map_or(0, u16::from_be_bytes);
                Some(Self { key: data.get(2)? & 0xf, code })
            }
            0x72 | 0x73 => Some(Self { key: data.get(1)? & 0xf, code: u16::from_be_bytes(be(data, 2)?) }),
            _ => None,
        }
    }

    pub fn meaning(self) -> Meaning {
        match (self.key, self.code) {
            (0xe, _) => Meaning::Miscompare,
            (6, 0x2a03..=0x2a05) => Meaning::ReservationsChanged,
            // Also: commands cleared by another initiator, which is told to those whose commands are gone.
            (6, _) => Meaning::Attention,
            (0xb, _) => Meaning::Aborted,
            (2, 0x0401 | 0x040a) => Meaning::NotYet,
            (5, 0x2000 | 0x2400 | 0x2500 | 0x2600) => Meaning::Unsupported,
            (7, 0x2707) | (_, 0x5500) => Meaning::NoSpace,
            _ => Meaning::Failure,
        }
    }
}

impl std::fmt::Display for Sense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.key {
            1 => "recovered error",
            2 => "not ready",
            3 => "medium error",
            4 => "hardware error",
            5 => "illegal request",
            6 => "unit attention",
            7 => "write protected",
            0xb => "aborted",
            0xe => "miscompare",
            _ => "sense",
        };
        write!(f, "{name} (sense key {:x}, code {:04x})", self.key, self.code)
    }
}

fn be<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..at + N)?.try_into().ok()
}

fn be64(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(be(data, at)?))
}

fn be32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(be(data, at)?))
}

/// READ CAPACITY(16): logical blocks, and bytes in each.
pub(crate) fn capacity(data: &[u8]) -> Option<(u64, u32)> {
    Some((be64(data, 0)?.checked_add(1)?, be32(data, 8)?))
}

/// Whether unmapped blocks are managed (LBPME).
pub(crate) fn provisioned(data: &[u8]) -> bool {
    data.get(14).is_some_and(|b| b & 0x80 != 0)
}

/// MODE SENSE(6): whether a volatile write cache is on, and whether FUA is known.
pub(crate) fn caching(data: &[u8]) -> Option<(bool, bool)> {
    let fua = data.get(2)? & 0x10 != 0;
    let page = 4 + usize::from(*data.get(3)?);
    (data.get(page)? & 0x3f == 0x08).then_some(())?;
    Some((data.get(page + 2)? & 0x04 != 0, fua))
}

/// What the block limits page says; 0: nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Blocks.
    pub compare_and_write: u8,
    /// Blocks.
    pub transfer: u32,
    /// Blocks.
    pub unmap: u32,
}

pub(crate) fn limits(data: &[u8]) -> Limits {
    if data.get(1) != Some(&0xb0) {
        return Limits::default();
    }
    Limits {
        compare_and_write: data.get(5).copied().unwrap_or(0),
        transfer: be32(data, 8).unwrap_or(0),
        unmap: be32(data, 20).unwrap_or(0),
    }
}

/// READ KEYS.
pub(crate) fn keys(data: &[u8]) -> Option<Vec<u64>> {
    let len = be32(data, 4)? as usize;
    (0..len / 8).map(|i| be64(data, 8 + 8 * i)).collect()
}

/// READ KEYS and READ RESERVATION: counts changes of registrations, anew after a power loss of the device.
pub(crate) fn generation(data: &[u8]) -> Option<u32> {
    be32(data, 0)
}

/// READ RESERVATION: the key and the type of the reservation, if there is one.
pub(crate) fn reservation(data: &[u8]) -> Option<Option<(u64, u8)>> {
    match be32(data, 4)? {
        0 => Some(None),
        _ => Some(Some((be64(data, 8)?, data.get(21)? & 0xf))),
    }
}

/// REPORT CAPABILITIES: whether registrations can outlive a power loss of the device.
pub(crate) fn persists(data: &[u8]) -> bool {
    data.get(2).is_some_and(|b| b & 1 != 0)
}

/// Vendor, product and revision of standard inquiry data.
pub(crate) fn product(data: &[u8]) -> String {
    let field = |from: usize, to: usize| {
        String::from_utf8_lossy(data.get(from..to).unwrap_or_default()).trim_end_matches([' ', '\0']).to_string()
    };
    format!("{} {} {}", field(8, 16), field(16, 32), field(32, 36)).trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        assert_eq!(
            write(0x0102_0304_0506_0708, 0x0a0b_0c0d, true).bytes,
            [0x8a, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0xa, 0xb, 0xc, 0xd, 0, 0]
        );
        assert_eq!(compare_and_write(5, 1, false).bytes, [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0]);
        let (cdb, list) = reserve_out(ReserveOut::PreemptAndAbort, 1, 2, false);
        assert_eq!((cdb.bytes[..3].to_vec(), cdb.len), (vec![0x5f, 5, 7], 10));
        assert_eq!((list[7], list[15], list[20]), (1, 2, 0));
        let (cdb, list) = unmap(3, 4);
        assert_eq!((cdb.bytes[0], cdb.bytes[8], list[1], list[3], list[15], list[19]), (0x42, 24, 22, 16, 3, 4));
    }

    #[test]
    fn short_or_strange_answers_are_no_answers() {
        assert_eq!(capacity(&[0; 11]), None);
        assert_eq!(capacity(&[0xff; 12]), None);
        assert_eq!(keys(&[0, 0, 0, 1, 0, 0, 0, 8]), None);
        assert_eq!(keys(&[0, 0, 0, 1, 0, 0, 0, 0]), Some(vec![]));
        assert_eq!((generation(&[0, 0, 1, 2, 0]), generation(&[0; 3])), (Some(0x102), None));
        assert_eq!(reservation(&[0; 8]), Some(None));
        assert_eq!(reservation(&[0, 0, 0, 1, 0, 0, 0, 16, 0]), None);
        assert_eq!(caching(&[23, 0, 0x10, 0, 0x88, 0x12, 0x04]), Some((true, true)));
        assert_eq!(caching(&[23, 0, 0x10, 0, 0x0a, 0x12, 0x04]), None);
        assert_eq!(limits(&[0, 0x83, 0, 9, 0, 7]), Limits::default());
    }

    #[test]
    fn sense_data_of_both_formats() {
        let mut fixed = [0; 18];
        (fixed[0], fixed[2], fixed[7], fixed[12]) = (0xf0, 0xe, 10, 0x1d);
        let miscompare = Some(Sense { key: 0xe, code: 0x1d00 });
        assert_eq!(Sense::parse(&fixed), miscompare);
        assert_eq!(Sense::parse(&[0x72, 0xe, 0x1d, 0, 0, 0, 0, 0]), miscompare);
        // Cut off before the code: the key counts.
        assert_eq!(Sense::parse(&[0x70, 0, 6, 0, 0, 0, 0, 0]), Some(Sense { key: 6, code: 0 }));
        assert_eq!(Sense::parse(&[]), None);
        assert_eq!(Sense::parse(&[0x72, 6]), None);
        assert_eq!(Sense::parse(&[0; 32]), None);
    }

    #[test]
    fn senses_are_told_apart() {
        let m = |key, code| Sense { key, code }.meaning();
        assert_eq!(m(0xe, 0x1d00), Meaning::Miscompare);
        assert_eq!(m(6, 0x2900), Meaning::Attention);
        assert_eq!(m(6, 0x2a05), Meaning::ReservationsChanged);
        assert_eq!(m(5, 0x2000), Meaning::Unsupported);
        assert_eq!(m(3, 0x1100), Meaning::Failure);
    }
}
