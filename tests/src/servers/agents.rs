//! Delivery agents that are run once for each message: procmail and maildrop, with the locks that they take by default.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::accounts::{GID, UID};
use super::process::installed;
use crate::cluster::{Cluster, Result};
use crate::mail::Message;
use crate::sys::chown;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    Procmail,
    Maildrop,
}

impl Agent {
    /// Delivers a message to an mbox as its owner; an error if the agent does not take responsibility for it. `dir` is for its
    /// configuration.
    pub fn deliver(self, cluster: &Cluster, dir: &Path, mbox: &Path, message: &Message) -> Result<()> {
        let mut command = match self {
            Self::Procmail => {
                let mut c = Command::new(installed("/usr/bin/procmail")?);
                // It looks again after 8 s by itself, when it finds a lock.
                c.args(["-t", "-f", &message.from, "LOCKSLEEP=1"]).arg(format!("DEFAULT={}", mbox.display()));
                c.arg("/dev/null");
                c
            }
            Self::Maildrop => {
                let mut c = Command::new(installed("/usr/bin/maildrop")?);
                c.args(["-f", &message.from]).arg(filter(dir, mbox)?);
                c
            }
        };
        command.uid(UID).gid(GID).env("HOME", dir).current_dir(dir).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = cluster.spawn(command)?;
        let mut input = child.stdin.take().ok_or("no pipe to the agent")?;
        // An agent that ends early says why.
        let written = input.write_all(&message.bytes);
        drop(input);
        let done = child.wait_with_output()?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            return Err(format!("{self:?} on {}: {}: {said}", mbox.display(), done.status).into());
        }
        Ok(written?)
    }
}

/// maildrop's instructions.
fn filter(dir: &Path, mbox: &Path) -> Result<std::path::PathBuf> {
    let file = dir.join("filter");
    if !file.exists() {
        // Others may make it at the same time.
        let new = tempfile::NamedTempFile::new_in(dir)?;
        fs::write(new.path(), format!("to \"{}\"\n", mbox.display()))?;
        chown(new.path(), UID, GID)?;
        new.persist(&file)?;
    }
    Ok(file)
}
