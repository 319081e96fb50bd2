//! The ports that masquerading takes, kept from the host's own choice of source ports.
//!
//! In: a range of ports, `net.ipv4.ip_local_reserved_ports` of this network namespace. Out: the range among the reserved ones,
//! and a mark for each piece that was not there before: `cleanup` takes away these and no other. (One list for both families.)

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use anyhow::{Context as _, Result};

use super::folder;

const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// More than 65,536 ports can need when every second one is in the list.
const LONGEST: usize = 256 << 10;

/// Ports from the first to the last.
type Range = (u16, u16);

/// Reserves the ports, and gives back those that an earlier start reserved and nobody wants any more.
pub fn reserve(marks: &Path, first: u32, ports: u32) -> Result<()> {
    let last = first.saturating_add(ports).saturating_sub(1);
    let wanted = (u16::try_from(first)?, u16::try_from(last)?);
    let old = marked(marks)?;
    let there = read().with_context(|| format!("cannot read {RESERVED}"))?;
    let added: Vec<Range> = without(&[wanted], &there);
    let stale = without(&old, &[wanted]);
    let after = merged(&[without(&there, &stale), added.clone()].concat());
    // The marks first: what is reserved without one would stay for good.
    for range in &added {
        let mark = marks.join(name(*range));
        fs::create_dir_all(&mark).with_context(|| format!("cannot make {}", mark.display()))?;
    }
    if after != there
        && let Err(error) = write(&after)
    {
        // Who reserves them by other means keeps them.
        added.iter().try_for_each(|range| unmark(marks, *range))?;
        return Err(error);
    }
    for range in old.iter().filter(|(first, last)| *last < wanted.0 || *first > wanted.1) {
        unmark(marks, *range)?;
    }
    Ok(())
}

/// Gives back what was reserved by [`reserve`], and removes the marks.
pub fn release(marks: &Path) -> Result<()> {
    let ours = marked(marks)?;
    if ours.is_empty() {
        return Ok(());
    }
    let there = read().with_context(|| format!("cannot read {RESERVED}"))?;
    let after = without(&there, &ours);
    if after != there {
        write(&after)?;
    }
    ours.into_iter().try_for_each(|range| unmark(marks, range))
}

/// Names within bpffs have no dots; these need none.
fn name((first, last): Range) -> String {
    format!("{first}-{last}")
}

fn marked(marks: &Path) -> Result<Vec<Range>> {
    Ok(folder::names(marks)?.iter().flat_map(|name| parse(name)).collect())
}

fn unmark(marks: &Path, range: Range) -> Result<()> {
    let mark = marks.join(name(range));
    fs::remove_dir(&mark).with_context(|| format!("cannot remove {}", mark.display()))
}

/// The whole list: the kernel gives all of it to the first read(2) and nothing to the second.
fn read() -> io::Result<Vec<Range>> {
    let mut buffer = vec![0; LONGEST];
    let length = File::open(RESERVED)?.read(&mut buffer)?;
    Ok(parse(&String::from_utf8_lossy(buffer.get(..length).unwrap_or_default())))
}

fn write(ranges: &[Range]) -> Result<()> {
    // An empty line means no ports.
    let text = ranges.iter().map(|range| name(*range)).collect::<Vec<_>>().join(",") + "\n";
    fs::write(RESERVED, text).with_context(|| format!("cannot write {RESERVED}"))
}

/// Reads `1-3,7`. What is not like that is not there.
fn parse(text: &str) -> Vec<Range> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    merged(&text.split(',').filter_map(range).collect::<Vec<_>>())
}

/// The same ports in order, neighbours joined, as the kernel writes them.
fn merged(ranges: &[Range]) -> Vec<Range> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut result: Vec<Range> = Vec::new();
    for (first, last) in sorted {
        match result.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            Some(_) | None => result.push((first, last)),
        }
    }
    result
}

/// The ports of `ranges` that are not in `others`.
fn without(ranges: &[Range], others: &[Range]) -> Vec<Range> {
    let mut rest = merged(ranges);
    for (first, last) in others {
        let cut = |(from, to): Range| {
            let below = (from < *first).then(|| (from, to.min(first.saturating_sub(1))));
            let above = (to > *last).then(|| (from.max(last.saturating_add(1)), to));
            below.into_iter().chain(above)
        };
        rest = rest.into_iter().flat_map(cut).collect();
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_added_and_taken_away_and_the_others_stay() {
        for (there, ours, together, alone) in [
            ("", "61000-65095", "61000-65095", "61000-65095"),
            ("80,30000-32767", "61000-61999", "80,30000-32767,61000-61999", "61000-61999"),
            ("61500,65000-65535", "61000-65095", "61000-65535", "61000-61499,61501-64999"),
            ("1-65535", "61000-65095", "1-65535", ""),
            ("60000-60999", "61000-61001", "60000-61001", "61000-61001"),
        ] {
            let (there, ours) = (parse(there), parse(ours));
            let added = without(&ours, &there);
            assert_eq!(added, parse(alone), "{there:?}");
            let after = merged(&[there.clone(), added.clone()].concat());
            assert_eq!(after, parse(together), "{there:?}");
            assert_eq!(without(&after, &added), there);
        }
    }

    #[test]
    fn cutting_leaves_both_sides() {
        for (other, rest) in [((1, 9), "10-20"), ((12, 13), "10-11,14-20"), ((20, 65535), "10-19"), ((0, 65535), "")] {
            assert_eq!(without(&[(10, 20)], &[other]), parse(rest), "{other:?}");
        }
    }
}
