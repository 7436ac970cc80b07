//! SCSI disks: the commands that a volume needs, over any transport that carries them.
//!
//! [`disk`] is the [`BlockDevice`](crate::BlockDevice), [`identify`] finds out what it can do, [`reservation`] is its fencing,
//! [`pieces`] takes large transfers apart, [`cdb`] builds commands and reads answers.
//! A [`Transport`] (iSCSI, or the host's kernel) delivers single commands and knows when the connection under them was lost. It numbers its
//! connections: a command is sent only on the connection that it was meant for, so that whatever must be checked after a
//! reconnect (is our registration still there?) is checked before anything else is sent.

pub(crate) mod cdb;
pub(crate) mod disk;
mod identify;
mod pieces;
pub(crate) mod reservation;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;

use crate::{AlignedBuf, WritePermit};
use cdb::{Cdb, Sense};

/// What goes to the device: a part of a buffer that the caller shares.
#[derive(Clone)]
pub(crate) struct Piece {
    pub buf: Arc<AlignedBuf>,
    pub range: Range<usize>,
}

impl Piece {
    pub fn whole(buf: Arc<AlignedBuf>) -> Self {
        let range = 0..buf.len();
        Self { buf, range }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buf[self.range.clone()]
    }
}

pub(crate) enum Transfer {
    None,
    /// Filled by the device, in this order.
    In(Vec<AlignedBuf>),
    Out(Vec<Piece>),
}

impl Transfer {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Transfer::None => 0,
            Transfer::In(bufs) => bufs.iter().map(|b| b.len()).sum(),
            Transfer::Out(pieces) => pieces.iter().map(|p| p.range.len()).sum(),
        }
    }
}

pub(crate) struct Command {
    pub cdb: Cdb,
    pub data: Transfer,
    /// Asked immediately before the command is given to the network or the kernel (I12).
    pub permit: Option<Arc<dyn WritePermit>>,
}

/// How a command ended.
pub(crate) enum Reply {
    /// With the buffers of [`Transfer::In`], and how many bytes arrived in them.
    Good {
        bufs: Vec<AlignedBuf>,
        received: usize,
    },
    Check(Sense),
    /// RESERVATION CONFLICT: nothing was done.
    Conflict,
    /// BUSY, TASK SET FULL: nothing was done, and it may be tried again.
    Busy,
    /// The permit had ended: nothing was sent.
    Refused,
    /// The connection was lost. `sent`: the device may have received it.
    Lost {
        sent: bool,
    },
}

/// Carries commands to one logical unit.
#[async_trait]
pub(crate) trait Transport: Send + Sync + 'static {
    /// Waits for a connection and returns its number, from 1. An error once there was none for too long.
    async fn connected(&self) -> io::Result<u64>;
    /// Sends on the given connection only. Once a newer one exists, commands of an older one have ended on the device or
    /// will not reach it.
    async fn execute(&self, connection: u64, command: Command) -> Reply;
    /// As [`execute`](Self::execute), by each path to the unit: for registrations, which the device keeps per path.
    async fn execute_by_each_path(&self, connection: u64, command: Command) -> Reply {
        self.execute(connection, command).await
    }
    /// Whether a registration may end with the connection that it was made on, with nothing of that connection under way: then
    /// it is made anew on the next one.
    fn registrations_end_with_connections(&self) -> bool {
        true
    }
    /// LOGICAL UNIT RESET: every command that the device had accepted has ended when this returns `Good`.
    async fn reset_unit(&self, connection: u64) -> Reply;
}
