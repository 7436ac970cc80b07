//! Fencing by persistent reservations (SPC-4): one reservation, Write Exclusive - All Registrants, and one registration per mount.
//!
//! A registration key says whose it is: `43 46 53` ("CFS"), the slot (1 byte), the incarnation (4 bytes). Who is registered may
//! write; a dead node's key is preempted, with its commands aborted, and from then on the device refuses its writes, whenever
//! they arrive. A node comes back only by registering its next incarnation. On a device that does not know PREEMPT AND ABORT,
//! PREEMPT and then LOGICAL UNIT RESET do the same: every command accepted before has ended when the reset is answered.
//!
//! Some targets keep registrations per session rather than per initiator port. After a reconnect the node therefore registers
//! again, but only if its key is still there: if it is not, the node was fenced (or the device forgot its registrations, which
//! comes to the same). A preemption between the look and the new registration does no harm: it comes after the end of the
//! lease, so every permit asked for later is refused.
//!
//! A disk of the host's kernel has one registration per path, for all that this host sends: see [`crate::kernel`].

use std::io::ErrorKind;
use std::pin::Pin;

use super::cdb::{self, Cdb, Meaning, ReserveIn, ReserveOut, WRITE_EXCLUSIVE_ALL_REGISTRANTS};
use super::disk::{Answer, Paths, ScsiDisk, What};
use super::{Piece, Reply, Transfer};
use crate::{AlignedBuf, DevError, FenceKey, Presence, Registrations, Result};

const MAGIC: u64 = 0x0043_4653;
/// The slot of programs that are no node: mkfs and fsck.
pub(crate) const TOOL: u16 = 0xff;
/// Lost connections that one operation goes through.
const TRIES: usize = 5;

/// What this mount is to the device.
#[derive(Default)]
pub(crate) struct Owner {
    /// Our key.
    pub registered: Option<u64>,
    /// The device does not know PREEMPT AND ABORT.
    no_abort: bool,
    /// The generation of registrations that was last seen.
    generation: u32,
}

pub(crate) fn encode(key: FenceKey) -> u64 {
    MAGIC << 40 | u64::from(key.slot & 0xff) << 32 | u64::from(key.incarnation)
}

fn decode(key: u64) -> Option<FenceKey> {
    (key >> 40 == MAGIC).then_some(FenceKey { slot: (key >> 32 & 0xff) as u16, incarnation: key as u32 })
}

/// Why an operation did not end.
enum Trouble {
    /// The connection was lost: try again on the next.
    Lost,
    Failed(DevError),
}

impl From<DevError> for Trouble {
    fn from(e: DevError) -> Self {
        Self::Failed(e)
    }
}

type Attempt<T> = std::result::Result<T, Trouble>;

fn type_name(kind: u8) -> &'static str {
    match kind {
        1 => "Write Exclusive",
        3 => "Exclusive Access",
        5 => "Write Exclusive - Registrants Only",
        6 => "Exclusive Access - Registrants Only",
        7 => "Write Exclusive - All Registrants",
        8 => "Exclusive Access - All Registrants",
        _ => "unknown type",
    }
}

impl ScsiDisk {
    pub(crate) async fn identify_reservations(&mut self) -> Result<()> {
        let what = What::new("identify");
        let keys = self.ask(what, cdb::reserve_in(ReserveIn::ReadKeys)).await?;
        self.features.reservations = keys.is_ok_and(|data| cdb::keys(&data).is_some());
        if self.features.reservations {
            let told = self.ask(what, cdb::reserve_in(ReserveIn::ReportCapabilities)).await?;
            self.features.persists = told.is_ok_and(|data| cdb::persists(&data));
        }
        Ok(())
    }

    async fn answer(&self, connection: u64, cdb: Cdb) -> Attempt<Vec<u8>> {
        let what = What::new("read reservations");
        let make = || (cdb, Transfer::In(vec![AlignedBuf::zeroed(cdb::ANSWER.into())]));
        match self.send(connection, &None, &make).await {
            Answer::Good { bufs, received } => {
                Ok(bufs.first().map(|b| b[..received.min(b.len())].to_vec()).unwrap_or_default())
            }
            Answer::Check(sense) => Err(what.sense(sense).into()),
            Answer::Conflict => Err(what.io(ErrorKind::PermissionDenied, "the device refuses it").into()),
            Answer::Refused | Answer::Lost { .. } => Err(Trouble::Lost),
        }
    }

    async fn keys(&self, connection: u64) -> Attempt<Vec<u64>> {
        let data = self.answer(connection, cdb::reserve_in(ReserveIn::ReadKeys)).await?;
        let odd = || What::new("read keys").io(ErrorKind::InvalidData, "the device's answer makes no sense");
        Ok(cdb::keys(&data).ok_or_else(odd)?)
    }

