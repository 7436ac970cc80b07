//! Negotiation: what the kernel offers, what the handler wants, and what holds from then on. Pure, no I/O.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

use crate::abi::{Fields, MAJOR, MINOR, MINOR_MIN, Malformed, Put};

/// Capabilities exchanged at INIT.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct InitFlags(pub u64);

impl InitFlags {
    pub const ASYNC_READ: InitFlags = InitFlags(1 << 0);
    pub const POSIX_LOCKS: InitFlags = InitFlags(1 << 1);
    pub const ATOMIC_O_TRUNC: InitFlags = InitFlags(1 << 3);
    pub const EXPORT_SUPPORT: InitFlags = InitFlags(1 << 4);
    pub const BIG_WRITES: InitFlags = InitFlags(1 << 5);
    pub const DONT_MASK: InitFlags = InitFlags(1 << 6);
    pub const FLOCK_LOCKS: InitFlags = InitFlags(1 << 10);
    pub const HAS_IOCTL_DIR: InitFlags = InitFlags(1 << 11);
    pub const AUTO_INVAL_DATA: InitFlags = InitFlags(1 << 12);
    pub const DO_READDIRPLUS: InitFlags = InitFlags(1 << 13);
    pub const READDIRPLUS_AUTO: InitFlags = InitFlags(1 << 14);
    pub const ASYNC_DIO: InitFlags = InitFlags(1 << 15);
    pub const WRITEBACK_CACHE: InitFlags = InitFlags(1 << 16);
    pub const NO_OPEN_SUPPORT: InitFlags = InitFlags(1 << 17);
    pub const PARALLEL_DIROPS: InitFlags = InitFlags(1 << 18);
    pub const HANDLE_KILLPRIV: InitFlags = InitFlags(1 << 19);
    pub const POSIX_ACL: InitFlags = InitFlags(1 << 20);
    pub const ABORT_ERROR: InitFlags = InitFlags(1 << 21);
    pub const MAX_PAGES: InitFlags = InitFlags(1 << 22);
    pub const CACHE_SYMLINKS: InitFlags = InitFlags(1 << 23);
    pub const NO_OPENDIR_SUPPORT: InitFlags = InitFlags(1 << 24);
    pub const EXPLICIT_INVAL_DATA: InitFlags = InitFlags(1 << 25);
    pub const HANDLE_KILLPRIV_V2: InitFlags = InitFlags(1 << 28);
    pub const SETXATTR_EXT: InitFlags = InitFlags(1 << 29);
    pub const INIT_EXT: InitFlags = InitFlags(1 << 30);
    pub const CREATE_SUPP_GROUP: InitFlags = InitFlags(1 << 34);
    pub const HAS_EXPIRE_ONLY: InitFlags = InitFlags(1 << 35);
    pub const DIRECT_IO_ALLOW_MMAP: InitFlags = InitFlags(1 << 36);
    pub const NO_EXPORT_SUPPORT: InitFlags = InitFlags(1 << 38);
    pub const OVER_IO_URING: InitFlags = InitFlags(1 << 41);

    /// Everything that a handler may ask for. Left out because they change the wire format or the transport in ways
    /// that this crate does not serve: splice, submounts, DAX mappings, security contexts, passthrough, resend,
    /// id-mapped mounts, request timeouts.
    const SERVED: InitFlags = InitFlags(
        Self::ASYNC_READ.0
            | Self::POSIX_LOCKS.0
            | Self::ATOMIC_O_TRUNC.0
            | Self::EXPORT_SUPPORT.0
            | Self::BIG_WRITES.0
            | Self::DONT_MASK.0
            | Self::FLOCK_LOCKS.0
            | Self::HAS_IOCTL_DIR.0
            | Self::AUTO_INVAL_DATA.0
            | Self::DO_READDIRPLUS.0
            | Self::READDIRPLUS_AUTO.0
            | Self::ASYNC_DIO.0
            | Self::WRITEBACK_CACHE.0
            | Self::NO_OPEN_SUPPORT.0
            | Self::PARALLEL_DIROPS.0
            | Self::HANDLE_KILLPRIV.0
            | Self::POSIX_ACL.0
            | Self::ABORT_ERROR.0
            | Self::MAX_PAGES.0
            | Self::CACHE_SYMLINKS.0
            | Self::NO_OPENDIR_SUPPORT.0
            | Self::EXPLICIT_INVAL_DATA.0
            | Self::HANDLE_KILLPRIV_V2.0
            | Self::SETXATTR_EXT.0
            | Self::INIT_EXT.0
            | Self::CREATE_SUPP_GROUP.0
            | Self::HAS_EXPIRE_ONLY.0
            | Self::DIRECT_IO_ALLOW_MMAP.0
            | Self::NO_EXPORT_SUPPORT.0
            | Self::OVER_IO_URING.0,
    );

