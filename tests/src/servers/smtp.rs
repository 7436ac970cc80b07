//! A client of SMTP (to Postfix) and LMTP (to Dovecot).

use std::io;
use std::net::SocketAddr;

use super::line::{Line, to_wire, unexpected};
use crate::mail::Message;

pub struct Smtp {
    line: Line,
}

impl Smtp {
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        Self::greet(to, "EHLO")
    }

    pub fn connect_lmtp(to: SocketAddr) -> io::Result<Self> {
        Self::greet(to, "LHLO")
    }

    fn greet(to: SocketAddr, hello: &str) -> io::Result<Self> {
        let mut s = Self { line: Line::connect(to)? };
        s.reply('2')?;
        s.command(&format!("{hello} client.example"), '2')?;
        Ok(s)
    }

    /// Once this returns well, the server has taken responsibility for the message. For one recipient: LMTP answers the
    /// message once for each.
    pub fn send(&mut self, message: &Message, to: &str) -> io::Result<()> {
        self.command(&format!("MAIL FROM:<{}> BODY=8BITMIME", message.from), '2')?;
        self.command(&format!("RCPT TO:<{to}>"), '2')?;
        self.command("DATA", '3')?;
        self.line.send_bytes(&to_wire(&message.bytes))?;
        self.reply('2')
    }

    fn command(&mut self, text: &str, expected: char) -> io::Result<()> {
        self.line.send(text)?;
        self.reply(expected)
    }

    fn reply(&mut self, expected: char) -> io::Result<()> {
        loop {
            let line = self.line.line()?;
            // "250-" has more lines to come.
            if line.as_bytes().get(3) == Some(&b'-') {
                continue;
            }
            return if line.starts_with(expected) { Ok(()) } else { Err(unexpected(line)) };
        }
    }
}
