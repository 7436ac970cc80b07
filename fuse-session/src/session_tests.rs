//! The race of an INTERRUPT with its own request, acted out step by step: it is too narrow to be met by chance.
//! Needs root and /dev/fuse.

use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::*;
use crate::types::Attr;

struct Nothing;

impl Handler for Nothing {
    fn init(&self, _: &InitRequest) -> InitConfig {
        InitConfig::default()
    }

    fn request(&self, _: Request, reply: Reply) {
        reply.err(libc::ENOSYS);
    }

    fn forget(&self, _: Vec<Forget>) {}
}

/// Reads the next message and gives its header, the buffer still holding it.
fn next(device: &Device, buffer: &mut ReceiveBuffer) -> (InHeader, usize) {
    let len = receive(device, buffer).unwrap().expect("unmounted, probably by the watchdog");
    (InHeader::decode(buffer.message(len)).unwrap(), len)
}

#[test]
fn an_interrupt_that_overtakes_its_request_is_repeated_across_descriptors() {
    extern "C" fn ignore(_: i32) {}
    // SAFETY: an all-zero sigaction is valid, and the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
    let dir = tempfile::tempdir().unwrap();
    let session = Session::mount(&MountSpec::new("none", "clusterfs", dir.path())).unwrap();
    let (negotiated, _) = session.initialize(&Nothing).unwrap().unwrap();
    let devices = [session.device.clone(), Arc::new(session.device.try_clone().unwrap())];
    let readers = Readers {
        handler: &Nothing,
        devices: &devices,
        pool: Pool::new(negotiated.max_write, 4),
        dialect: Dialect::default(),
        mount: &session.mount,
    };
    let [first, second] = &devices;
    let second_channel: Arc<dyn Channel> = second.clone();
    let mut buffer = readers.pool.take();
    let (tell, told) = channel();
    let (alive, ended) = channel::<()>();
    std::thread::scope(|scope| {
        let session = &session;
        scope.spawn(move || {
            if ended.recv_timeout(Duration::from_secs(10)) == Err(RecvTimeoutError::Timeout) {
                session.unmount(UnmountMode::Force).unwrap();
            }
        });
        // Moved in, so that a failed assertion ends the watchdog as well.
        let alive = alive;
        let path = std::ffi::CString::new(dir.path().join("x").as_os_str().as_bytes()).unwrap();
        let caller = scope.spawn(move || {
            // SAFETY: plain calls with live arguments.
            unsafe {
                tell.send(libc::pthread_self()).unwrap();
                let rc = libc::access(path.as_ptr(), libc::F_OK);
                (rc, io::Error::last_os_error().raw_os_error())
            }
        });
        let thread = told.recv().unwrap();

        // The request is read from the first descriptor, but its reader has not got round to registering it.
        let lookup = loop {
            let (header, _) = next(first, &mut buffer);
            if header.opcode == abi::LOOKUP {
                break header;
            }
            assert_eq!(header.opcode, abi::GETATTR);
            let attr = Attr { ino: 1, mode: libc::S_IFDIR | 0o755, nlink: 2, ..Attr::default() };
            Reply::new(header.unique, header.opcode, first.clone()).attr(Duration::from_secs(60), &attr);
        };
        // SAFETY: the thread waits for an answer that has not been given.
        unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };

        // Another reader gets the interrupt, does not know its request, and the kernel repeats it.
        for _ in 0..3 {
            let (header, len) = next(second, &mut buffer);
            assert_eq!(header.opcode, abi::INTERRUPT);
            readers.dispatch(&second_channel, &mut buffer, len);
        }

        // Now the request is registered: the repeated interrupt reaches it.
        first.interrupts().register(lookup.unique, None);
        let reply = Reply::new(lookup.unique, lookup.opcode, first.clone());
        let called = Arc::new(AtomicBool::new(false));
        let flag = called.clone();
        reply.on_interrupt(move || flag.store(true, Ordering::SeqCst));
        let (header, len) = next(second, &mut buffer);
        assert_eq!(header.opcode, abi::INTERRUPT);
        assert!(!called.load(Ordering::SeqCst));
        readers.dispatch(&second_channel, &mut buffer, len);
        assert!(called.load(Ordering::SeqCst));
        assert!(reply.err(libc::EINTR));
        assert_eq!(caller.join().unwrap(), (-1, Some(libc::EINTR)));

        // An interrupt of an answered request is not asked for again: no descriptor knows it.
        assert!(!readers.retry_interrupt(lookup.unique | 1));
        drop(alive);
    });
}
