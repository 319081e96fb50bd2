//! How the demonstration looks: headings, bars, colours where a terminal shows them.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

/// The width of a bar that stands for every answer.
const BAR: usize = 20;

/// Printed text.
pub struct Page {
    colours: bool,
    step: usize,
}

impl Page {
    /// Colours only on a terminal, and not where NO_COLOR is set.
    pub fn new() -> Self {
        Self { colours: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(), step: 0 }
    }

    /// A numbered heading and what it is about.
    pub fn heading(&mut self, title: &str, about: &str) {
        self.step += 1;
        println!("\n{} {}", self.paint("1;36", &format!("{}.", self.step)), self.paint("1", title));
        for line in about.lines() {
            println!("   {}", self.paint("2", line));
        }
        println!();
    }

    /// A line of text.
    pub fn line(&self, text: &str) {
        println!("{}", format!("   {text}").trim_end());
    }

    /// A line that says that something went as it should.
    pub fn good(&self, text: &str) {
        println!("   {} {text}", self.paint("32", "✓"));
    }

    /// A command that a person may type.
    pub fn command(&self, text: &str) {
        println!("   {}", self.paint("33", text));
    }

    /// Lines of a program's output, as they are.
    pub fn block(&self, text: &str) {
        for line in text.lines() {
            println!("   {line}");
        }
    }

    /// One line a server: how often it answered.
    pub fn chart(&self, title: &str, servers: &[String], tally: &BTreeMap<String, usize>) {
        self.line(title);
        for server in servers {
            let count = tally.get(server).copied().unwrap_or(0);
            let bar = self.paint("36", &bar(count, tally.values().sum(), BAR));
            println!("     {server}  {bar} {count}");
        }
    }

    /// All servers on one line.
    pub fn row(&self, title: &str, servers: &[String], tally: &BTreeMap<String, usize>) {
        let total = tally.values().sum();
        let parts: Vec<String> = servers
            .iter()
            .map(|server| {
                let count = tally.get(server).copied().unwrap_or(0);
                format!("{server} {} {count:>3}", self.paint("36", &bar(count, total, BAR / 2)))
            })
            .collect();
        println!("   {title:<34} {}", parts.join("   "));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A bar in eighths of a character, `width` characters wide.
fn bar(count: usize, total: usize, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (count * width * 8).checked_div(total).unwrap_or(0);
    let text = "█".repeat(eighths / 8) + EIGHTHS[eighths % 8];
    format!("{text:<width$}")
}

/// A time as people say it.
pub fn time(time: Duration) -> String {
    match time.as_micros() {
        micros @ 0..1_000 => format!("{micros} µs"),
        micros @ 1_000..10_000 => format!("{}.{} ms", micros / 1000, micros / 100 % 10),
        _ if time < Duration::from_secs(1) => format!("{} ms", time.as_millis()),
        _ => format!("{:.1} s", time.as_secs_f32()),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_share() {
        assert_eq!(bar(0, 0, 4), "    ");
        assert_eq!(bar(5, 10, 4), "██  ");
        assert_eq!(bar(10, 10, 4), "████");
        assert_eq!(bar(1, 16, 4), "▎   ");
    }

    #[test]
    fn times_have_a_unit_that_fits() {
        let cases = [(42, "42 µs"), (1_250, "1.2 ms"), (25_000, "25 ms"), (3_200_000, "3.2 s")];
        for (micros, text) in cases {
            assert_eq!(time(Duration::from_micros(micros)), text);
        }
    }
}