    async fn reservation(&self, connection: u64) -> Attempt<Option<(u64, u8)>> {
        let data = self.answer(connection, cdb::reserve_in(ReserveIn::ReadReservation)).await?;
        let odd = || What::new("read reservation").io(ErrorKind::InvalidData, "the device's answer makes no sense");
        Ok(cdb::reservation(&data).ok_or_else(odd)?)
    }

    async fn change(&self, connection: u64, action: ReserveOut, own: u64, other: u64) -> Attempt<Answer> {
        let persist = self.features.persists && action == ReserveOut::RegisterAndIgnore && other != 0;
        let (cdb, list) = cdb::reserve_out(action, own, other, persist);
        let list = std::sync::Arc::new(AlignedBuf::copy_of(&list));
        let paths = if action == ReserveOut::RegisterAndIgnore { Paths::Each } else { Paths::Any };
        let make = || (cdb, Transfer::Out(vec![Piece::whole(list.clone())]));
        match self.send_by(paths, connection, &None, &make).await {
            Answer::Lost { .. } | Answer::Refused => Err(Trouble::Lost),
            answer => Ok(answer),
        }
    }

    async fn register_on(&self, connection: u64, key: u64) -> Attempt<()> {
        let what = What::new("register");
        match self.change(connection, ReserveOut::RegisterAndIgnore, 0, key).await? {
            Answer::Good { .. } => Ok(()),
            Answer::Check(sense) => Err(what.sense(sense).into()),
            _ => Err(what.io(ErrorKind::PermissionDenied, "the device refuses a registration").into()),
        }
    }

    /// Makes sure that the reservation is in force; true if it was not.
    async fn reserve_on(&self, connection: u64, own: u64) -> Attempt<bool> {
        let what = What::new("reserve");
        match self.reservation(connection).await? {
            Some((_, WRITE_EXCLUSIVE_ALL_REGISTRANTS)) => return Ok(false),
            Some((key, kind)) => return Err(foreign(what, key, kind).into()),
            None => {}
        }
        match self.change(connection, ReserveOut::Reserve, own, 0).await? {
            Answer::Good { .. } => Ok(true),
            Answer::Check(sense) => Err(what.sense(sense).into()),
            // Another node was faster; or not.
            _ => match self.reservation(connection).await? {
                Some((_, WRITE_EXCLUSIVE_ALL_REGISTRANTS)) => Ok(true),
                Some((key, kind)) => Err(foreign(what, key, kind).into()),
                None => Err(what.io(ErrorKind::PermissionDenied, "the device refuses a reservation").into()),
            },
        }
    }