    /// What the session itself needs, whatever the handler asks for.
    const SESSION: InitFlags = InitFlags(Self::BIG_WRITES.0 | Self::MAX_PAGES.0 | Self::INIT_EXT.0);

    pub const fn contains(self, other: InitFlags) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn intersection(self, other: InitFlags) -> InitFlags {
        InitFlags(self.0 & other.0)
    }

    /// These flags without `other`.
    pub const fn without(self, other: InitFlags) -> InitFlags {
        InitFlags(self.0 & !other.0)
    }
}

impl BitOr for InitFlags {
    type Output = InitFlags;

    fn bitor(self, other: InitFlags) -> InitFlags {
        InitFlags(self.0 | other.0)
    }
}

impl BitOrAssign for InitFlags {
    fn bitor_assign(&mut self, other: InitFlags) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for InitFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InitFlags({:#x})", self.0)
    }
}

/// What the kernel offers.
///
/// major 0, minor 4, max_readahead 8, flags 12, flags2 16 (holds if INIT_EXT), unused to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitRequest {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: InitFlags,
}

impl InitRequest {
    pub(crate) fn decode(body: &[u8]) -> Result<InitRequest, Malformed> {
        let mut f = Fields::new(body);
        let (major, minor, max_readahead, low) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        let low = InitFlags(u64::from(low));
        let high = if low.contains(InitFlags::INIT_EXT) { u64::from(f.u32()?) } else { 0 };
        Ok(InitRequest { major, minor, max_readahead, flags: InitFlags(low.0 | high << 32) })
    }
}

/// What the handler wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitConfig {
    /// Largest WRITE; READ is limited to the same number of pages.
    pub max_write: u32,
    /// Upper bound for the kernel's read-ahead.
    pub max_readahead: u32,
    /// How many background requests (read-ahead, write-back, asynchronous direct I/O) may be outstanding.
    pub max_background: u16,
    /// Granularity of timestamps in nanoseconds.
    pub time_gran: u32,
    /// Wanted capabilities; those which the kernel does not offer are dropped.
    pub flags: InitFlags,
}

impl Default for InitConfig {
    fn default() -> InitConfig {
        InitConfig {
            max_write: 1 << 20,
            max_readahead: 1 << 20,
            max_background: 64,
            time_gran: 1,
            flags: InitFlags::default(),
        }
    }
}

/// What holds between the kernel and us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    pub minor: u32,
    pub flags: InitFlags,
    pub max_write: u32,
    pub max_readahead: u32,
    pub max_pages: u16,
    pub max_background: u16,
    pub time_gran: u32,
}

impl Negotiated {
    /// None if the kernel's protocol is too old or foreign.
    pub(crate) fn new(offer: &InitRequest, want: &InitConfig, page_size: u32) -> Option<Negotiated> {
        if offer.major != MAJOR || offer.minor < MINOR_MIN {
            return None;
        }
        let flags = offer.flags.intersection(InitFlags::SERVED).intersection(want.flags | InitFlags::SESSION);
        // Without MAX_PAGES a request holds 32 pages.
        let page_limit = if flags.contains(InitFlags::MAX_PAGES) { u32::from(u16::MAX) } else { 32 };
        let max_pages = want.max_write.div_ceil(page_size).clamp(1, page_limit);
        Some(Negotiated {
            minor: offer.minor.min(MINOR),
            flags,
            max_write: want.max_write.clamp(page_size, max_pages.saturating_mul(page_size).max(page_size)),
            max_readahead: want.max_readahead.min(offer.max_readahead),
            max_pages: max_pages as u16,
            max_background: want.max_background.max(1),
            time_gran: want.time_gran.max(1),
        })
    }

