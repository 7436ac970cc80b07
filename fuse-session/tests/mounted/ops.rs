//! Every operation arrives with its arguments and its answer arrives with its values.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use fuse_session::{InitFlags, MountSpec, RunError, Session, UnmountMode, abi};

use crate::guard::Mounted;
use crate::memfs::HOUR;
use crate::sys;

#[test]
fn the_mount_table_shows_source_type_and_flags() {
    let m = Mounted::with_flags(libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|l| l.contains(m.root().to_str().unwrap())).unwrap();
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!((fields[0], fields[2]), ("/dev/test-lun", "fuse.clusterfs"));
    for option in ["rw", "nosuid", "nodev", "noexec", "allow_other", "default_permissions", "max_read=1048576"] {
        assert!(fields[3].split(',').any(|o| o == option), "{option} not in {}", fields[3]);
    }
    assert!(m.session.connection().is_some());
}

#[test]
fn a_read_only_mount_refuses_changes() {
    let m = Mounted::with_flags(libc::MS_RDONLY);
    assert_eq!(fs::write(m.path("x"), b"").unwrap_err().raw_os_error(), Some(libc::EROFS));
}

#[test]
fn what_was_negotiated_holds() {
    let m = Mounted::new();
    fs::metadata(m.root()).unwrap();
    let n = m.fs.state.lock().negotiated.unwrap();
    assert_eq!(Some(n), m.session.negotiated());
    assert!(n.minor >= abi::MINOR_MIN && n.minor <= abi::MINOR);
    assert_eq!((n.max_write, n.max_pages), (1 << 20, 256));
    let minor = m.session.connection().unwrap();
    let ahead = fs::read_to_string(format!("/sys/class/bdi/0:{minor}/read_ahead_kb")).unwrap();
    assert_eq!((n.max_readahead, ahead.trim()), (1 << 20, "1024"), "a new mount has 128 KiB");
    assert!(n.flags.contains(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS | InitFlags::MAX_PAGES));
    assert!(!n.flags.contains(InitFlags::WRITEBACK_CACHE), "not asked for");
}

#[test]
fn files_keep_what_is_written_in_large_requests() {
    let m = Mounted::new();
    let data: Vec<u8> = (0..3_500_000u32).map(|i| (i % 251) as u8).collect();
    let mut file = File::options().create_new(true).read(true).write(true).open(m.path("big")).unwrap();
    file.write_all(&data).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    assert_eq!(fs::metadata(m.path("big")).unwrap().len(), data.len() as u64);
    let nodeid = m.fs.state.lock().child(1, "big");
    assert!(m.fs.state.lock().nodes[&nodeid].data == data);
    m.notifier().inval_inode(nodeid, 0, 0).unwrap();
    assert!(fs::read(m.path("big")).unwrap() == data);
    let s = m.fs.state.lock();
    assert_eq!(s.writes.iter().max(), Some(&(1 << 20)), "writes of max_write: {:?}", s.writes);
    assert_eq!(s.writes.iter().sum::<usize>(), data.len());
    assert!(s.reads.iter().any(|&r| r >= 1 << 20), "read-ahead: {:?}", s.reads);
    assert!(s.seen.contains(&"fsync") && s.seen.contains(&"fdatasync"));
}

