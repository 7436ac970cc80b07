//! A logical unit as a [`BlockDevice`].
//!
//! What happens to a command:
//!
//! | answer | reads, flushes, plain writes | compare-and-write |
//! |---|---|---|
//! | unit attention, busy, not ready yet | sent again | sent again |
//! | reservation conflict | [`DevError::Fenced`] | [`DevError::Fenced`] |
//! | connection lost before it was sent | sent on the next one | sent on the next one |
//! | connection lost, or aborted, after it was sent | sent again | [`DevError::Unknown`] |
//! | no connection for too long | error; [`DevError::Unknown`] for a write that had been sent | the same |
//!
//! Sending a plain write again is safe because the old connection's commands have ended on the device before it accepts the new
//! login (session reinstatement, RFC 7143 section 6.3.5), and because its sender still holds what covers the place: the permit is
//! asked each time. After a reconnect nothing is sent before our registration was seen to be still there, and if the device has a
//! volatile write cache that may have died with the connection, this node is through (I12): its unflushed writes may be gone.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::cdb::{self, Cdb, Meaning, Sense};
use super::identify::Features;
use super::pieces::{join, split};
use super::reservation::{self, Owner};
use super::{Command, Piece, Reply, Transfer, Transport};
use crate::{
    Abilities, AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, Geometry, IoClass, Presence,
    Registrations, Result, WritePermit, range,
};

/// How long a device may say that it is busy or becoming ready.
const BUSY_LIMIT: Duration = Duration::from_secs(20);
/// Unit attentions in a row: each tells of one thing that happened.
const MAX_ATTENTIONS: usize = 32;
/// How often a waiting write looks whether its permit has ended.
const PERMIT_LOOK: Duration = Duration::from_millis(100);

/// How a command ended, after everything that only needs patience.
pub(crate) enum Answer {
    Good { bufs: Vec<AlignedBuf>, received: usize },
    Check(Sense),
    Conflict,
    Refused,
    Lost { sent: bool },
}

/// Where a command is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paths {
    Any,
    Each,
}

/// Why a question was not answered.
#[derive(Debug)]
pub(crate) enum Refusal {
    Sense(Sense),
    /// The device is reserved, and the question is not for everybody.
    Conflict,
}

/// What an operation is, for errors.
#[derive(Clone, Copy)]
pub(crate) struct What {
    pub op: &'static str,
    pub offset: u64,
    pub len: usize,
}

impl What {
    pub fn new(op: &'static str) -> Self {
        Self { op, offset: 0, len: 0 }
    }

    pub fn io(self, kind: ErrorKind, why: impl Into<String>) -> DevError {
        self.error(io::Error::new(kind, why.into()))
    }

    pub fn error(self, source: io::Error) -> DevError {
        DevError::Io { op: self.op, offset: self.offset, len: self.len, source: Arc::new(source) }
    }

    pub fn unknown(self) -> DevError {
        DevError::Unknown { op: self.op, offset: self.offset, len: self.len }
    }

    pub fn sense(self, sense: Sense) -> DevError {
        let kind = match sense.meaning() {
            Meaning::NoSpace => ErrorKind::StorageFull,
            Meaning::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Other,
        };
        self.io(kind, format!("the device answers: {sense}"))
    }
}

/// A SCSI disk, opened by one node.
pub struct ScsiDisk {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) features: Features,
    pub(crate) geometry: Geometry,
    /// As last told, in bytes.
    pub(crate) size: AtomicU64,
    pub(crate) owner: Mutex<Owner>,
    /// Registering, and looking after a reconnect: one at a time.
    pub(crate) attaching: tokio::sync::Mutex<()>,
    /// Connection on which our registration was seen.
    attached: AtomicU64,
    /// The last connection anything was sent on.
    seen: AtomicU64,
    /// Writes that completed in the device's cache, and how many of them were flushed since.
    cached: AtomicU64,
    flushed: AtomicU64,
    fenced: AtomicBool,
    pub(super) writable: bool,
    permit: Mutex<Option<Arc<dyn WritePermit>>>,
    stats: DeviceStats,
}