    /// The answer: major 0, minor 4, max_readahead 8, flags 12, max_background 16 (2), congestion_threshold 18 (2),
    /// max_write 20, time_gran 24, max_pages 28 (2), map_alignment 30 (2), flags2 32, the rest to 64 zero.
    pub(crate) fn encode(&self) -> [u8; 64] {
        Put::new()
            .u32(MAJOR)
            .u32(self.minor)
            .u32(self.max_readahead)
            .u32(self.flags.0 as u32)
            .u16(self.max_background)
            .u16(((u32::from(self.max_background) * 3).div_ceil(4)) as u16)
            .u32(self.max_write)
            .u32(self.time_gran)
            .u16(self.max_pages)
            .u16(0)
            .u32((self.flags.0 >> 32) as u32)
            .done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(flags: InitFlags) -> InitRequest {
        InitRequest { major: 7, minor: 45, max_readahead: 131072, flags }
    }

    #[test]
    fn only_what_both_sides_have_is_agreed() {
        let all = InitFlags(u64::MAX);
        let want = InitConfig { flags: InitFlags::POSIX_LOCKS | InitFlags(1 << 37), ..InitConfig::default() };
        let n = Negotiated::new(&offer(all), &want, 4096).unwrap();
        assert_eq!(n.flags, InitFlags::POSIX_LOCKS | InitFlags::SESSION, "passthrough is never agreed");
        assert_eq!((n.max_write, n.max_pages, n.max_readahead), (1 << 20, 256, 131072));
        let n = Negotiated::new(&offer(InitFlags::default()), &want, 4096).unwrap();
        assert_eq!(n.flags, InitFlags::default());
        assert_eq!((n.max_write, n.max_pages), (128 << 10, 32));
    }

    #[test]
    fn versions_are_the_lower_of_both_and_old_kernels_are_refused() {
        let want = InitConfig::default();
        let at = |major, minor| Negotiated::new(&InitRequest { major, minor, ..offer(InitFlags(0)) }, &want, 4096);
        assert_eq!(at(7, 31).unwrap().minor, 31);
        assert_eq!(at(7, 99).unwrap().minor, 45);
        assert_eq!(at(7, 30), None);
        assert_eq!(at(8, 0), None);
    }

    #[test]
    fn the_high_flags_hold_only_with_init_ext() {
        let mut body = [0u8; 64];
        body[16..20].copy_from_slice(&8u32.to_ne_bytes());
        assert_eq!(InitRequest::decode(&body).unwrap().flags, InitFlags(0));
        body[12..16].copy_from_slice(&(1u32 << 30).to_ne_bytes());
        assert_eq!(InitRequest::decode(&body).unwrap().flags, InitFlags::INIT_EXT | InitFlags::HAS_EXPIRE_ONLY);
        assert!(InitRequest::decode(&body[..16]).is_err());
    }

    #[test]
    fn the_answer_has_its_fields_at_the_documented_offsets() {
        let n = Negotiated {
            minor: 45,
            flags: InitFlags(0x5_0000_0003),
            max_write: 1 << 20,
            max_readahead: 77,
            max_pages: 256,
            max_background: 64,
            time_gran: 9,
        };
        let b = n.encode();
        let u32_at = |at: usize| u32::from_ne_bytes(b[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_ne_bytes(b[at..at + 2].try_into().unwrap());
        assert_eq!([0, 4, 8, 12, 20, 24, 32].map(u32_at), [7, 45, 77, 3, 1 << 20, 9, 5]);
        assert_eq!([16, 18, 28, 30].map(u16_at), [64, 48, 256, 0]);
    }
}
