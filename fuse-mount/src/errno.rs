//! Errors of the volume as the kernel's numbers: the only place that knows both.

use blockdev::DevError;
use cluster::ClusterError;
use fs_core::FsError;
use journal::JournalError;

pub fn errno(e: &FsError) -> i32 {
    match e {
        FsError::NotFound => libc::ENOENT,
        FsError::Exists => libc::EEXIST,
        FsError::NotDir => libc::ENOTDIR,
        FsError::IsDir => libc::EISDIR,
        FsError::NotEmpty => libc::ENOTEMPTY,
        FsError::NoSpace | FsError::NoDomain | FsError::NeedSpace(_) => libc::ENOSPC,
        FsError::NameTooLong => libc::ENAMETOOLONG,
        FsError::Invalid => libc::EINVAL,
        FsError::TooBig => libc::EFBIG,
        FsError::TooManyLinks => libc::EMLINK,
        FsError::NoAttr => libc::ENODATA,
        FsError::Range => libc::ERANGE,
        FsError::NotPermitted => libc::EPERM,
        FsError::Access => libc::EACCES,
        FsError::ReadOnly => libc::EROFS,
        FsError::NotSupported => libc::EOPNOTSUPP,
        FsError::NoSuchOffset => libc::ENXIO,
        FsError::Stale => libc::ESTALE,
        FsError::Locked => libc::EAGAIN,
        FsError::Deadlock => libc::EDEADLK,
        FsError::Interrupted => libc::EINTR,
        FsError::Block { .. } | FsError::Damaged { .. } => libc::EUCLEAN,
        FsError::Device(DevError::Fenced) | FsError::Cluster(ClusterError::Lapsed) => libc::EIO,
        FsError::Journal(JournalError::TooLarge { .. }) => libc::ENOSPC,
        _ => libc::EIO,
    }
}

/// Errors that a user's mistake or a full volume cannot explain: worth a line in the log.
pub fn is_fault(e: &FsError) -> bool {
    matches!(errno(e), libc::EIO | libc::EUCLEAN)
}