impl ScsiDisk {
    pub(super) fn new(transport: Arc<dyn Transport>, features: Features, geometry: Geometry, writable: bool) -> Self {
        Self {
            transport,
            features,
            geometry,
            size: AtomicU64::new(geometry.size),
            owner: Mutex::default(),
            attaching: tokio::sync::Mutex::default(),
            attached: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            fenced: AtomicBool::new(false),
            writable,
            permit: Mutex::default(),
            stats: DeviceStats::default(),
        }
    }

    /// An answer of variable length; the inner error is the device's.
    pub(crate) async fn ask(&self, what: What, cdb: Cdb) -> Result<std::result::Result<Vec<u8>, Refusal>> {
        let answer = match cdb.bytes[0] {
            0x12 | 0x1a => 252,
            0x9e => 32,
            0x5e => usize::from(cdb::ANSWER),
            _ => 0,
        };
        let make = || (cdb, if answer == 0 { Transfer::None } else { Transfer::In(vec![AlignedBuf::zeroed(answer)]) });
        match self.run(what, false, false, make).await? {
            Answer::Good { bufs, received } => {
                Ok(Ok(bufs.first().map(|b| b[..received.min(b.len())].to_vec()).unwrap_or_default()))
            }
            Answer::Check(sense) => Ok(Err(Refusal::Sense(sense))),
            Answer::Conflict => Ok(Err(Refusal::Conflict)),
            Answer::Refused | Answer::Lost { .. } => Err(what.unknown()),
        }
    }

    /// RESERVATION CONFLICT in the terms of the caller.
    pub(crate) fn reserved(&self, what: What) -> DevError {
        if self.owner.lock().registered.is_some() {
            self.cut_off("the device refuses our commands: another node has fenced this one");
            return DevError::Fenced;
        }
        what.io(
            ErrorKind::PermissionDenied,
            "the device is reserved for others: nodes that have it mounted, or another program (`clusterfs probe` shows who)",
        )
    }

    /// No write is sent any more, until a new registration.
    pub(crate) fn cut_off(&self, why: &str) {
        if !self.fenced.swap(true, SeqCst) {
            tracing::error!("{why}");
        }
    }

    pub(crate) fn is_cut_off(&self) -> bool {
        self.fenced.load(SeqCst)
    }

    pub(crate) fn admit_again(&self) {
        self.fenced.store(false, SeqCst);
    }

    /// Sends one command on one connection until it has an answer that patience does not change.
    pub(crate) async fn send(
        &self,
        connection: u64,
        permit: &Option<Arc<dyn WritePermit>>,
        make: &(dyn Fn() -> (Cdb, Transfer) + Sync),
    ) -> Answer {
        self.send_by(Paths::Any, connection, permit, make).await
    }

    pub(crate) async fn send_by(
        &self,
        paths: Paths,
        connection: u64,
        permit: &Option<Arc<dyn WritePermit>>,
        make: &(dyn Fn() -> (Cdb, Transfer) + Sync),
    ) -> Answer {
        let end = Instant::now() + BUSY_LIMIT;
        let mut pause = Duration::from_millis(5);
        let mut attentions = 0;
        loop {
            let (cdb, data) = make();
            let command = Command { cdb, data, permit: permit.clone() };
            let reply = match paths {
                Paths::Any => self.transport.execute(connection, command).await,
                Paths::Each => self.transport.execute_by_each_path(connection, command).await,
            };
            let wait = match reply {
                Reply::Good { bufs, received } => return Answer::Good { bufs, received },
                Reply::Conflict => return Answer::Conflict,
                Reply::Refused => return Answer::Refused,
                Reply::Lost { sent } => return Answer::Lost { sent },
                Reply::Busy => true,
                Reply::Check(sense) => match sense.meaning() {
                    Meaning::Attention if attentions < MAX_ATTENTIONS => {
                        attentions += 1;
                        false
                    }
                    Meaning::ReservationsChanged if attentions < MAX_ATTENTIONS => {
                        attentions += 1;
                        // Whether we are still registered is looked up before anything is written again.
                        self.attached.store(0, SeqCst);
                        if permit.is_some() {
                            return Answer::Lost { sent: false };
                        }
                        false
                    }
                    Meaning::NotYet => true,
                    Meaning::Aborted => return Answer::Lost { sent: true },
                    _ => return Answer::Check(sense),
                },
            };
            if wait {
                if Instant::now() >= end {
                    return Answer::Check(Sense { key: 2, code: 0 });
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(500));
            }
        }
    }