    /// Repeats `attempt` on new connections.
    async fn through<'a, T>(
        &self,
        what: What,
        attempt: impl Fn(u64) -> Pin<Box<dyn Future<Output = Attempt<T>> + Send + 'a>> + Send + Sync,
    ) -> Result<T> {
        for _ in 0..TRIES {
            let connection = self.transport.connected().await.map_err(|e| what.error(e))?;
            match attempt(connection).await {
                Ok(done) => return Ok(done),
                Err(Trouble::Failed(e)) => return Err(e),
                Err(Trouble::Lost) => {}
            }
        }
        Err(what.unknown())
    }

    pub(crate) async fn register_key(&self, key: u64) -> Result<()> {
        let what = What::new("register");
        let _one = self.attaching.lock().await;
        let first = self.owner.lock().registered.is_none();
        self.through(what, |connection| {
            Box::pin(async move {
                if first {
                    self.refuse_foreign(connection, what).await?;
                }
                self.register_on(connection, key).await?;
                self.reserve_on(connection, key).await?;
                Ok(())
            })
        })
        .await?;
        let mut owner = self.owner.lock();
        (owner.registered, owner.generation) = (Some(key), 0);
        drop(owner);
        self.admit_again();
        Ok(())
    }

    /// A device that another owner has reserved, or registered with, is not for us.
    pub(crate) async fn refuse_reserved(&self) -> Result<()> {
        if !self.features.reservations {
            return Ok(());
        }
        let what = What::new("open");
        self.through(what, |connection| Box::pin(self.refuse_foreign(connection, what))).await
    }

    async fn refuse_foreign(&self, connection: u64, what: What) -> Attempt<()> {
        if let Some((key, kind)) = self.reservation(connection).await?
            && kind != WRITE_EXCLUSIVE_ALL_REGISTRANTS
        {
            return Err(foreign(what, key, kind).into());
        }
        match self.keys(connection).await?.into_iter().find(|k| decode(*k).is_none()) {
            None => Ok(()),
            Some(key) => {
                let why = format!(
                    "another program has registered with the device (key {key:#x}): it is not for clusterfs, or that program is \
                     to be stopped and its keys removed (sg_persist --clear, see docs/SAN.md)"
                );
                Err(what.io(ErrorKind::PermissionDenied, why).into())
            }
        }
    }

    pub(crate) async fn unregister_key(&self) -> Result<()> {
        if self.owner.lock().registered.is_none() {
            return Ok(());
        }
        let _one = self.attaching.lock().await;
        // The last one's reservation goes with it.
        self.through(What::new("unregister"), |connection| Box::pin(self.register_on(connection, 0))).await?;
        self.owner.lock().registered = None;
        Ok(())
    }

    /// After a reconnect, or a sign that registrations changed: `false` if the connection was lost meanwhile. Writes are cut
    /// off if our registration is gone.
    pub(crate) async fn still_registered(&self, connection: u64, what: What) -> Result<bool> {
        let Some(own) = self.owner.lock().registered else { return Ok(true) };
        match self.look_after(connection, own).await {
            Ok(()) => Ok(true),
            Err(Trouble::Lost) => Ok(false),
            Err(Trouble::Failed(e)) => {
                tracing::warn!("{}: {e}", what.op);
                Err(e)
            }
        }
    }

    async fn look_after(&self, connection: u64, own: u64) -> Attempt<()> {
        if self.check_own(&self.keys(connection).await?, own).is_err() {
            return Ok(());
        }
        if self.transport.registrations_end_with_connections() {
            self.register_on(connection, own).await?;
        }
        self.reserve_on(connection, own).await?;
        Ok(())
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.owner.lock().registered.is_some()
    }

    /// For a node whose write was refused although the device knows it: by the path that it went, we were not registered. To be
    /// called with nothing of ours under way, which would be accepted although somebody fences us meanwhile.
    pub(crate) async fn register_again(&self) -> Result<()> {
        let what = What::new("register");
        let own = self.own(what)?;
        let _one = self.attaching.lock().await;
        self.through(what, |connection| {
            Box::pin(async move {
                self.check_own(&self.keys(connection).await?, own)?;
                self.register_on(connection, own).await?;
                self.reserve_on(connection, own).await?;
                Ok(())
            })
        })
        .await?;
        self.admit_again();
        Ok(())
    }

    /// Looks whether we are registered and the reservation is in force, and whether the device has lost its power meanwhile.
    pub(crate) async fn look_at_registration(&self) -> Result<()> {
        let what = What::new("registration");
        let Some(own) = self.owner.lock().registered else { return Ok(()) };
        let _one = self.attaching.lock().await;
        self.through(what, |connection| {
            Box::pin(async move {
                let data = self.answer(connection, cdb::reserve_in(ReserveIn::ReadKeys)).await?;
                let seen = cdb::keys(&data).zip(cdb::generation(&data));
                let Some((keys, generation)) = seen else { return Err(what.unknown().into()) };
                self.check_own(&keys, own)?;
                let before = std::mem::replace(&mut self.owner.lock().generation, generation);
                if generation < before && self.geometry.write_cache {
                    self.cut_off("the device has restarted, and writes that were not yet flushed may be gone");
                    return Err(DevError::Fenced.into());
                }
                self.reserve_on(connection, own).await?;
                Ok(())
            })
        })
        .await
    }

    pub(crate) async fn key_presence(&self, key: u64) -> Result<Presence> {
        if !self.features.reservations {
            return Ok(Presence::Unknown);
        }
        self.through(What::new("presence"), |connection| {
            Box::pin(async move {
                if self.keys(connection).await?.contains(&key) {
                    return Ok(Presence::Present);
                }
                match self.reservation(connection).await? {
                    Some((_, WRITE_EXCLUSIVE_ALL_REGISTRANTS)) => Ok(Presence::Gone),
                    // Nothing keeps it from writing.
                    _ => Ok(Presence::Unknown),
                }
            })
        })
        .await
    }

    /// No write of the owner of `victim` arrives after this.
    pub(crate) async fn preempt(&self, victim: u64) -> Result<()> {
        let what = What::new("fence");
        let own = self.own(what)?;
        if victim == own {
            return Err(what.io(ErrorKind::InvalidInput, "a node does not fence itself"));
        }
        let _one = self.attaching.lock().await;
        self.through(what, |connection| Box::pin(self.preempt_on(connection, own, victim, what))).await
    }

    fn own(&self, what: What) -> Result<u64> {
        let own = self.owner.lock().registered;
        own.ok_or_else(|| what.io(ErrorKind::PermissionDenied, "who is not registered cannot fence"))
    }

    async fn preempt_on(&self, connection: u64, own: u64, victim: u64, what: What) -> Attempt<()> {
        let keys = self.keys(connection).await?;
        self.check_own(&keys, own)?;
        // Without a reservation in force, a key that is not there keeps nobody from writing.
        let mut drain = self.reserve_on(connection, own).await?;
        if keys.contains(&victim) {
            drain |= self.remove(connection, own, victim, what).await?;
        } else {
            // Who removed it may not have come to the reset yet.
            drain |= self.owner.lock().no_abort;
        }
        if drain {
            self.drain(connection, what).await?;
        }
        let keys = self.keys(connection).await?;
        if keys.contains(&victim) {
            return Err(what.io(ErrorKind::Other, "the device keeps the registration").into());
        }
        self.check_own(&keys, own)?;
        self.reserve_on(connection, own).await?;
        tracing::warn!("fenced: registration {victim:#x} is removed from the device");
        Ok(())
    }

    fn check_own(&self, keys: &[u64], own: u64) -> Attempt<()> {
        if keys.contains(&own) {
            return Ok(());
        }
        self.cut_off("the registration of this node is gone from the device: another node has fenced it");
        Err(DevError::Fenced.into())
    }

    /// Removes a registration; true if commands accepted earlier may still be running.
    async fn remove(&self, connection: u64, own: u64, victim: u64, what: What) -> Attempt<bool> {
        if !self.owner.lock().no_abort {
            match self.change(connection, ReserveOut::PreemptAndAbort, own, victim).await? {
                // A conflict: it is gone, or we are. What the keys say next decides.
                Answer::Good { .. } | Answer::Conflict => return Ok(false),
                Answer::Check(sense) if sense.meaning() == Meaning::Unsupported => {
                    tracing::warn!(
                        "the device does not know PREEMPT AND ABORT: PREEMPT and LOGICAL UNIT RESET instead"
                    );
                    self.owner.lock().no_abort = true;
                }
                Answer::Check(sense) => return Err(what.sense(sense).into()),
                Answer::Refused | Answer::Lost { .. } => return Err(Trouble::Lost),
            }
        }
        // tgt leaves a reservation that the victim made pointing nowhere when its registration goes: we make it anew. Nobody
        // gets more rights by that than the victim has until now, and what is accepted meanwhile is drained.
        self.change(connection, ReserveOut::Release, own, 0).await?;
        self.reserve_on(connection, own).await?;
        match self.change(connection, ReserveOut::Preempt, own, victim).await? {
            Answer::Check(sense) => Err(what.sense(sense).into()),
            _ => Ok(true),
        }
    }

    async fn drain(&self, connection: u64, what: What) -> Attempt<()> {
        match self.transport.reset_unit(connection).await {
            Reply::Good { .. } => Ok(()),
            Reply::Lost { .. } => Err(Trouble::Lost),
            _ => Err(what.io(ErrorKind::Unsupported, "the device refuses LOGICAL UNIT RESET").into()),
        }
    }

    /// Everybody else loses the right to write, other programs too.
    pub(crate) async fn preempt_all(&self) -> Result<()> {
        let what = What::new("fence");
        if !self.features.reservations {
            return Ok(());
        }
        let own = self.own(what)?;
        let _one = self.attaching.lock().await;
        self.through(what, |connection| {
            Box::pin(async move {
                for victim in self.keys(connection).await?.into_iter().filter(|k| *k != own) {
                    self.preempt_on(connection, own, victim, what).await?;
                }
                Ok(())
            })
        })
        .await
    }

    pub(crate) async fn list_registrations(&self) -> Result<Option<Registrations>> {
        if !self.features.reservations {
            return Ok(None);
        }
        self.through(What::new("read reservations"), |connection| {
            Box::pin(async move {
                let mut list = Registrations::default();
                for key in self.keys(connection).await? {
                    match decode(key) {
                        Some(FenceKey { slot: TOOL, .. }) => list.tools += 1,
                        Some(key) => list.nodes.push(key),
                        None => list.foreign.push(key),
                    }
                }
                let reservation = self.reservation(connection).await?;
                list.reservation = reservation.map(|(_, kind)| type_name(kind));
                list.foreign_holder = reservation.map(|(key, _)| key).filter(|key| *key != 0 && decode(*key).is_none());
                Ok(Some(list))
            })
        })
        .await
    }
}

/// A reservation that is not ours.
fn foreign(what: What, key: u64, kind: u8) -> DevError {
    what.io(
        ErrorKind::PermissionDenied,
        format!(
            "the device is reserved by another program ({}, key {key:#x}): it is not for clusterfs, or that program is to be \
             stopped and its reservation removed (sg_persist --clear, see docs/SAN.md)",
            type_name(kind)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_whose_they_are() {
        let key = FenceKey { slot: 63, incarnation: 0xdead_beef };
        assert_eq!(encode(key), 0x4346_533f_dead_beef);
        assert_eq!(decode(encode(key)), Some(key));
        assert_eq!(decode(0x0123_4567_89ab_cdef), None);
        assert_eq!(decode(0), None);
    }
}
