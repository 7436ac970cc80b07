//! A client of POP3.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use super::line::{Line, unexpected};

pub struct Pop3 {
    line: Line,
}

impl Pop3 {
    pub fn login(to: SocketAddr, user: &str) -> io::Result<Self> {
        let mut p = Self { line: Line::connect(to)? };
        p.reply()?;
        p.command(&format!("USER {user}"))?;
        p.command("PASS secret")?;
        Ok(p)
    }

    /// Numbers and unique ids of all messages.
    pub fn unique_ids(&mut self) -> io::Result<BTreeMap<u32, String>> {
        self.command("UIDL")?;
        let bad = |l: &str| unexpected(format!("not a line of UIDL: {l}"));
        self.lines()?
            .iter()
            .map(|l| {
                let (number, id) = l.split_once(' ').ok_or_else(|| bad(l))?;
                Ok((number.parse().map_err(|_| bad(l))?, id.to_owned()))
            })
            .collect()
    }

    /// The message with LF line ends.
    pub fn retrieve(&mut self, number: u32) -> io::Result<Vec<u8>> {
        self.command(&format!("RETR {number}"))?;
        Ok(self.lines()?.into_iter().flat_map(|l| (l + "\n").into_bytes()).collect())
    }

    pub fn delete(&mut self, number: u32) -> io::Result<()> {
        self.command(&format!("DELE {number}"))
    }

    /// Deletions take effect.
    pub fn quit(mut self) -> io::Result<()> {
        self.command("QUIT")
    }

    fn lines(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            let line = self.line.line()?;
            match line.strip_prefix('.') {
                Some("") => return Ok(lines),
                Some(rest) => lines.push(rest.to_owned()),
                None => lines.push(line),
            }
        }
    }

    fn command(&mut self, text: &str) -> io::Result<()> {
        self.line.send(text)?;
        self.reply()
    }

    fn reply(&mut self) -> io::Result<()> {
        let line = self.line.line()?;
        if line.starts_with("+OK") { Ok(()) } else { Err(unexpected(line)) }
    }
}
