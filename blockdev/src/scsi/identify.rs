//! What a logical unit is and can do, asked when it is opened.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::cdb::{self, Cdb};
use super::disk::{Answer, Refusal, ScsiDisk, What};
use super::reservation;
use super::{Transfer, Transport};
use crate::image::OpenMode;
use crate::{Abilities, FenceKey, FencingKind, Geometry, Result};

/// Largest single transfer in bytes.
const MAX_TRANSFER: usize = 1 << 20;

/// What a device can do, found out when it is opened.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    pub product: String,
    pub fua: bool,
    pub compare_and_write: bool,
    pub reservations: bool,
    /// Registrations can outlive a power loss of the device.
    pub persists: bool,
    pub unmap: bool,
    /// Bytes.
    pub max_transfer: usize,
    /// As announced.
    pub limits: cdb::Limits,
}

impl Features {
    pub fn told(&self, sector_size: u32) -> Abilities {
        Abilities {
            product: self.product.clone(),
            announced_compare_and_write: self.limits.compare_and_write,
            compare_and_write: self.compare_and_write,
            fua: self.fua,
            reservations: self.reservations,
            persists: self.persists,
            unmap: self.unmap,
            max_transfer: u64::from(self.limits.transfer) * u64::from(sector_size),
        }
    }
}

impl ScsiDisk {
    /// Asks the device what it is.
    pub(crate) async fn open(transport: Arc<dyn Transport>, mode: OpenMode) -> Result<Arc<Self>> {
        let geometry =
            Geometry { sector_size: 512, size: 0, write_cache: true, fencing: FencingKind::None, others_unseen: false };
        let features = Features {
            product: String::new(),
            fua: false,
            compare_and_write: false,
            reservations: false,
            persists: false,
            unmap: false,
            max_transfer: MAX_TRANSFER,
            limits: cdb::Limits::default(),
        };
        let mut disk = Self::new(transport, features, geometry, mode == OpenMode::ReadWrite);
        disk.identify().await?;
        Ok(Arc::new(disk))
    }

    async fn identify(&mut self) -> Result<()> {
        let what = What::new("identify");
        if let Err(Refusal::Sense(sense)) = self.ask(what, cdb::test_unit_ready()).await? {
            return Err(what.sense(sense));
        }
        let inquiry = self.must(what, cdb::inquiry(None)).await?;
        if inquiry.first().is_none_or(|b| b & 0x1f != 0) {
            return Err(
                what.io(ErrorKind::InvalidInput, "this logical unit is not a disk: check the number of the LUN")
            );
        }
        let capacity = self.must(what, cdb::read_capacity()).await?;
        let (sector_size, size) = measured(what, &capacity)?;
        self.identify_reservations().await?;
        if self.writable {
            // Before anything else is asked: the owner may have shut out all others' questions, and is the better reason.
            self.refuse_reserved().await?;
        }
        let (write_cache, fua) = self.caching(what).await?;
        let limits = match self.ask(what, cdb::inquiry(Some(0xb0))).await? {
            Ok(page) => cdb::limits(&page),
            Err(_) => cdb::Limits::default(),
        };
        let most = u64::from(limits.transfer) * u64::from(sector_size);
        self.geometry = Geometry { sector_size, size, write_cache, fencing: FencingKind::None, others_unseen: false };
        self.size.store(size, SeqCst);
        self.features = Features {
            product: cdb::product(&inquiry),
            fua,
            compare_and_write: self.knows_compare_and_write(limits).await?,
            reservations: self.features.reservations,
            persists: self.features.persists,
            unmap: cdb::provisioned(&capacity) && limits.unmap > 0,
            max_transfer: if most == 0 { MAX_TRANSFER } else { MAX_TRANSFER.min(most as usize) },
            limits,
        };
        if self.features.reservations {
            self.geometry.fencing = FencingKind::Reservations;
        }
        Ok(())
    }

    /// Asks how large the disk is now. That it changed the device also tells by a unit attention, which costs the next command a retry.
    pub(crate) async fn measure(&self) -> Result<Geometry> {
        let what = What::new("read capacity");
        let capacity = self.must(what, cdb::read_capacity()).await?;
        let (sector_size, size) = measured(what, &capacity)?;
        if sector_size != self.geometry.sector_size {
            let why = format!("its blocks had {} bytes, now they have {sector_size}", self.geometry.sector_size);
            return Err(what.io(ErrorKind::InvalidData, why));
        }
        self.size.store(size, SeqCst);
        Ok(Geometry { size, ..self.geometry })
    }

    /// Whether there is a volatile write cache, and FUA; the answer on the safe side if the device does not say. On a device in
    /// use only who is registered may ask.
    async fn caching(&self, what: What) -> Result<(bool, bool)> {
        let ask = || self.ask(what, cdb::mode_sense_caching());
        let page = match ask().await? {
            Err(Refusal::Conflict) if self.writable => {
                let key = FenceKey { slot: reservation::TOOL, incarnation: rand::random() };
                self.register_key(reservation::encode(key)).await?;
                let page = ask().await;
                self.unregister_key().await?;
                page?
            }
            page => page,
        };
        Ok(page.ok().and_then(|page| cdb::caching(&page)).unwrap_or((true, false)))
    }

    /// Asks for one of no blocks, which compares and writes nothing. The limits alone are no proof: tgt announces what it
    /// refuses.
    async fn knows_compare_and_write(&self, limits: cdb::Limits) -> Result<bool> {
        const UNKNOWN_COMMAND: u16 = 0x2000;
        let what = What::new("identify");
        let make = || (cdb::compare_and_write(0, 0, false), Transfer::Out(Vec::new()));
        Ok(match self.run(what, false, false, make).await? {
            Answer::Check(sense) => sense.code != UNKNOWN_COMMAND && limits.compare_and_write > 0,
            _ => true,
        })
    }

    /// Refuses what a node needs and the device does not have.
    pub(crate) fn check_for_nodes(&self) -> io::Result<()> {
        if self.features.compare_and_write {
            return Ok(());
        }
        Err(io::Error::new(
            ErrorKind::Unsupported,
            format!(
                "the target ({}) does not know COMPARE AND WRITE, without which nodes cannot share it (see docs/SAN.md)",
                self.features.product
            ),
        ))
    }

    async fn must(&self, what: What, cdb: Cdb) -> Result<Vec<u8>> {
        self.ask(what, cdb).await?.map_err(|refusal| match refusal {
            Refusal::Sense(sense) => what.sense(sense),
            Refusal::Conflict => self.reserved(what),
        })
    }
}

/// Bytes per sector, and in all.
fn measured(what: What, capacity: &[u8]) -> Result<(u32, u64)> {
    let (blocks, sector_size) =
        cdb::capacity(capacity).ok_or_else(|| what.io(ErrorKind::InvalidData, "the device tells no size"))?;
    let size = blocks.checked_mul(u64::from(sector_size)).filter(|_| matches!(sector_size, 512 | 4096));
    let size = size.ok_or_else(|| {
        let why = format!("blocks of {sector_size} bytes are not supported, only of 512 or 4096");
        what.io(ErrorKind::Unsupported, why)
    })?;
    Ok((sector_size, size))
}
