//! What else a device may hold: signatures of filesystems, partition tables and storage layers.
//!
//! Offsets are those that the formats' own documentation and headers give. A false alarm costs a `--force`, a signature
//! that is missed costs somebody's data: two-byte signatures are believed.

use blockdev::{AlignedBuf, BlockDevice, IoClass};

/// Something found on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub name: &'static str,
    /// Of the signature, in bytes.
    pub offset: u64,
}

/// Where a signature lies.
#[derive(Clone, Copy)]
enum At {
    Start(u64),
    /// From the end of the device rounded down to a multiple of the second number.
    End(u64, u64),
}

use At::{End, Start};

const TABLE: &[(&str, At, &[u8])] = &[
    ("a clusterfs volume", Start(0), b"CLUSTRFS"),
    ("a clusterfs volume", End(4096, 4096), b"CLUSTRFS"),
    ("an ext2, ext3 or ext4 filesystem", Start(0x438), &[0x53, 0xef]),
    ("an XFS filesystem", Start(0), b"XFSB"),
    ("a btrfs filesystem", Start(0x10040), b"_BHRfS_M"),
    ("a GFS2 filesystem", Start(0x10000), &[0x01, 0x16, 0x19, 0x70]),
    ("an OCFS2 filesystem", Start(1024), b"OCFSV2"),
    ("an OCFS2 filesystem", Start(2048), b"OCFSV2"),
    ("an OCFS2 filesystem", Start(4096), b"OCFSV2"),
    ("an OCFS2 filesystem", Start(8192), b"OCFSV2"),
    ("an OCFS filesystem", Start(0), b"OracleCFS"),
    ("a VMFS volume member", Start(0x100000), &[0x0d, 0xd0, 0x01, 0xc0]),
    ("a VMFS filesystem", Start(0x1200000), &[0x5e, 0xf1, 0xab, 0x2f]),
    ("an F2FS filesystem", Start(1024), &[0x10, 0x20, 0xf5, 0xf2]),
    ("a JFS filesystem", Start(0x8000), b"JFS1"),
    ("a ReiserFS filesystem", Start(0x10034), b"ReIsEr"),
    ("a Reiser4 filesystem", Start(0x10000), b"ReIsEr4"),
    ("a NILFS2 filesystem", Start(0x406), &[0x34, 0x34]),
    ("a bcache or bcachefs device", Start(4096 + 24), &[0xc6, 0x85, 0x73, 0xf6]),
    ("an EROFS filesystem", Start(1024), &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("a squashfs filesystem", Start(0), b"hsqs"),
    ("an HFS+ filesystem", Start(1024), b"H+\0\x04"),
    ("an HFS+ filesystem", Start(1024), b"HX\0\x05"),
    ("an APFS container", Start(32), b"NXSB"),
    ("a FAT filesystem", Start(0x36), b"FAT1"),
    ("a FAT filesystem", Start(0x52), b"FAT32"),
    ("an exFAT filesystem", Start(3), b"EXFAT   "),
    ("an NTFS filesystem", Start(3), b"NTFS    "),
    ("a ReFS filesystem", Start(3), b"ReFS\0"),
    ("an ISO 9660 filesystem", Start(0x8001), b"CD001"),
    ("a UDF filesystem", Start(0x8001), b"BEA01"),
    ("swap space", Start(4086), b"SWAPSPACE2"),
    ("swap space", Start(4086), b"SWAP-SPACE"),
    ("swap space", Start(8182), b"SWAPSPACE2"),
    ("swap space", Start(16374), b"SWAPSPACE2"),
    ("swap space", Start(65526), b"SWAPSPACE2"),
    ("a suspended system", Start(4086), b"S1SUSPEND"),
    ("an LVM physical volume", Start(0), b"LABELONE"),
    ("an LVM physical volume", Start(512), b"LABELONE"),
    ("an LVM physical volume", Start(1024), b"LABELONE"),
    ("an LVM physical volume", Start(1536), b"LABELONE"),
    ("a member of an md array", Start(0), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a member of an md array", Start(4096), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a member of an md array", End(8192, 4096), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a member of an md array", End(65536, 65536), &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a LUKS volume", Start(0), b"LUKS\xba\xbe"),
    ("a LUKS volume (second header)", Start(0x4000), b"SKUL\xba\xbe"),
    ("a dm-verity volume", Start(0), b"verity\0\0"),
    ("a dm-integrity volume", Start(0), b"integrt\0"),
    ("a VDO volume", Start(0), b"dmvdo001"),
    ("a device-mapper snapshot", Start(0), b"SnAp"),
    ("DRBD metadata", End(4096 - 60, 4096), &[0x83, 0x74, 0x02, 0x6c]),
    ("DRBD metadata", End(4096 - 60, 4096), &[0x83, 0x74, 0x02, 0x6d]),
    ("a Ceph BlueStore device", Start(0), b"bluestore block device"),
    ("a GPT partition table", Start(512), b"EFI PART"),
    ("a GPT partition table", Start(4096), b"EFI PART"),
    ("a GPT partition table (copy)", End(512, 512), b"EFI PART"),
    ("a GPT partition table (copy)", End(4096, 4096), b"EFI PART"),
    ("a partition table or boot sector", Start(510), &[0x55, 0xaa]),
];

/// ZFS keeps rings of uberblocks, 1 KiB apart at least, in four labels; the first is enough when the label is whole.
const ZFS_RING: std::ops::Range<u64> = 128 << 10..256 << 10;
const ZFS_MAGIC: u64 = 0x00ba_b10c;

/// What is read from the start and from the end in one go.
const HEAD: u64 = 256 << 10;
const TAIL: u64 = 132 << 10;

struct Windows {
    size: u64,
    parts: Vec<(u64, AlignedBuf)>,
}

impl Windows {
    async fn read(dev: &dyn BlockDevice) -> blockdev::Result<Self> {
        let g = dev.geometry();
        let sector = u64::from(g.sector_size);
        let mut parts = Vec::new();
        let mut ranges = vec![(0, HEAD.min(g.size)), (g.size.saturating_sub(TAIL), g.size)];
        for (_, at, magic) in TABLE {
            if let Start(offset) = at
                && *offset >= HEAD
            {
                ranges.push((*offset, offset + magic.len() as u64));
            }
        }
        for (start, end) in ranges {
            let start = start / sector * sector;
            let end = end.next_multiple_of(sector).min(g.size / sector * sector);
            if start < end {
                let len = usize::try_from(end - start).unwrap_or(0);
                parts.push((start, dev.read(IoClass::Meta, start, len).await?));
            }
        }
        Ok(Self { size: g.size, parts })
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<&[u8]> {
        self.parts.iter().find_map(|(start, buf)| {
            let at = usize::try_from(offset.checked_sub(*start)?).ok()?;
            buf.get(at..at.checked_add(len)?)
        })
    }

    fn place(&self, at: At) -> Option<u64> {
        match at {
            Start(offset) => Some(offset),
            End(back, unit) => (self.size / unit * unit).checked_sub(back),
        }
    }
}

/// Everything known that the device holds, in the order of the table, names not repeated for the same place.
pub async fn probe(dev: &dyn BlockDevice) -> blockdev::Result<Vec<Found>> {
    let windows = Windows::read(dev).await?;
    let mut found: Vec<Found> = Vec::new();
    for (name, at, magic) in TABLE {
        let Some(offset) = windows.place(*at) else { continue };
        if windows.bytes(offset, magic.len()) == Some(*magic) {
            found.push(Found { name, offset });
        }
    }
    for offset in ZFS_RING.step_by(1024) {
        let Some(Ok(magic)) = windows.bytes(offset, 8).map(<[u8; 8]>::try_from) else { continue };
        if u64::from_le_bytes(magic) == ZFS_MAGIC || u64::from_be_bytes(magic) == ZFS_MAGIC {
            found.push(Found { name: "a member of a ZFS pool", offset });
        }
    }
    // A FAT or NTFS boot sector, or a GPT's protective entry, carries the mark of a partition table as well.
    if found.len() > 1 {
        found.retain(|f| f.offset != 510 || f.name != "a partition table or boot sector");
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use blockdev::sim::{SimConfig, SimDisk};

    use super::*;

    const SIZE: u64 = (32 << 20) + 12 * 512;

    async fn probe_with(offset: u64, bytes: &[u8]) -> Vec<Found> {
        let disk = SimDisk::new(SimConfig::new(SIZE, 1));
        let sector = offset / 512 * 512;
        let mut b = vec![0; 1024];
        let at = (offset - sector) as usize;
        b[at..at + bytes.len()].copy_from_slice(bytes);
        let len = b.len().min((SIZE - sector) as usize);
        disk.write_raw(sector, &b[..len]);
        let dev: Arc<dyn BlockDevice> = disk.open_raw();
        probe(dev.as_ref()).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn every_signature_is_seen_in_its_place_and_an_empty_device_has_none() {
        assert_eq!(probe_with(0, &[0]).await, vec![]);
        for (name, at, magic) in TABLE {
            let offset = match at {
                Start(o) => *o,
                End(back, unit) => SIZE / unit * unit - back,
            };
            let found = probe_with(offset, magic).await;
            assert!(found.contains(&Found { name, offset }), "{name} at {offset}: {found:?}");
        }
        let zfs = probe_with((128 << 10) + 5 * 1024, &ZFS_MAGIC.to_be_bytes()).await;
        assert_eq!(zfs.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_boot_sector_is_named_by_its_filesystem() {
        let mut sector = vec![0; 512];
        sector[3..11].copy_from_slice(b"NTFS    ");
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        let found = probe_with(0, &sector).await;
        assert_eq!(found, vec![Found { name: "an NTFS filesystem", offset: 3 }]);
    }
}
