//! Disks on an iSCSI target, named `iscsi://[USER@]HOST[:PORT]/TARGET/LUN`, without the kernel's initiator.
//!
//! | file | job |
//! |---|---|
//! | [`library`] | libiscsi's functions, loaded at run time |
//! | [`context`] | one login, safely |
//! | [`session`] | the thread that keeps the connection |
//! | [`secrets`] | CHAP secrets and the initiator's name |
//!
//! What the commands are and mean is [`crate::scsi`]'s.

mod context;
mod library;
mod secrets;
mod session;

use std::ffi::CString;
use std::path::PathBuf;
use std::sync::Arc;

use crate::DevError;
use crate::image::OpenMode;
use crate::scsi::disk::ScsiDisk;
use context::Login;
use session::Session;

pub use secrets::INITIATOR_FILE;

/// What the names of iSCSI devices begin with.
pub const SCHEME: &str = "iscsi://";

/// What is known besides the device's name.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// This host's iSCSI name; `None`: from the environment (`CLUSTERFS_INITIATOR`), or [`INITIATOR_FILE`].
    pub initiator: Option<String>,
    /// File with CHAP secrets; `None`: from the environment (`CLUSTERFS_SECRETS`), or the default place.
    pub secrets: Option<PathBuf>,
}

/// The parts of a device's name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Url {
    user: Option<String>,
    /// HOST:PORT.
    portal: String,
    target: String,
    lun: u16,
}

impl Url {
    fn parse(name: &str) -> Result<Self, String> {
        let form = format!("give the device as {SCHEME}[USER@]HOST[:PORT]/TARGET/LUN");
        let rest = name.strip_prefix(SCHEME).ok_or_else(|| form.clone())?;
        let (authority, path) = rest.split_once('/').ok_or_else(|| form.clone())?;
        let (target, lun) = path.rsplit_once('/').ok_or_else(|| form.clone())?;
        let (user, portal) = match authority.rsplit_once('@') {
            Some((user, portal)) => (Some(user.to_string()), portal),
            None => (None, authority),
        };
        if user.as_ref().is_some_and(|u| u.contains([':', '%'])) {
            return Err(
                "secrets do not belong into a device's name, where everybody can read them: put it into a file \
                        (see mount.clusterfs(8))"
                    .into(),
            );
        }
        if user.as_ref().is_some_and(String::is_empty) || portal.is_empty() {
            return Err(form);
        }
        if !["iqn.", "eui.", "naa."].iter().any(|p| target.starts_with(p)) || target.len() > 223 {
            return Err(format!("'{target}' is not the name of an iSCSI target (iqn.YYYY-MM.DOMAIN:NAME)"));
        }
        let lun = lun.parse().ok().filter(|lun| *lun < 16384);
        let lun =
            lun.ok_or_else(|| "the name of the device ends with the number of the LUN, as in .../1".to_string())?;
        let bare = portal.rsplit_once(']').map_or(portal, |(_, port)| port);
        let portal = if bare.contains(':') { portal.to_string() } else { format!("{portal}:3260") };
        Ok(Self { user, portal, target: target.to_string(), lun })
    }
}

fn text(s: &str) -> Result<CString, String> {
    // What the library has room for.
    if s.len() > 255 {
        return Err(format!("'{s}' is too long: 255 bytes at most"));
    }
    CString::new(s).map_err(|_| "a zero byte does not belong there".into())
}

/// Whom to log in to, and as whom; each call makes another initiator port.
fn login(name: &str, settings: &Settings) -> Result<Login, String> {
    let url = Url::parse(name)?;
    let chap = secrets::find(&url.target, url.user.as_deref(), settings.secrets.as_deref())?;
    let pair = |(user, secret): &(String, String)| Ok::<_, String>((text(user)?, text(secret)?));
    let random: u64 = rand::random();
    Ok(Login {
        portal: text(&url.portal)?,
        target: text(&url.target)?,
        initiator: text(&secrets::initiator(settings.initiator.as_deref())?)?,
        lun: url.lun,
        isid: ((random >> 16 & 0xff_ffff) as u32, random as u16),
        chap: chap.as_ref().map(|c| pair(&c.own)).transpose()?,
        mutual: chap.as_ref().and_then(|c| c.target.as_ref()).map(pair).transpose()?,
    })
}

/// Logs in to the target and asks the disk what it is. Errors are sentences for the user.
pub(crate) async fn open(name: &str, mode: OpenMode, settings: &Settings) -> Result<Arc<ScsiDisk>, String> {
    let login = login(name, settings)?;
    let session = Session::open(login).await.map_err(|e| e.to_string())?;
    ScsiDisk::open(session, mode).await.map_err(|e| match e {
        // Of no place on the device: the reason alone is the sentence.
        DevError::Io { source, len: 0, .. } => source.to_string(),
        e => e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let url = Url::parse("iscsi://me@192.0.2.1/iqn.2026-01.org.example:mail/3").unwrap();
        assert_eq!((url.user.as_deref(), url.portal.as_str(), url.lun), (Some("me"), "192.0.2.1:3260", 3));
        assert_eq!(url.target, "iqn.2026-01.org.example:mail");
        assert_eq!(Url::parse("iscsi://host:3261/iqn.a/0").unwrap().portal, "host:3261");
        assert_eq!(Url::parse("iscsi://[2001:db8::1]/iqn.a/0").unwrap().portal, "[2001:db8::1]:3260");
    }

    #[test]
    fn what_is_wrong_with_a_name_is_said() {
        for (name, what) in [
            ("iscsi://host", "[USER@]HOST"),
            ("iscsi://host/iqn.a", "[USER@]HOST"),
            ("iscsi://host/disk/1", "not the name of an iSCSI target"),
            ("iscsi://host/iqn.a/x", "number of the LUN"),
            ("iscsi://me%secret@host/iqn.a/1", "secrets do not belong"),
            ("iscsi:///iqn.a/1", "[USER@]HOST"),
        ] {
            let e = Url::parse(name).unwrap_err();
            assert!(e.contains(what) && !e.contains("%secret"), "{name}: {e}");
        }
    }
}