    /// A connection on which this node may send.
    async fn attach(&self, what: What) -> Result<u64> {
        loop {
            let connection = self.transport.connected().await.map_err(|e| what.error(e))?;
            if self.attached.load(SeqCst) == connection {
                return Ok(connection);
            }
            let _one = self.attaching.lock().await;
            if self.attached.load(SeqCst) == connection {
                return Ok(connection);
            }
            let before = self.seen.swap(connection, SeqCst);
            let unflushed = self.cached.load(SeqCst) > self.flushed.load(SeqCst);
            if before != 0 && before != connection && unflushed && self.geometry.write_cache {
                self.cut_off("the connection was lost, and with it perhaps writes that were not yet flushed");
            }
            if self.still_registered(connection, what).await? {
                self.attached.store(connection, SeqCst);
                return Ok(connection);
            }
        }
    }

    /// As [`attach`](Self::attach); with a permit, gives up when it ends.
    async fn attach_while(&self, what: What, permit: &Option<Arc<dyn WritePermit>>) -> Result<u64> {
        let Some(permit) = permit else { return self.attach(what).await };
        let attach = self.attach(what);
        tokio::pin!(attach);
        loop {
            tokio::select! {
                biased;
                connection = &mut attach => return connection,
                () = tokio::time::sleep(PERMIT_LOOK) => if !permit.valid() {
                    return Err(DevError::Fenced);
                },
            }
        }
    }

    /// Runs one command to its end, over reconnects. `once`: not sent again if it may have arrived. `writes`: only with the permit.
    pub(crate) async fn run(
        &self,
        what: What,
        writes: bool,
        once: bool,
        make: impl Fn() -> (Cdb, Transfer) + Sync,
    ) -> Result<Answer> {
        let permit = if writes { self.permit.lock().clone() } else { None };
        let mut sent = false;
        let failed = |sent: bool, e: DevError| if sent && writes { what.unknown() } else { e };
        loop {
            let connection = self.attach_while(what, &permit).await.map_err(|e| failed(sent, e))?;
            if writes && self.fenced.load(SeqCst) {
                return Err(failed(sent, DevError::Fenced));
            }
            match self.send(connection, &permit, &make).await {
                Answer::Lost { sent: false } => {}
                Answer::Lost { sent: true } if once => return Err(what.unknown()),
                Answer::Lost { sent: true } => sent = true,
                Answer::Refused => return Err(failed(sent, DevError::Fenced)),
                Answer::Conflict if sent && writes => {
                    self.reserved(what);
                    return Err(what.unknown());
                }
                answer => return Ok(answer),
            }
        }
    }

    /// For commands of the data path: everything but success is an error.
    async fn io(
        &self,
        what: What,
        writes: bool,
        make: impl Fn() -> (Cdb, Transfer) + Sync,
    ) -> Result<(Vec<AlignedBuf>, usize)> {
        match self.run(what, writes, false, make).await? {
            Answer::Good { bufs, received } => Ok((bufs, received)),
            Answer::Check(sense) => Err(what.sense(sense)),
            Answer::Conflict => Err(self.reserved(what)),
            Answer::Refused | Answer::Lost { .. } => Err(what.unknown()),
        }
    }

    fn blocks(&self, bytes: u64) -> u64 {
        bytes / u64::from(self.geometry.sector_size)
    }

