//! Medians as JSON, as a table of Markdown and as a plot.

use std::fmt::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::io::Io;
use super::{Figures, Measured, scenarios};
use crate::cluster::Result;

/// A run: where and when, and what came of it.
#[derive(Serialize, Deserialize)]
pub struct Run {
    /// Processors, memory and kernel of the host.
    pub host: String,
    /// Its load average of a minute, before and after; of several runs, the least and the greatest.
    pub load: (f64, f64),
    pub scale: String,
    pub rounds: usize,
    pub results: Vec<Line>,
}

impl Run {
    /// More scenarios, measured alike.
    pub fn add(&mut self, other: Run) -> Result<()> {
        let alike = (&self.host, &self.scale, self.rounds) == (&other.host, &other.scale, other.rounds);
        if !alike {
            return Err("another host, scale or number of rounds".into());
        }
        let loads = [self.load.0, self.load.1, other.load.0, other.load.1];
        self.load = (loads.iter().fold(f64::INFINITY, |a, b| a.min(*b)), loads.iter().fold(0.0, |a, b| a.max(*b)));
        self.results.extend(other.results);
        Ok(())
    }
}

/// The medians of one scenario in one place. Times are milliseconds, input and output is per thing counted.
#[derive(Serialize, Deserialize, Clone)]
pub struct Line {
    pub scenario: String,
    pub place: String,
    pub nodes: usize,
    pub unit: String,
    pub per_second: f64,
    /// The slowest and the fastest round.
    pub slowest: f64,
    pub fastest: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub io: Io,
}

fn median(rounds: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    let mut all: Vec<f64> = rounds.iter().map(of).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(0.0)
}

pub fn line(m: &Measured) -> Line {
    let rates = || m.rounds.iter().map(|r| r.rate);
    Line {
        scenario: m.scenario.name.into(),
        place: m.place.clone(),
        nodes: m.nodes,
        unit: m.scenario.unit.into(),
        per_second: median(&m.rounds, |r| r.rate),
        slowest: rates().fold(f64::INFINITY, f64::min),
        fastest: rates().fold(0.0, f64::max),
        p50_ms: median(&m.rounds, |r| r.p50),
        p99_ms: median(&m.rounds, |r| r.p99),
        io: Io {
            reads: median(&m.rounds, |r| r.io.reads),
            writes: median(&m.rounds, |r| r.io.writes),
            flushes: median(&m.rounds, |r| r.io.flushes),
            compare_and_writes: median(&m.rounds, |r| r.io.compare_and_writes),
            bytes_read: median(&m.rounds, |r| r.io.bytes_read),
            bytes_written: median(&m.rounds, |r| r.io.bytes_written),
        },
    }
}

/// Three significant digits.
fn short(v: f64) -> String {
    match v.abs() {
        a if a < 0.0005 => "0".into(),
        a if a < 1.0 => format!("{v:.3}"),
        a if a < 10.0 => format!("{v:.2}"),
        a if a < 100.0 => format!("{v:.1}"),
        _ => format!("{v:.0}"),
    }
}

pub fn table(run: &Run) -> String {
    let (low, high) = run.load;
    let mut out = format!(
        "{}, load average {low} to {high}; scale {}, {} interleaved rounds.\n\n",
        run.host, run.scale, run.rounds
    );
    out += "| scenario | on | nodes | per second | slowest-fastest | p50, p99 ms | reads | writes | flushes | caw | KiB read | KiB written |\n";
    out += "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n";
    let mut last = "";
    for l in &run.results {
        let name = if l.scenario == last { "" } else { &l.scenario };
        last = &l.scenario;
        let times = if l.p50_ms > 0.0 { format!("{}, {}", short(l.p50_ms), short(l.p99_ms)) } else { String::new() };
        let _ = writeln!(
            out,
            "| {name} | {} | {} | {} {} | {}-{} | {times} | {} | {} | {} | {} | {} | {} |",
            l.place,
            l.nodes,
            short(l.per_second),
            l.unit,
            short(l.slowest),
            short(l.fastest),
            short(l.io.reads),
            short(l.io.writes),
            short(l.io.flushes),
            short(l.io.compare_and_writes),
            short(l.io.bytes_read / 1024.0),
            short(l.io.bytes_written / 1024.0),
        );
    }
    out
}

/// What the scenarios do and what limits them, for those that were run.
pub fn legend(run: &Run) -> String {
    let mut out = String::from("| scenario | what | limited by |\n|---|---|---|\n");
    for s in scenarios::all().filter(|s| run.results.iter().any(|l| l.scenario == s.name)) {
        let _ = writeln!(out, "| {} | {} | {} |", s.name, s.about, s.limits);
    }
    out
}