#[test]
fn names_are_made_moved_and_removed() {
    let m = Mounted::new();
    fs::create_dir(m.path("d")).unwrap();
    fs::write(m.path("d/a"), b"a").unwrap();
    fs::write(m.path("b"), b"bb").unwrap();
    fs::hard_link(m.path("b"), m.path("c")).unwrap();
    symlink("d/a", m.path("l")).unwrap();
    assert_eq!(fs::read_link(m.path("l")).unwrap().to_str(), Some("d/a"));
    assert_eq!(fs::read(m.path("l")).unwrap(), b"a");
    assert_eq!(sys::rename2(&m.path("b"), &m.path("d/a"), libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    sys::rename2(&m.path("b"), &m.path("d/a"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((fs::read(m.path("b")).unwrap(), fs::read(m.path("d/a")).unwrap()), (b"a".into(), b"bb".into()));
    fs::rename(m.path("b"), m.path("e")).unwrap();
    assert_eq!(sys::stat(&m.path("b")), Err(libc::ENOENT));
    assert_eq!(fs::remove_dir(m.path("d")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
    for name in ["d/a", "e", "l", "c"] {
        fs::remove_file(m.path(name)).unwrap();
    }
    fs::remove_dir(m.path("d")).unwrap();
    assert_eq!(fs::read_dir(m.root()).unwrap().count(), 0);
    let pipe = sys::c(&m.path("pipe"));
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o640) }, 0);
    assert!(fs::metadata(m.path("pipe")).unwrap().file_type().is_fifo());
}

#[test]
fn attributes_are_set_and_shown() {
    let m = Mounted::new();
    fs::write(m.path("f"), b"0123456789").unwrap();
    fs::set_permissions(m.path("f"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(m.path("f"), Some(12), Some(34)).unwrap();
    let file = File::options().write(true).open(m.path("f")).unwrap();
    file.set_len(4).unwrap();
    let at = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_times(fs::FileTimes::new().set_modified(at)).unwrap();
    let meta = fs::metadata(m.path("f")).unwrap();
    assert_eq!((meta.mode() & 0o777, meta.uid(), meta.gid(), meta.len()), (0o751, 12, 34, 4));
    assert_eq!(meta.modified().unwrap(), at);
    let x = sys::statx(&m.path("f"), libc::STATX_BASIC_STATS | libc::STATX_BTIME);
    assert_eq!((x.stx_btime.tv_sec, x.stx_btime.tv_nsec, x.stx_size), (1234, 5678, 4));
    let v = sys::statvfs(m.root());
    assert_eq!((v.f_blocks, v.f_bfree, v.f_bavail, v.f_files, v.f_ffree), (1000, 600, 500, 70, 60));
    assert_eq!((v.f_bsize, v.f_frsize, v.f_namemax), (4096, 512, 255));
}

#[test]
fn a_listing_of_many_names_is_complete_and_saves_lookups() {
    let m = Mounted::new();
    let mut expected: Vec<String> = (0..700).map(|i| format!("name-{i:04}-{}", "x".repeat(i % 90))).collect();
    {
        let mut s = m.fs.state.lock();
        for name in &expected {
            s.add(1, name.as_bytes(), libc::S_IFREG | 0o644, 0, 0);
        }
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(m.root()).unwrap() {
        let entry = entry.unwrap();
        assert!(entry.file_type().unwrap().is_file());
        entry.metadata().unwrap();
        found.push(entry.file_name().into_string().unwrap());
    }
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    let s = m.fs.state.lock();
    assert!(s.seen.iter().filter(|&&op| op == "readdirplus").count() > 1, "more than one buffer");
    assert_eq!(s.lookups.len(), 0, "readdirplus has told everything");
}

#[test]
fn an_unnamed_file_is_made_and_gets_a_name() {
    let m = Mounted::new();
    let mut file = sys::tmpfile(m.root()).unwrap();
    file.write_all(b"hidden").unwrap();
    assert_eq!(m.fs.state.lock().seen, ["tmpfile"]);
    assert_eq!(fs::read_dir(m.root()).unwrap().count(), 0);
    sys::link_open_file(&file, &m.path("named")).unwrap();
    assert_eq!(fs::read(m.path("named")).unwrap(), b"hidden");
}

#[test]
fn extended_attributes_are_set_read_listed_and_removed() {
    let m = Mounted::new();
    let f = m.path("f");
    fs::write(&f, b"").unwrap();
    let long = vec![7u8; 65536];
    sys::set_xattr(&f, "user.a", b"value").unwrap();
    sys::set_xattr(&f, "user.b", &long).unwrap();
    assert_eq!(sys::get_xattr(&f, "user.a", 100).unwrap(), b"value");
    assert_eq!(sys::get_xattr(&f, "user.a", 0).unwrap().len(), 5, "asked for the length only");
    assert_eq!(sys::get_xattr(&f, "user.a", 4), Err(libc::ERANGE));
    assert!(sys::get_xattr(&f, "user.b", 65536).unwrap() == long);
    assert_eq!(sys::list_xattr(&f).unwrap(), b"user.a\0user.b\0");
    sys::remove_xattr(&f, "user.a").unwrap();
    assert_eq!(sys::get_xattr(&f, "user.a", 100), Err(libc::ENODATA));
}

#[test]
fn rarer_operations_reach_the_handler() {
    let m = Mounted::new();
    fs::write(m.path("from"), b"0123456789").unwrap();
    let from = File::open(m.path("from")).unwrap();
    let mut to = File::options().create(true).truncate(true).read(true).write(true).open(m.path("to")).unwrap();
    assert_eq!(sys::copy_file_range(&from, &to, 10), Ok(10));
    assert!(m.fs.state.lock().seen.contains(&"copy_file_range"));
    let mut text = String::new();
    sys::lseek(&to, 0, libc::SEEK_SET).unwrap();
    to.read_to_string(&mut text).unwrap();
    assert_eq!(text, "0123456789");
    assert_eq!(sys::lseek(&to, 1, libc::SEEK_HOLE), Ok(8));
    sys::fallocate(&to, 5000).unwrap();
    assert_eq!(to.metadata().unwrap().len(), 5000);
    assert_eq!(sys::get_flags(&to), Ok(0x20));
    assert_eq!(sys::poll_for(&to, libc::POLLPRI), libc::POLLPRI);
}

#[test]
fn the_group_that_matters_for_a_new_name_is_told() {
    let m = Mounted::new();
    m.fs.state.lock().nodes.get_mut(&1).unwrap().attr.gid = 77;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sys::set_groups_of_thread(&[55, 77]);
            fs::create_dir(m.path("d")).unwrap();
        });
    });
    assert_eq!(m.fs.state.lock().mkdir_groups, [77]);
}

#[test]
fn a_covered_mount_is_not_mistaken_for_the_one_on_top() {
    let below = Mounted::new();
    fs::write(below.path("f"), b"below").unwrap();
    let spec = MountSpec::new("other", "clusterfs", below.root());
    let above = std::sync::Arc::new(Session::mount(&spec).unwrap());
    let running = above.clone();
    let server = std::thread::spawn(move || running.run(crate::memfs::MemFs::new(), 1));
    assert_eq!(below.session.unmount(UnmountMode::Detach).unwrap_err().raw_os_error(), Some(libc::EBUSY));
    assert!(below.session.is_mounted() && above.is_mounted());
    above.unmount(UnmountMode::Plain).unwrap();
    server.join().unwrap().unwrap();
    assert!(below.session.is_mounted() && !above.is_mounted());
    assert_eq!(fs::read(below.path("f")).unwrap(), b"below");
}

#[test]
fn a_forgotten_answer_is_an_error_and_not_a_hang() {
    let m = Mounted::new();
    assert_eq!(sys::stat(&m.path("unanswered")), Err(libc::EIO));
    assert_eq!(sys::stat(&m.path("other")), Err(libc::ENOENT));
}

#[test]
fn a_panicking_handler_ends_the_session_with_its_message() {
    let mut m = Mounted::new();
    assert_eq!(sys::stat(&m.path("panic")), Err(libc::EIO));
    match m.ended() {
        Err(RunError::Panicked(text)) => assert_eq!(text, "asked to panic"),
        other => panic!("{other:?}"),
    }
    assert!(!m.session.is_mounted());
    assert_eq!(m.fs.state.lock().destroyed, 1);
    assert!(matches!(m.session.run(m.fs.clone(), 1), Err(RunError::AlreadyRun)));
}

#[test]
fn unmounting_waits_for_open_files_unless_told_otherwise() {
    let m = Mounted::new();
    fs::write(m.path("f"), b"").unwrap();
    let file = File::open(m.path("f")).unwrap();
    let busy = m.session.unmount(UnmountMode::Plain).unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    drop(file);
    let fs = m.fs.clone();
    m.finish(UnmountMode::Plain).unwrap();
    assert_eq!(fs.state.lock().destroyed, 1);
}

#[test]
fn a_detached_mount_serves_its_open_files_until_they_are_closed() {
    let m = Mounted::new();
    fs::write(m.path("f"), b"still here").unwrap();
    let nodeid = m.fs.state.lock().child(1, "f");
    let mut file = File::open(m.path("f")).unwrap();
    m.notifier().inval_inode(nodeid, 0, 0).unwrap();
    m.session.unmount(UnmountMode::Detach).unwrap();
    assert_eq!(fs::read_dir(m.root()).unwrap().count(), 0, "the directory below shows again");
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    drop(file);
    m.finish(UnmountMode::Plain).unwrap();
}

#[test]
fn force_ends_even_a_connection_that_is_off_the_tree() {
    // The threads of the session are started from here and so are in the same namespace.
    sys::enter_own_mount_namespace();
    sys::mount_fusectl();
    let m = Mounted::new();
    fs::write(m.path("f"), b"data").unwrap();
    let file = File::open(m.path("f")).unwrap();
    m.session.unmount(UnmountMode::Detach).unwrap();
    m.session.unmount(UnmountMode::Force).unwrap();
    assert!(file.metadata().is_err(), "its connection is aborted");
    m.finish(UnmountMode::Plain).unwrap();
}

#[test]
fn hour_long_answers_are_believed() {
    assert_eq!(HOUR.as_secs(), 3600);
    let m = Mounted::new();
    fs::write(m.path("f"), b"").unwrap();
    for _ in 0..3 {
        sys::stat(&m.path("f")).unwrap();
        assert_eq!(sys::stat(&m.path("none")), Err(libc::ENOENT));
    }
    let s = m.fs.state.lock();
    assert_eq!((s.lookups_of("f"), s.lookups_of("none")), (1, 1));
}
