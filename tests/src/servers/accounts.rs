//! The mailboxes of a test site, and where they lie on the volume.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::sys::chown;

/// Debian's user "games": it is there everywhere and has no part in the tests otherwise. All mail belongs to it.
pub const UID: u32 = 5;
pub const GID: u32 = 60;
pub const USERS: [&str; 4] = ["anna", "ben", "carla", "team"];

/// The format of all mailboxes of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    Maildir,
    Mbox,
}

impl Store {
    /// Dovecot's mail_location.
    pub fn location(self) -> &'static str {
        match self {
            Self::Maildir => "maildir:~/Maildir",
            Self::Mbox => "mbox:~/mail:INBOX=~/inbox",
        }
    }

    /// A user's inbox under the mount point, as Postfix wants it: a slash at the end makes it a maildir.
    pub fn inbox(self, user: &str) -> String {
        match self {
            Self::Maildir => format!("home/{user}/Maildir/"),
            Self::Mbox => format!("home/{user}/inbox"),
        }
    }
}

pub fn home(root: &Path, user: &str) -> PathBuf {
    root.join("home").join(user)
}

/// Once per volume.
pub fn make_homes(root: &Path) -> io::Result<()> {
    for user in USERS {
        let home = home(root, user);
        fs::create_dir_all(&home)?;
        chown(&home, UID, GID)?;
    }
    Ok(())
}
