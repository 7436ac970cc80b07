//! What a node can ask of the simulated device, and what it answers.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::OpKind;
use crate::{AlignedBuf, Caw, DevError, FenceKey, Fenced, IoClass, Presence};

#[derive(Clone)]
pub(super) enum Req {
    Read { offset: u64, lens: Vec<usize> },
    Write { class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool },
    Flush { exempt: BTreeSet<u64> },
    Caw { offset: u64, expect: Vec<u8>, new: Vec<u8> },
    Register(FenceKey),
    Unregister,
    Presence(FenceKey),
    Fence(FenceKey),
    Discard { offset: u64, len: u64 },
}

impl Req {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Req::Read { .. } => "read",
            Req::Write { .. } => "write",
            Req::Flush { .. } => "flush",
            Req::Caw { .. } => "compare-and-write",
            Req::Register(_) => "register",
            Req::Unregister => "unregister",
            Req::Presence(_) => "presence",
            Req::Fence(_) => "fence",
            Req::Discard { .. } => "discard",
        }
    }

    pub(super) fn kind(&self) -> Option<OpKind> {
        match self {
            Req::Read { .. } => Some(OpKind::Read),
            Req::Write { .. } => Some(OpKind::Write),
            Req::Flush { .. } => Some(OpKind::Flush),
            Req::Caw { .. } => Some(OpKind::CompareAndWrite),
            _ => None,
        }
    }

    pub(super) fn extent(&self) -> Range<u64> {
        match self {
            Req::Read { offset, lens } => *offset..*offset + lens.iter().map(|l| *l as u64).sum::<u64>(),
            Req::Write { offset, bufs, .. } => *offset..*offset + bufs.iter().map(|b| b.len() as u64).sum::<u64>(),
            Req::Caw { offset, new, .. } => *offset..*offset + new.len() as u64,
            Req::Discard { offset, len } => *offset..*offset + *len,
            _ => 0..0,
        }
    }

    /// Whether it leaves something behind on the device.
    pub(super) fn has_effect(&self) -> bool {
        !matches!(self, Req::Read { .. } | Req::Presence(_) | Req::Flush { .. })
    }

    pub(super) fn changes_medium(&self) -> bool {
        matches!(self, Req::Write { .. } | Req::Caw { .. } | Req::Discard { .. })
    }

    pub(super) fn unknown(&self) -> DevError {
        let r = self.extent();
        DevError::Unknown { op: self.name(), offset: r.start, len: (r.end - r.start) as usize }
    }

    pub(super) fn io_error(&self, source: std::io::Error) -> DevError {
        let r = self.extent();
        DevError::Io { op: self.name(), offset: r.start, len: (r.end - r.start) as usize, source: Arc::new(source) }
    }

    pub(super) fn eio(&self) -> DevError {
        self.io_error(std::io::Error::from_raw_os_error(libc::EIO))
    }
}

pub(super) enum Reply {
    Bufs(Vec<AlignedBuf>),
    Unit,
    Caw(Caw),
    Presence(Presence),
    Fenced(Fenced),
}
