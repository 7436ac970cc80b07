//! libiscsi, loaded when it is needed: the program runs without it, and the library stays under its own licence (LGPL).
//!
//! Declarations follow `iscsi/iscsi.h` and `iscsi/scsi-lowlevel.h` of version 1.19, whose interface goes by the name
//! `libiscsi.so.7`. Everything unsafe about iSCSI is in this file and in [`super::context`].

use std::ffi::{c_char, c_int, c_uchar, c_void};
use std::sync::OnceLock;

pub(super) const SO_NAME: &str = "libiscsi.so.7";

/// `struct iscsi_context`.
pub(super) type Iscsi = c_void;

/// The beginning of `struct scsi_task`; the library allocates it.
#[repr(C)]
pub(super) struct Task {
    pub status: c_int,
    _cdb_size: c_int,
    _xfer_dir: c_int,
    pub expected: c_int,
    _cdb: [c_uchar; 16],
    /// 0: none, 1: less, 2: more than expected.
    pub residual_status: c_int,
    pub residual: usize,
}

/// `struct scsi_sense`; the rest of it is not looked at.
#[repr(C)]
#[derive(Default)]
pub(super) struct RawSense {
    _error_type: c_uchar,
    pub key: c_int,
    pub ascq: c_int,
    _rest: [u64; 4],
}

/// `struct scsi_iovec`.
#[repr(C)]
pub(super) struct IoVec {
    pub base: *mut c_void,
    pub len: usize,
}

pub(super) type Callback = unsafe extern "C" fn(*mut Iscsi, c_int, *mut c_void, *mut c_void);

pub(super) mod status {
    use std::ffi::c_int;
    pub const GOOD: c_int = 0;
    pub const CHECK_CONDITION: c_int = 2;
    pub const BUSY: c_int = 8;
    pub const RESERVATION_CONFLICT: c_int = 0x18;
    pub const TASK_SET_FULL: c_int = 0x28;
    pub const REDIRECT: c_int = 0x101;
}

macro_rules! library {
    ($($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        pub(super) struct Library {
            $(pub $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            _library: libloading::Library,
        }

        impl Library {
            fn load() -> Result<Self, libloading::Error> {
                // SAFETY: the library's initialisers do nothing but set up its own data.
                let library = unsafe { libloading::Library::new(SO_NAME)? };
                Ok(Self {
                    $(
                        // SAFETY: the type is that of the header; the pointer lives as long as the library beside it.
                        $name: unsafe { *library.get(concat!(stringify!($name), "\0").as_bytes())? },
                    )*
                    _library: library,
                })
            }
        }
    };
}

library! {
    iscsi_create_context: fn(*const c_char) -> *mut Iscsi;
    iscsi_destroy_context: fn(*mut Iscsi) -> c_int;
    iscsi_set_targetname: fn(*mut Iscsi, *const c_char) -> c_int;
    iscsi_set_session_type: fn(*mut Iscsi, c_int) -> c_int;
    iscsi_set_header_digest: fn(*mut Iscsi, c_int) -> c_int;
    iscsi_set_isid_random: fn(*mut Iscsi, u32, u32) -> c_int;
    iscsi_set_initiator_username_pwd: fn(*mut Iscsi, *const c_char, *const c_char) -> c_int;
    iscsi_set_target_username_pwd: fn(*mut Iscsi, *const c_char, *const c_char) -> c_int;
    iscsi_set_noautoreconnect: fn(*mut Iscsi, c_int);
    iscsi_set_timeout: fn(*mut Iscsi, c_int) -> c_int;
    iscsi_connect_async: fn(*mut Iscsi, *const c_char, Callback, *mut c_void) -> c_int;
    iscsi_login_async: fn(*mut Iscsi, Callback, *mut c_void) -> c_int;
    iscsi_logout_async: fn(*mut Iscsi, Callback, *mut c_void) -> c_int;
    iscsi_nop_out_async: fn(*mut Iscsi, Option<Callback>, *mut c_uchar, c_int, *mut c_void) -> c_int;
    iscsi_task_mgmt_lun_reset_async: fn(*mut Iscsi, u32, Callback, *mut c_void) -> c_int;
    iscsi_get_target_address: fn(*mut Iscsi) -> *const c_char;
    iscsi_get_error: fn(*mut Iscsi) -> *const c_char;
    iscsi_get_fd: fn(*mut Iscsi) -> c_int;
    iscsi_which_events: fn(*mut Iscsi) -> c_int;
    iscsi_service: fn(*mut Iscsi, c_int) -> c_int;
    iscsi_out_queue_length: fn(*mut Iscsi) -> c_int;
    iscsi_scsi_command_async: fn(*mut Iscsi, c_int, *mut Task, Callback, *mut c_void, *mut c_void) -> c_int;
    scsi_create_task: fn(c_int, *mut c_uchar, c_int, c_int) -> *mut Task;
    scsi_free_scsi_task: fn(*mut Task);
    scsi_task_set_iov_in: fn(*mut Task, *mut IoVec, c_int);
    scsi_task_set_iov_out: fn(*mut Task, *mut IoVec, c_int);
    scsi_task_get_status: fn(*mut Task, *mut RawSense) -> c_int;
}

/// The library, loaded at the first call; an error says what to install.
pub(super) fn library() -> Result<&'static Library, String> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        Library::load().map_err(|e| {
            format!("iSCSI needs the library {SO_NAME}: install it (on Debian: apt install libiscsi7) ({e})")
        })
    });
    loaded.as_ref().map_err(Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_laid_out_as_in_the_header() {
        assert_eq!(std::mem::offset_of!(Task, residual_status), 32);
        assert_eq!(std::mem::offset_of!(Task, residual), 40);
        assert_eq!(std::mem::offset_of!(RawSense, key), 4);
        assert_eq!(std::mem::offset_of!(RawSense, ascq), 8);
    }
}