    /// The rule of all devices; what lies beyond the end may be there since the disk was enlarged.
    async fn check(&self, op: &'static str, offset: u64, lens: &[usize]) -> Result<usize> {
        match range::check(op, &self.geometry(), offset, lens.iter().copied()) {
            Err(DevError::Range { .. }) => range::check(op, &self.measure().await?, offset, lens.iter().copied()),
            checked => checked,
        }
    }

    /// Its size, as another than the disk itself knows it.
    pub(crate) fn has_size(&self, size: u64) {
        self.size.store(size, SeqCst);
    }

    pub(crate) fn check_writable(&self, what: What) -> Result<()> {
        if self.writable { Ok(()) } else { Err(what.error(ErrorKind::ReadOnlyFilesystem.into())) }
    }

    async fn synchronize(&self, what: What) -> Result<()> {
        let before = self.cached.load(SeqCst);
        if self.fenced.load(SeqCst) {
            return Err(DevError::Fenced);
        }
        self.io(what, false, || (cdb::synchronize_cache(), Transfer::None)).await?;
        // Found while it ran: what it was to make durable may be gone.
        if self.fenced.load(SeqCst) {
            return Err(DevError::Fenced);
        }
        self.flushed.fetch_max(before, SeqCst);
        Ok(())
    }

    async fn read_once(&self, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        let len = lens.iter().sum();
        let what = What { op: "read", offset, len };
        let (lba, blocks) = (self.blocks(offset), self.blocks(len as u64) as u32);
        let make = || (cdb::read(lba, blocks), Transfer::In(lens.iter().map(|len| AlignedBuf::zeroed(*len)).collect()));
        match self.io(what, false, make).await? {
            (bufs, received) if received == len => Ok(bufs),
            (_, received) => {
                Err(what.io(ErrorKind::UnexpectedEof, format!("the device sent {received} of {len} bytes")))
            }
        }
    }
}

