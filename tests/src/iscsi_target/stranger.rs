//! Another program that reserves a disk for itself: an initiator that knows nothing of clusterfs, with a session of its own and
//! just enough of iSCSI (RFC 7143) for PERSISTENT RESERVE OUT. Targets that keep registrations per session forget its when it is
//! dropped.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::TARGET;
use crate::cluster::Result;

const HEADER: usize = 48;
const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const CLEAR: u8 = 3;
/// Types of reservations.
pub const WRITE_EXCLUSIVE: u8 = 1;
pub const EXCLUSIVE_ACCESS: u8 = 3;

/// Who has registered with a disk.
pub struct Stranger {
    stream: TcpStream,
    lun: u8,
    key: u64,
    task: u32,
    command: u32,
    status: u32,
}

impl Stranger {
    /// Logs in and registers with `key`.
    pub fn register(at: SocketAddr, lun: u8, key: u64) -> Result<Self> {
        let stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut s = Self { stream, lun, key, task: 1, command: 1, status: 0 };
        s.log_in()?;
        // A new session's first command is answered by what has happened to the unit before.
        for _ in 0..5 {
            if s.reserve_out(REGISTER, 0, 0, key)? == 0 {
                return Ok(s);
            }
        }
        Err("the target refuses the registration".into())
    }

    /// Reserves the disk.
    pub fn reserve(&mut self, kind: u8) -> Result<()> {
        match self.reserve_out(RESERVE, kind, self.key, 0)? {
            0 => Ok(()),
            status => Err(format!("the target refuses the reservation: status {status:#x}").into()),
        }
    }

    /// Takes all back, as `sg_persist --clear` does.
    pub fn clear(&mut self) -> Result<()> {
        match self.reserve_out(CLEAR, 0, self.key, 0)? {
            0 => Ok(()),
            status => Err(format!("the target refuses to clear: status {status:#x}").into()),
        }
    }

    fn log_in(&mut self) -> Result<()> {
        let text = format!(
            "InitiatorName=iqn.2026-01.test:stranger\0TargetName={TARGET}\0SessionType=Normal\0HeaderDigest=None\0\
             DataDigest=None\0ImmediateData=Yes\0InitialR2T=No\0"
        );
        let mut header = [0; HEADER];
        // Immediate; from operational negotiation straight to the full-feature phase.
        (header[0], header[1]) = (0x43, 0x87);
        header[8..14].copy_from_slice(&[0x80, 0, 0x51, 0x7a, 0, 1]);
        header[24..28].copy_from_slice(&self.command.to_be_bytes());
        self.send(header, text.as_bytes())?;
        let (answer, text) = self.receive()?;
        if answer[0] & 0x3f != 0x23 || answer[36] != 0 || answer[1] & 0x83 != 0x83 {
            let text = String::from_utf8_lossy(&text).replace('\0', " ");
            return Err(format!("the target refuses the login: {:02x?} {text}", &answer[..40]).into());
        }
        Ok(())
    }

    /// PERSISTENT RESERVE OUT; the status of the command.
    fn reserve_out(&mut self, action: u8, kind: u8, own: u64, new: u64) -> Result<u8> {
        let mut list = [0; 24];
        list[..8].copy_from_slice(&own.to_be_bytes());
        list[8..16].copy_from_slice(&new.to_be_bytes());
        let mut header = [0; HEADER];
        // A command that writes, with all its data.
        (header[0], header[1], header[9]) = (0x01, 0xa0, self.lun);
        header[16..20].copy_from_slice(&self.task.to_be_bytes());
        header[20..24].copy_from_slice(&24u32.to_be_bytes());
        header[24..28].copy_from_slice(&self.command.to_be_bytes());
        header[28..32].copy_from_slice(&self.status.to_be_bytes());
        header[32..42].copy_from_slice(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0]);
        self.task += 1;
        self.command += 1;
        self.send(header, &list)?;
        loop {
            let (answer, _) = self.receive()?;
            // Signs of life in between are none of ours to answer: the target waits for long enough.
            if answer[0] & 0x3f == 0x21 {
                return Ok(answer[3]);
            }
        }
    }

    fn send(&mut self, mut header: [u8; HEADER], data: &[u8]) -> Result<()> {
        header[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        let mut pdu = header.to_vec();
        pdu.extend_from_slice(data);
        pdu.resize(HEADER + data.len().next_multiple_of(4), 0);
        Ok(self.stream.write_all(&pdu)?)
    }

    fn receive(&mut self) -> Result<([u8; HEADER], Vec<u8>)> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header)?;
        let len = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        let mut data = vec![0; len.next_multiple_of(4)];
        self.stream.read_exact(&mut data)?;
        self.status = u32::from_be_bytes([header[24], header[25], header[26], header[27]]).wrapping_add(1);
        Ok((header, data))
    }
}
