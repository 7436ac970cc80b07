//! POSIX ACLs, stored as the extended attributes that Linux uses for them. The kernel checks permissions; what is left for
//! the volume is inheritance at creation, and that mode and access ACL agree.
//!
//! The value of the attributes: version 2 (u32), then entries of tag (u16), permissions (u16), id (u32), little endian;
//! rules as in POSIX 1003.1e draft 17, sections 23.1 and 23.4, and acl(5).

use crate::error::{FsError, Result};
use crate::format::bytes::Reader;
use crate::format::item::Inode;
use crate::txn::Txn;

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Acl(Vec<Entry>);

impl Acl {
    fn parse(value: &[u8]) -> Result<Self> {
        let bad = |_| FsError::Invalid;
        let mut r = Reader::new("ACL", value);
        let version = r.u32().map_err(bad)?;
        let bytes = value.len() - 4;
        if version != VERSION || !bytes.is_multiple_of(8) {
            return Err(FsError::Invalid);
        }
        let mut entries = Vec::new();
        for _ in 0..bytes / 8 {
            entries.push(Entry {
                tag: r.u16().map_err(bad)?,
                perm: r.u16().map_err(bad)? & 7,
                id: r.u32().map_err(bad)?,
            });
        }
        let count = |tag| entries.iter().filter(|e| e.tag == tag).count();
        let named = entries.iter().any(|e| ![USER_OBJ, GROUP_OBJ, MASK, OTHER].contains(&e.tag));
        let ok = [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|t| count(*t) == 1) && count(MASK) <= 1;
        if !ok || (named && count(MASK) == 0) {
            return Err(FsError::Invalid);
        }
        Ok(Self(entries))
    }

    fn encode(&self) -> Vec<u8> {
        let mut v = VERSION.to_le_bytes().to_vec();
        for e in &self.0 {
            v.extend(e.tag.to_le_bytes());
            v.extend(e.perm.to_le_bytes());
            v.extend(e.id.to_le_bytes());
        }
        v
    }

    /// The entry that the group bits of the mode stand for.
    fn group_class(&self) -> u16 {
        if self.0.iter().any(|e| e.tag == MASK) { MASK } else { GROUP_OBJ }
    }

    fn perm(&self, tag: u16) -> u32 {
        self.0.iter().find(|e| e.tag == tag).map_or(0, |e| e.perm.into())
    }

    fn mode(&self) -> u32 {
        self.perm(USER_OBJ) << 6 | self.perm(self.group_class()) << 3 | self.perm(OTHER)
    }

    /// Changes the three class entries.
    fn map_classes(&mut self, mode: u32, f: impl Fn(u16, u16) -> u16) {
        let group = self.group_class();
        for (tag, shift) in [(USER_OBJ, 6), (group, 3), (OTHER, 0)] {
            let bits = (mode >> shift & 7) as u16;
            for e in self.0.iter_mut().filter(|e| e.tag == tag) {
                e.perm = f(e.perm, bits);
            }
        }
    }

    /// Says no more than the mode does.
    fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }
}

/// Shapes a new inode by its directory's default ACL, or by the umask where there is none.
pub async fn inherit(tx: &mut Txn<'_>, parent: u64, number: u64, inode: &mut Inode, umask: u32) -> Result<()> {
    if inode.is_symlink() {
        return Ok(());
    }
    let Some(default) = tx.xattr(parent, DEFAULT).await? else {
        inode.mode &= !(umask & 0o777);
        return Ok(());
    };
    let mut acl = Acl::parse(&default)?;
    acl.map_classes(inode.mode, |perm, bits| perm & bits);
    inode.mode = (inode.mode & !0o777) | acl.mode();
    tx.put_inode(number, inode).await?;
    if !acl.is_minimal() {
        tx.put_xattr(number, ACCESS, &acl.encode()).await?;
    }
    if inode.is_dir() {
        tx.put_xattr(number, DEFAULT, &default).await?;
    }
    Ok(())
}

/// The access ACL follows a changed mode.
pub async fn chmod(tx: &mut Txn<'_>, ino: u64, mode: u32) -> Result<()> {
    let Some(value) = tx.xattr(ino, ACCESS).await? else { return Ok(()) };
    let mut acl = Acl::parse(&value)?;
    acl.map_classes(mode, |_, bits| bits);
    tx.put_xattr(ino, ACCESS, &acl.encode()).await
}

/// The mode follows a changed access ACL.
pub async fn set_access(tx: &mut Txn<'_>, ino: u64, value: &[u8]) -> Result<()> {
    let acl = Acl::parse(value)?;
    let mut inode = tx.inode(ino).await?;
    inode.mode = (inode.mode & !0o777) | acl.mode();
    tx.put_inode(ino, &inode).await?;
    if acl.is_minimal() {
        tx.del_xattr(ino, ACCESS).await?;
        return Ok(());
    }
    tx.put_xattr(ino, ACCESS, value).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16)]) -> Acl {
        Acl(entries.iter().map(|(tag, perm)| Entry { tag: *tag, perm: *perm, id: u32::MAX }).collect())
    }

    #[test]
    fn round_trip_and_mode() {
        let a = acl(&[(USER_OBJ, 7), (0x02, 6), (GROUP_OBJ, 5), (MASK, 4), (OTHER, 1)]);
        assert_eq!(Acl::parse(&a.encode()).expect("parses"), a);
        assert_eq!(a.mode(), 0o741);
        assert!(!a.is_minimal());
    }

    #[test]
    fn mode_masks_an_inherited_acl() {
        let mut a = acl(&[(USER_OBJ, 7), (GROUP_OBJ, 7), (OTHER, 7)]);
        a.map_classes(0o640, |p, b| p & b);
        assert_eq!(a.mode(), 0o640);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [&b""[..], b"\x02\0\0\0", b"\x01\0\0\0aaaaaaaa", b"\x02\0\0\0aaa"] {
            assert!(Acl::parse(bad).is_err());
        }
        assert!(Acl::parse(&acl(&[(USER_OBJ, 7), (0x02, 1), (GROUP_OBJ, 7), (OTHER, 7)]).encode()).is_err());
    }
}
