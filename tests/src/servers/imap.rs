//! A client of IMAP, as much of it as the tests use.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::line::{Line, to_stored, unexpected};

pub struct Imap {
    line: Line,
    tag: u32,
}

/// What SELECT says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selected {
    pub exists: u32,
    pub uid_validity: u32,
    pub uid_next: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub uid: u32,
    /// Without \Recent, which is each session's own.
    pub flags: BTreeSet<String>,
    /// What was asked for: the whole message or its Message-ID header; LF line ends.
    pub bytes: Vec<u8>,
}

/// One untagged answer: its text, and the literal in it.
struct Answer {
    text: String,
    literal: Option<Vec<u8>>,
}

impl Imap {
    pub fn login(to: SocketAddr, user: &str) -> io::Result<Self> {
        let mut i = Self { line: Line::connect(to)?, tag: 0 };
        let greeting = i.line.line()?;
        if !greeting.starts_with("* OK") {
            return Err(unexpected(greeting));
        }
        i.command(&format!("LOGIN {user} secret"))?;
        Ok(i)
    }

    /// Runs a command to its end; an answer other than OK is an error.
    pub fn run(&mut self, text: &str) -> io::Result<()> {
        self.command(text).map(drop)
    }

    pub fn create(&mut self, mailbox: &str) -> io::Result<()> {
        self.run(&format!("CREATE {mailbox}"))
    }

    pub fn select(&mut self, mailbox: &str) -> io::Result<Selected> {
        let mut s = Selected::default();
        for a in self.command(&format!("SELECT {mailbox}"))? {
            let mut words = a.text.split([' ', '[', ']']).filter(|w| !w.is_empty());
            match (words.next(), words.next(), words.next()) {
                (Some(n), Some("EXISTS"), _) => s.exists = number(n)?,
                (Some("OK"), Some("UIDVALIDITY"), Some(n)) => s.uid_validity = number(n)?,
                (Some("OK"), Some("UIDNEXT"), Some(n)) => s.uid_next = number(n)?,
                _ => {}
            }
        }
        Ok(s)
    }

    /// All messages, whole.
    pub fn fetch_all(&mut self) -> io::Result<Vec<Fetched>> {
        self.fetch("1:*", "BODY.PEEK[]")
    }

    /// All messages, only their Message-ID headers.
    pub fn fetch_ids(&mut self) -> io::Result<Vec<Fetched>> {
        self.fetch("1:*", "BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)]")
    }

    fn fetch(&mut self, uids: &str, what: &str) -> io::Result<Vec<Fetched>> {
        let answers = self.command(&format!("UID FETCH {uids} (UID FLAGS {what})"))?;
        // Others' changes of flags come as FETCH answers without the message.
        answers.into_iter().filter(|a| a.text.contains(" FETCH (")).filter_map(|a| fetched(a).transpose()).collect()
    }

    pub fn add_flags(&mut self, uid: u32, flags: &str) -> io::Result<()> {
        self.run(&format!("UID STORE {uid} +FLAGS.SILENT ({flags})"))
    }

    pub fn move_to(&mut self, uid: u32, mailbox: &str) -> io::Result<()> {
        self.run(&format!("UID MOVE {uid} {mailbox}"))
    }

    /// Whether the message is gone: UID EXPUNGE removes it only if its flag \Deleted is still there.
    pub fn expunge(&mut self, uid: u32) -> io::Result<bool> {
        self.add_flags(uid, "\\Deleted")?;
        self.run(&format!("UID EXPUNGE {uid}"))?;
        let found = self.command(&format!("UID SEARCH UID {uid}"))?;
        let line = found.iter().find_map(|a| a.text.strip_prefix("SEARCH")).ok_or_else(|| unexpected("no SEARCH"))?;
        Ok(line.trim().is_empty())
    }

    /// Waits in IDLE until there are at least `exists` messages; returns how many there are then, or last were.
    pub fn idle_until(&mut self, exists: u32, time: Duration) -> io::Result<u32> {
        self.tag += 1;
        let tag = self.tag;
        self.line.send(&format!("a{tag} IDLE"))?;
        let deadline = Instant::now() + time;
        let (mut count, mut begun) = (0, false);
        while count < exists || !begun {
            self.line.patience(deadline.saturating_duration_since(Instant::now()))?;
            match self.line.line() {
                Ok(l) if l.starts_with('+') => begun = true,
                Ok(l) => {
                    if let Some(n) = l.strip_prefix("* ").and_then(|l| l.strip_suffix(" EXISTS")) {
                        count = number(n)?;
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => break,
                Err(e) => return Err(e),
            }
        }
        self.line.usual_patience()?;
        self.line.send("DONE")?;
        for a in self.answers(tag)? {
            if let Some(n) = a.text.strip_suffix(" EXISTS") {
                count = number(n)?;
            }
        }
        Ok(count)
    }

    fn command(&mut self, text: &str) -> io::Result<Vec<Answer>> {
        self.tag += 1;
        self.line.send(&format!("a{} {text}", self.tag))?;
        self.answers(self.tag).map_err(|e| io::Error::new(e.kind(), format!("{text}: {e}")))
    }

    fn answers(&mut self, tag: u32) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::new();
        let end = format!("a{tag} ");
        loop {
            let mut text = self.line.line()?;
            if let Some(status) = text.strip_prefix(&end) {
                return if status.starts_with("OK") { Ok(answers) } else { Err(unexpected(status)) };
            }
            let mut literal = None;
            while let Some(len) = literal_length(&text) {
                literal = Some(self.line.exactly(len)?);
                text = text[..text.rfind('{').unwrap_or(text.len())].to_owned() + &self.line.line()?;
            }
            match text.strip_prefix("* ") {
                Some(rest) => answers.push(Answer { text: rest.to_owned(), literal }),
                // IDLE begins, when nobody waits for it any more.
                None if text.starts_with('+') => {}
                None => return Err(unexpected(text)),
            }
        }
    }
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(|_| unexpected(format!("not a number: {text}")))
}

fn literal_length(line: &str) -> Option<usize> {
    line.strip_suffix('}')?.rsplit_once('{')?.1.parse().ok()
}

fn fetched(a: Answer) -> io::Result<Option<Fetched>> {
    let Some(bytes) = a.literal else { return Ok(None) };
    let bad = || unexpected(format!("not understood: {}", a.text));
    let after = |word: &str| a.text.split_once(word).map(|(_, rest)| rest);
    let uid = after("UID ").and_then(|r| r.split([' ', ')']).next()).ok_or_else(bad)?;
    let flags = after("FLAGS (").and_then(|r| r.split(')').next()).ok_or_else(bad)?;
    let flags = flags.split_whitespace().filter(|f| *f != "\\Recent").map(str::to_owned).collect();
    Ok(Some(Fetched { uid: number(uid)?, flags, bytes: to_stored(&bytes) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_answer_is_taken_apart() {
        let text = "3 FETCH (UID 17 FLAGS (\\Seen \\Recent work) BODY[] )".to_owned();
        let f =
            fetched(Answer { text, literal: Some(b"a\r\nb".to_vec()) }).expect("is well formed").expect("has a body");
        assert_eq!((f.uid, f.bytes), (17, b"a\nb".to_vec()));
        assert_eq!(f.flags, ["\\Seen", "work"].map(str::to_owned).into());
        assert_eq!(literal_length("* 3 FETCH (BODY[] {120}"), Some(120));
        assert_eq!(literal_length("* OK {no} number}"), None);
    }
}
