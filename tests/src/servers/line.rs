//! A connection that speaks in lines, as all mail protocols do.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The longest that a server may think about a command: Dovecot takes a lock file that a dead process of another host left for
/// abandoned after two minutes.
const PATIENCE: Duration = Duration::from_secs(150);

pub struct Line {
    stream: BufReader<TcpStream>,
}

pub fn unexpected(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Line {
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        let mut line = Self { stream: BufReader::new(stream) };
        line.patience(PATIENCE)?;
        Ok(line)
    }

    /// How long to wait for the next line from now on.
    pub fn patience(&mut self, time: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(time.max(Duration::from_millis(1))))
    }

    pub fn usual_patience(&mut self) -> io::Result<()> {
        self.patience(PATIENCE)
    }

    pub fn send(&mut self, line: &str) -> io::Result<()> {
        self.send_bytes(format!("{line}\r\n").as_bytes())
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// The next line, without its end.
    pub fn line(&mut self) -> io::Result<String> {
        let mut bytes = Vec::new();
        self.stream.read_until(b'\n', &mut bytes)?;
        let Some(line) = bytes.strip_suffix(b"\r\n") else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
        };
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    pub fn exactly(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// As it is sent: lines end in CRLF, one that starts with a dot gets another, a dot ends it.
pub fn to_wire(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + message.len() / 40);
    for line in message.split_inclusive(|b| *b == b'\n') {
        if line.starts_with(b".") {
            out.push(b'.');
        }
        out.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b".\r\n");
    out
}

/// As it is stored: lines end in LF.
pub fn to_stored(received: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(received.len());
    for (i, b) in received.iter().enumerate() {
        if *b != b'\r' || received.get(i + 1) != Some(&b'\n') {
            out.push(*b);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_and_stored_form() {
        assert_eq!(to_wire(b"a\n.b\n..\n"), b"a\r\n..b\r\n...\r\n.\r\n");
        assert_eq!(to_stored(b"a\r\nb\rc\r\n"), b"a\nb\rc\n");
    }
}