#[async_trait]
impl BlockDevice for ScsiDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(SeqCst), ..self.geometry }
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        self.measure().await
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        let total = self.check("read", offset, lens).await?;
        self.stats.count_read(class, total);
        if total == 0 {
            return Ok(join(lens, Vec::new()));
        }
        let mut at = offset;
        let mut parts = Vec::with_capacity(lens.len());
        for transfer in split(lens, self.features.max_transfer) {
            parts.extend(self.read_once(at, &transfer).await?);
            at += transfer.iter().sum::<usize>() as u64;
        }
        Ok(join(lens, parts))
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        let lens: Vec<usize> = bufs.iter().map(|b| b.len()).collect();
        let total = self.check("write", offset, &lens).await?;
        self.check_writable(What { op: "write", offset, len: total })?;
        self.stats.count_write(class, total);
        if total == 0 {
            return Ok(());
        }
        let fua = fua && self.geometry.write_cache;
        let flagged = fua && self.features.fua;
        let mut pieces = bufs.into_iter().filter(|b| !b.is_empty()).map(Piece::whole).peekable();
        let mut at = offset;
        for transfer in split(&lens, self.features.max_transfer) {
            let len = transfer.iter().sum::<usize>();
            let mut out = Vec::with_capacity(transfer.len());
            for part in transfer {
                let Some(piece) = pieces.peek_mut() else { break };
                let start = piece.range.start;
                out.push(Piece { buf: piece.buf.clone(), range: start..start + part });
                piece.range.start += part;
                if piece.range.is_empty() {
                    pieces.next();
                }
            }
            let what = What { op: "write", offset: at, len };
            let (lba, blocks) = (self.blocks(at), self.blocks(len as u64) as u32);
            let make = || (cdb::write(lba, blocks, flagged), Transfer::Out(out.clone()));
            self.io(what, true, make).await?;
            at += len as u64;
        }
        if fua && !flagged {
            return self.synchronize(What { op: "write", offset, len: total }).await;
        }
        // A heartbeat that is lost with the device's cache is one heartbeat.
        if !fua && self.geometry.write_cache && class != IoClass::Liveness {
            self.cached.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.stats.count_flush(class);
        if !self.geometry.write_cache {
            return Ok(());
        }
        self.synchronize(What::new("flush")).await
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let op = "compare-and-write";
        let sector = self.geometry.sector_size as usize;
        self.check(op, offset, &[sector]).await?;
        if expect.len() != sector || new.len() != sector {
            let len = if expect.len() == sector { new.len() } else { expect.len() };
            return Err(DevError::Range { op, offset, len, size: self.geometry().size });
        }
        let what = What { op, offset, len: sector };
        self.check_writable(what)?;
        self.stats.count_compare_and_write(sector);
        let mut both = AlignedBuf::zeroed(2 * sector);
        both[..sector].copy_from_slice(expect);
        both[sector..].copy_from_slice(new);
        let both = Arc::new(both);
        // Durable at once: a lock must not be forgotten by a device that restarts while its holder lives (I4).
        let fua = self.geometry.write_cache && self.features.fua;
        let make =
            || (cdb::compare_and_write(self.blocks(offset), 1, fua), Transfer::Out(vec![Piece::whole(both.clone())]));
        match self.run(what, true, true, make).await? {
            Answer::Good { .. } => {
                if self.geometry.write_cache && !fua {
                    self.cached.fetch_add(1, SeqCst);
                }
                Ok(Caw::Written)
            }
            Answer::Check(sense) if sense.meaning() == Meaning::Miscompare => {
                // Nothing was written, whatever it holds by now: both are what the caller reads next anyway.
                let mut found = self.read_once(offset, &[sector]).await?;
                Ok(Caw::Mismatch(found.pop().map(|b| b.to_vec()).unwrap_or_default()))
            }
            Answer::Check(sense) => Err(what.sense(sense)),
            Answer::Conflict => Err(self.reserved(what)),
            Answer::Refused | Answer::Lost { .. } => Err(what.unknown()),
        }
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        self.check_writable(What::new("register"))?;
        if self.features.reservations { self.register_key(reservation::encode(key)).await } else { Ok(()) }
    }

    fn set_permit(&self, permit: Arc<dyn WritePermit>) {
        *self.permit.lock() = Some(permit);
    }

    async fn unregister(&self) -> Result<()> {
        self.unregister_key().await
    }

    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        self.key_presence(reservation::encode(key)).await
    }

    async fn fence(&self, key: FenceKey) -> Result<Fenced> {
        if !self.features.reservations {
            return Ok(Fenced::MustWait);
        }
        self.preempt(reservation::encode(key)).await.map(|()| Fenced::Done)
    }

    async fn evict_others(&self) -> Result<()> {
        self.preempt_all().await
    }

    async fn registrations(&self) -> Result<Option<Registrations>> {
        self.list_registrations().await
    }

    fn abilities(&self) -> Option<Abilities> {
        Some(self.features.told(self.geometry.sector_size))
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let op = "discard";
        let size = self.geometry().size;
        let short = usize::try_from(len).map_err(|_| DevError::Range { op, offset, len: usize::MAX, size })?;
        self.check(op, offset, &[short]).await?;
        let what = What { op, offset, len: short };
        self.check_writable(what)?;
        if len == 0 || !self.features.unmap {
            return Ok(());
        }
        let (mut lba, mut rest) = (self.blocks(offset), self.blocks(len));
        while rest > 0 {
            let blocks = rest.min(u64::from(self.features.limits.unmap)) as u32;
            let (cdb, list) = cdb::unmap(lba, blocks);
            let list = Arc::new(AlignedBuf::copy_of(&list));
            let make = || (cdb, Transfer::Out(vec![Piece::whole(list.clone())]));
            self.io(what, true, make).await?;
            (lba, rest) = (lba + u64::from(blocks), rest - u64::from(blocks));
        }
        Ok(())
    }

    fn stats(&self) -> &DeviceStats {
        &self.stats
    }
}
