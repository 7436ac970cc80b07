//! clusterfs-hold DIR COUNT: makes a directory and files in it, holds each of them open five times, every second one without
//! its name, and says so; once its input ends it looks whether they are as they were. A process of the test of many open
//! files.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Open files of each file.
const OPENS: u64 = 5;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, count] = &args[..] else { panic!("usage: clusterfs-hold DIR COUNT") };
    let (dir, count): (&Path, u64) = (Path::new(dir), count.parse().expect("a number of files"));
    let limit = libc::rlimit { rlim_cur: OPENS * count + 100, rlim_max: OPENS * count + 100 };
    // SAFETY: only numbers.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0, "{}", std::io::Error::last_os_error());
    fs::create_dir(dir).expect("the directory is made");
    let mut open: Vec<File> = Vec::new();
    for i in 0..count {
        let path = dir.join(i.to_string());
        let f = File::options().read(true).write(true).create_new(true).open(&path).expect("a file is made");
        f.write_all_at(&i.to_le_bytes(), 0).expect("it is written");
        open.push(f);
        open.extend((1..OPENS).map(|_| File::open(&path).expect("it is opened again")));
        if i % 2 == 1 {
            fs::remove_file(path).expect("its name is removed");
        }
    }
    println!("open");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("input ends");
    for (i, f) in open.iter().enumerate() {
        let mut got = [0; 8];
        f.read_exact_at(&mut got, 0).expect("it is still there");
        assert_eq!(u64::from_le_bytes(got), i as u64 / OPENS);
    }
}