/// Rates as bars, for each scenario relative to the highest in it.
pub fn plot(run: &Run) -> String {
    const ROW: usize = 16;
    const LEFT: usize = 330;
    const WIDTH: f64 = 420.0;
    let mut bars = String::new();
    for (row, l) in run.results.iter().enumerate() {
        let highest =
            run.results.iter().filter(|o| o.scenario == l.scenario).fold(0.0, |m: f64, o| m.max(o.per_second));
        let first = row == 0 || run.results[row - 1].scenario != l.scenario;
        let (y, width) = (row * ROW, WIDTH * l.per_second / highest.max(f64::MIN_POSITIVE));
        let colour = if l.place.starts_with("clusterfs") { "#2a6fb0" } else { "#999999" };
        let on = if l.nodes == 1 { l.place.clone() } else { format!("{} x{}", l.place, l.nodes) };
        if first {
            let _ = writeln!(bars, "<text x='4' y='{}' font-weight='bold'>{}</text>", y + 12, l.scenario);
        }
        let _ = writeln!(bars, "<text x='{}' y='{}' text-anchor='end'>{on}</text>", LEFT - 6, y + 12);
        let _ =
            writeln!(bars, "<rect x='{LEFT}' y='{}' width='{width:.1}' height='{}' fill='{colour}'/>", y + 2, ROW - 4);
        let (rate, x) = (short(l.per_second), LEFT as f64 + width + 4.0);
        let _ = writeln!(bars, "<text x='{x:.1}' y='{}'>{rate} {}/s</text>", y + 12, l.unit);
    }
    let (width, height) = (LEFT + WIDTH as usize + 150, run.results.len() * ROW + 4);
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-family='sans-serif' font-size='11'>\n\
         <rect width='100%' height='100%' fill='white'/>\n{bars}</svg>\n"
    )
}

const BEGIN: &str = "<!-- measured: cargo xtask bench run --doc -->\n";
const END: &str = "<!-- end of what was measured -->\n";

/// Puts the figures into a document, between the two comments that mark their place, and the plot beside it.
pub fn into_document(run: &Run, document: &Path) -> Result<()> {
    let text = std::fs::read_to_string(document)?;
    let parts = text.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let (head, tail) = parts.ok_or_else(|| format!("{}: no place for figures: {BEGIN}", document.display()))?;
    let picture = document.with_extension("svg");
    let name = picture.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let figures = format!("{}\n{}\n![Rates]({name})\n\n", table(run), legend(run));
    std::fs::write(document, format!("{head}{BEGIN}\n{figures}{END}{tail}"))?;
    Ok(std::fs::write(&picture, plot(run))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        let scenario = scenarios::all().next().unwrap();
        let round = |rate| Figures { rate, p50: 1.0, p99: 2.0, io: Io { writes: rate, ..Io::default() } };
        let m = Measured { scenario, place: "ext4".into(), nodes: 1, rounds: [30.0, 10.0, 20.0].map(round).to_vec() };
        Run { host: "a host".into(), load: (0.5, 2.0), scale: "quick".into(), rounds: 3, results: vec![line(&m)] }
    }

    #[test]
    fn a_line_has_the_medians_and_the_range() {
        let l = &run().results[0];
        assert_eq!((l.per_second, l.slowest, l.fastest, l.io.writes), (20.0, 10.0, 30.0, 20.0));
        assert!(table(&run()).contains("| ext4 | 1 | 20.0 messages | 10.0-30.0 | 1.00, 2.00 |"), "{}", table(&run()));
        assert!(plot(&run()).contains("20.0 messages/s"));
    }

    #[test]
    fn runs_are_joined_if_they_are_alike() {
        let mut all = run();
        all.add(Run { load: (0.1, 1.0), ..run() }).unwrap();
        assert_eq!((all.load, all.results.len()), ((0.1, 2.0), 2));
        assert!(all.add(Run { rounds: 7, ..run() }).is_err());
    }

    #[test]
    fn figures_replace_the_former_ones_in_a_document() {
        let dir = tempfile::tempdir().unwrap();
        let document = dir.path().join("doc.md");
        std::fs::write(&document, "nothing").unwrap();
        assert!(into_document(&run(), &document).is_err());
        std::fs::write(&document, format!("head\n{BEGIN}old\n{END}tail\n")).unwrap();
        into_document(&run(), &document).unwrap();
        into_document(&run(), &document).unwrap();
        let text = std::fs::read_to_string(&document).unwrap();
        assert!(text.starts_with("head\n") && text.ends_with("tail\n") && !text.contains("old"), "{text}");
        assert_eq!(text.matches("| ext4 |").count(), 1);
        assert!(dir.path().join("doc.svg").exists());
    }
}
