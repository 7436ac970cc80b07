//! SG_IO: one SCSI command through the host's kernel, and how it ended (scsi/sg.h).

use std::ffi::{c_int, c_uint, c_void};
use std::fs::File;
use std::io::{self, Error};
use std::os::fd::AsRawFd;

use crate::scsi::cdb::{Cdb, Sense};
use crate::scsi::{Reply, Transfer};

/// From scsi/sg.h.
const SG_IO: u64 = 0x2285;
const SG_SCSI_RESET: u64 = 0x2284;
/// SG_SCSI_RESET_DEVICE with SG_SCSI_RESET_NO_ESCALATE: the logical unit, and if that fails nothing else.
const RESET_UNIT: c_int = 0x101;
const DXFER_NONE: c_int = -1;
const DXFER_TO_DEV: c_int = -2;
const DXFER_FROM_DEV: c_int = -3;
/// When the kernel gives a command up, in milliseconds: it aborts it, or resets the unit, before it says so.
const TIMEOUT: c_uint = 30_000;
const SENSE: usize = 96;

/// `struct sg_io_hdr`.
#[repr(C)]
struct Header {
    interface_id: c_int,
    dxfer_direction: c_int,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: c_uint,
    dxferp: *mut c_void,
    cmdp: *mut u8,
    sbp: *mut u8,
    timeout: c_uint,
    flags: c_uint,
    pack_id: c_int,
    usr_ptr: *mut c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: c_int,
    duration: c_uint,
    info: c_uint,
}

/// What the kernel says of a command that it has carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ended {
    /// Of the device.
    status: u8,
    /// Of the way to it.
    host: u16,
    sense: Option<Sense>,
}

/// How a command ended; `None`: well.
fn outcome(ended: Ended) -> Option<Reply> {
    const CHECK_CONDITION: u8 = 0x02;
    const BUSY: u8 = 0x08;
    const RESERVATION_CONFLICT: u8 = 0x18;
    const TASK_SET_FULL: u8 = 0x28;
    // The device's own word counts before what became of the way to it: kernels report a reservation conflict as both.
    match (ended.status & 0xfe, ended.host) {
        (RESERVATION_CONFLICT, _) => Some(Reply::Conflict),
        (CHECK_CONDITION, _) => Some(ended.sense.map_or(Reply::Lost { sent: true }, Reply::Check)),
        (BUSY | TASK_SET_FULL, 0) => Some(Reply::Busy),
        (0, 0) => None,
        // Timed out, aborted, the path gone: whatever it says, it may have arrived (I9).
        _ => Some(Reply::Lost { sent: true }),
    }
}

/// Sends one command and waits for its end. An error: the kernel did not take it.
pub(super) fn execute(file: &File, cdb: Cdb, mut data: Transfer) -> io::Result<Reply> {
    let Ok(len) = c_uint::try_from(data.len()) else { return Err(Error::from_raw_os_error(libc::EINVAL)) };
    let (direction, vectors): (c_int, Vec<libc::iovec>) = match &mut data {
        _ if len == 0 => (DXFER_NONE, Vec::new()),
        Transfer::None => (DXFER_NONE, Vec::new()),
        Transfer::In(bufs) => {
            let vector = |b: &mut crate::AlignedBuf| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() };
            (DXFER_FROM_DEV, bufs.iter_mut().map(vector).collect())
        }
        // The kernel only reads them.
        Transfer::Out(pieces) => {
            let vector = |b: &[u8]| libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() };
            (DXFER_TO_DEV, pieces.iter().map(|p| vector(p.bytes())).collect())
        }
    };
    let Ok(count) = u16::try_from(vectors.len()) else { return Err(Error::from_raw_os_error(libc::EINVAL)) };
    let (mut command, mut sense) = (cdb.bytes, [0u8; SENSE]);
    let mut header = Header {
        interface_id: c_int::from(b'S'),
        dxfer_direction: direction,
        cmd_len: cdb.len,
        mx_sb_len: SENSE as u8,
        iovec_count: count,
        dxfer_len: len,
        dxferp: if count == 0 { std::ptr::null_mut() } else { vectors.as_ptr().cast_mut().cast() },
        cmdp: command.as_mut_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout: TIMEOUT,
        flags: 0,
        pack_id: 0,
        usr_ptr: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header is as scsi/sg.h lays it out; command, sense and vectors with what they point to live through the call,
    // and those that the kernel writes to are borrowed exclusively.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), SG_IO as _, &mut header) };
    if done < 0 {
        return Err(Error::last_os_error());
    }
    let sense = Sense::parse(&sense[..usize::from(header.sb_len_wr).min(SENSE)]);
    if let Some(reply) = outcome(Ended { status: header.status, host: header.host_status, sense }) {
        return Ok(reply);
    }
    let missing = usize::try_from(header.resid).unwrap_or(0);
    let received = data.len().saturating_sub(missing);
    Ok(Reply::Good { bufs: if let Transfer::In(bufs) = data { bufs } else { Vec::new() }, received })
}

/// LOGICAL UNIT RESET; every command that the unit had accepted has ended.
pub(super) fn reset_unit(file: &File) -> io::Result<()> {
    let mut what = RESET_UNIT;
    // SAFETY: the ioctl reads one int.
    match unsafe { libc::ioctl(file.as_raw_fd(), SG_SCSI_RESET as _, &mut what) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// As the compiler of the kernel lays `struct sg_io_hdr` out on 64 bits.
    #[cfg(target_pointer_width = "64")]
    #[test]
    fn the_header_is_the_kernels() {
        assert_eq!(size_of::<Header>(), 88);
        assert_eq!((offset_of!(Header, cmd_len), offset_of!(Header, dxfer_len)), (8, 12));
        assert_eq!((offset_of!(Header, dxferp), offset_of!(Header, cmdp), offset_of!(Header, sbp)), (16, 24, 32));
        assert_eq!((offset_of!(Header, timeout), offset_of!(Header, usr_ptr)), (40, 56));
        assert_eq!((offset_of!(Header, status), offset_of!(Header, sb_len_wr)), (64, 67));
        assert_eq!((offset_of!(Header, host_status), offset_of!(Header, resid)), (68, 72));
    }

    fn told(status: u8, host: u16, sense: Option<Sense>) -> &'static str {
        match outcome(Ended { status, host, sense }) {
            None => "good",
            Some(Reply::Check(_)) => "check",
            Some(Reply::Conflict) => "conflict",
            Some(Reply::Busy) => "busy",
            Some(Reply::Lost { sent: true }) => "unknown",
            Some(_) => "else",
        }
    }

    #[test]
    fn whatever_is_not_certain_is_unknown() {
        const NEXUS_FAILURE: u16 = 0x11;
        const TIME_OUT: u16 = 0x03;
        const NO_CONNECT: u16 = 0x01;
        let sense = Some(Sense { key: 0xe, code: 0x1d00 });
        assert_eq!(told(0, 0, None), "good");
        assert_eq!(told(2, 0, sense), "check");
        assert_eq!(told(2, 0, None), "unknown");
        assert_eq!(told(0x18, 0, None), "conflict");
        assert_eq!(told(0x18, NEXUS_FAILURE, None), "conflict");
        assert_eq!(told(8, 0, None), "busy");
        assert_eq!(told(0x28, 0, None), "busy");
        // TASK ABORTED.
        assert_eq!(told(0x40, 0, None), "unknown");
        for host in [TIME_OUT, NO_CONNECT, 0x0e, 0x0f] {
            assert_eq!(told(0, host, None), "unknown");
        }
    }
}
