//! Commands through the host's kernel, one SG_IO each on a blocking thread.
//!
//! There is one connection, number 1: the kernel looks after what is under it. It completes a command only once the command
//! has been aborted on the device, or its session is gone; but it does not say which of them arrived (I9).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::RwLock;
use tokio::time::Instant;

use super::{sg, topology};
use crate::scsi::cdb::{self, Cdb, Meaning};
use crate::scsi::{Command, Reply, Transfer, Transport};

/// When the device is given up.
const GIVE_UP: Duration = Duration::from_secs(30);
/// How long is waited after a command was lost, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Unit attentions in a row on one path.
const MAX_ATTENTIONS: usize = 32;

/// Since when commands fail.
struct Trouble {
    since: Instant,
    pause: Duration,
}

pub(super) struct Pass {
    file: Arc<File>,
    /// The sysfs directory of a multipath device.
    multipath: Option<PathBuf>,
    /// Held for reading while something that may write is under way: see [`super`].
    gate: Arc<RwLock<()>>,
    trouble: Mutex<Option<Trouble>>,
}

impl Pass {
    pub fn new(file: Arc<File>, multipath: Option<PathBuf>, gate: Arc<RwLock<()>>) -> Self {
        Self { file, multipath, gate, trouble: Mutex::default() }
    }

    fn note(&self, reply: &Reply) {
        let mut trouble = self.trouble.lock();
        if !matches!(reply, Reply::Lost { .. }) {
            *trouble = None;
        } else if let Some(known) = trouble.as_mut() {
            known.pause = (known.pause * 2).min(PAUSE.1);
        } else {
            *trouble = Some(Trouble { since: Instant::now(), pause: PAUSE.0 });
        }
    }

    async fn blocking(&self, work: impl FnOnce() -> Reply + Send + 'static) -> Reply {
        let reply = tokio::task::spawn_blocking(work).await.unwrap_or(Reply::Lost { sent: true });
        self.note(&reply);
        reply
    }
}

fn send(file: &File, cdb: Cdb, data: Transfer) -> Reply {
    sg::execute(file, cdb, data).unwrap_or_else(|error| {
        tracing::warn!("SG_IO of command {:#04x}: {error}", cdb.bytes[0]);
        Reply::Lost { sent: true }
    })
}

/// By one path, until it has answered to the command itself.
fn send_patiently(file: &File, cdb: Cdb, make: &dyn Fn() -> Transfer) -> Reply {
    let mut reply = send(file, cdb, make());
    for _ in 0..MAX_ATTENTIONS {
        match reply {
            Reply::Check(sense) if matches!(sense.meaning(), Meaning::Attention | Meaning::ReservationsChanged) => {
                reply = send(file, cdb, make());
            }
            _ => break,
        }
    }
    reply
}

/// What is to be known of a command that went by several paths: those that do not work now count only if none does. The
/// first write by one of them is refused, and we register again.
fn together(replies: impl IntoIterator<Item = Reply>) -> Reply {
    let mut all = Reply::Lost { sent: true };
    for reply in replies {
        match (&all, &reply) {
            (_, Reply::Lost { .. }) | (Reply::Check(_) | Reply::Conflict, _) => {}
            _ => all = reply,
        }
    }
    all
}

#[async_trait]
impl Transport for Pass {
    async fn connected(&self) -> io::Result<u64> {
        let Some((since, pause)) = self.trouble.lock().as_ref().map(|t| (t.since, t.pause)) else { return Ok(1) };
        if since.elapsed() >= GIVE_UP {
            let file = self.file.clone();
            let reply = self.blocking(move || send(&file, cdb::test_unit_ready(), Transfer::None)).await;
            if let Reply::Lost { .. } = reply {
                return Err(io::Error::new(ErrorKind::NotConnected, "the device does not answer"));
            }
            return Ok(1);
        }
        tokio::time::sleep(pause).await;
        Ok(1)
    }

    async fn execute(&self, _: u64, command: Command) -> Reply {
        let Command { cdb, data, permit } = command;
        let under_way = if cdb::writes(&cdb) { Some(self.gate.clone().read_owned().await) } else { None };
        let file = self.file.clone();
        self.blocking(move || {
            if permit.is_some_and(|p| !p.valid()) {
                return Reply::Refused;
            }
            let reply = send(&file, cdb, data);
            drop(under_way);
            reply
        })
        .await
    }

    async fn execute_by_each_path(&self, connection: u64, command: Command) -> Reply {
        let Some(multipath) = self.multipath.clone() else { return self.execute(connection, command).await };
        let (cdb, pieces) = match command.data {
            Transfer::Out(pieces) => (command.cdb, pieces),
            // Nothing of the kind is asked of each path.
            data => return self.execute(connection, Command { data, ..command }).await,
        };
        self.blocking(move || {
            let by = |path: PathBuf| {
                let open = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
                match open {
                    Ok(file) => send_patiently(&file, cdb, &|| Transfer::Out(pieces.clone())),
                    Err(error) => {
                        tracing::warn!("{}: {error}", path.display());
                        Reply::Lost { sent: false }
                    }
                }
            };
            together(topology::paths(&multipath).into_iter().map(by))
        })
        .await
    }

    /// What went to the kernel before may still be under way to the device.
    fn registrations_end_with_connections(&self) -> bool {
        false
    }

    async fn reset_unit(&self, _: u64) -> Reply {
        let file = self.file.clone();
        self.blocking(move || match sg::reset_unit(&file) {
            Ok(()) => Reply::Good { bufs: Vec::new(), received: 0 },
            Err(error) => {
                tracing::warn!("LOGICAL UNIT RESET: {error}");
                Reply::Lost { sent: true }
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::cdb::Sense;

    fn good() -> Reply {
        Reply::Good { bufs: Vec::new(), received: 0 }
    }

    #[test]
    fn paths_that_do_not_work_are_left_out() {
        let lost = || Reply::Lost { sent: true };
        assert!(matches!(together([]), Reply::Lost { .. }));
        assert!(matches!(together([lost(), lost()]), Reply::Lost { .. }));
        assert!(matches!(together([lost(), good()]), Reply::Good { .. }));
        assert!(matches!(together([good(), lost()]), Reply::Good { .. }));
        let refused = Reply::Check(Sense { key: 5, code: 0x2600 });
        assert!(matches!(together([good(), refused, good()]), Reply::Check(_)));
        assert!(matches!(together([Reply::Conflict, good()]), Reply::Conflict));
    }
}
