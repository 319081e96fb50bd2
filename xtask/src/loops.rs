//! Whether kernels that look closer at loops take the programs. In: the disassembled object. Out: loops that they refuse.
//!
//! Linux 6.1 (`check_cfg` in `kernel/bpf/verifier.c`) follows instructions depth first, what comes next before where a jump leads, and
//! takes an edge back to one that it is still following only from a jump: where an instruction that doesn't jump runs into the
//! beginning of its own loop, it says `back-edge` and refuses the program. Newer kernels take it, so that an object may load here and be
//! refused there; which it is depends on how the compiler orders blocks. `core::hint::cold_path` moves the way back to the end.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// Operation codes, from `include/uapi/linux/bpf.h`.
const CLASS: u8 = 0x07;
const CLASS_JMP: u8 = 0x05;
const CLASS_JMP32: u8 = 0x06;
const OPERATION: u8 = 0xf0;
const JA: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;

/// A function's instructions by number. Those that take the room of two have one entry.
type Function = BTreeMap<i64, [u8; 8]>;

/// What is known of an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is being followed.
    Open,
    /// All that comes after it has been followed.
    Done,
}

/// Loops that Linux 6.1 refuses, in words, from what `llvm-objdump --disassemble` prints.
pub fn refused(text: &str) -> Result<Vec<String>> {
    let mut refused = Vec::new();
    for (name, function) in parse(text)? {
        refused.extend(back_edges(&function).into_iter().map(|(from, to)| format!("{name}: from {from} to {to}")));
    }
    Ok(refused)
}

fn parse(text: &str) -> Result<Vec<(String, Function)>> {
    let mut functions: Vec<(String, Function)> = Vec::new();
    for line in text.lines() {
        if let Some((_, name)) = line.strip_suffix(">:").and_then(|line| line.split_once(" <")) {
            functions.push((name.to_owned(), Function::new()));
        } else if let Some((number, rest)) = line.split_once(":\t")
            && let Ok(number) = number.trim().parse()
            && let Some((_, function)) = functions.last_mut()
        {
            let bytes: Vec<u8> =
                rest.split_whitespace().map_while(|byte| u8::from_str_radix(byte, 16).ok()).take(8).collect();
            let bytes = bytes.try_into().ok().with_context(|| format!("no instruction in {line}"))?;
            function.insert(number, bytes);
        }
    }
    Ok(functions)
}

/// Edges by which an instruction that is no jump runs into one that is being followed.
fn back_edges(function: &Function) -> Vec<(i64, i64)> {
    let mut found = Vec::new();
    let mut states = BTreeMap::new();
    let Some((first, _)) = function.first_key_value() else { return found };
    // An instruction with the edges that are still to be followed, the next one last.
    let mut open = vec![(*first, edges(function, *first))];
    states.insert(*first, State::Open);
    while let Some((at, left)) = open.last_mut() {
        let at = *at;
        let Some((to, is_jump)) = left.pop() else {
            states.insert(at, State::Done);
            open.pop();
            continue;
        };
        match states.get(&to) {
            None if function.contains_key(&to) => {
                states.insert(to, State::Open);
                open.push((to, edges(function, to)));
            }
            Some(State::Open) if !is_jump => found.push((at, to)),
            None | Some(_) => {}
        }
    }
    found
}

/// Where an instruction leads, in the opposite of the kernel's order, and whether it jumps there.
fn edges(function: &Function, at: i64) -> Vec<(i64, bool)> {
    let Some(bytes) = function.get(&at) else { return Vec::new() };
    let next = function.range(at + 1..).next().map_or(at + 1, |(next, _)| *next);
    let [code, _, offset @ ..] = bytes;
    let near = at + 1 + i64::from(i16::from_le_bytes([offset[0], offset[1]]));
    let far = at + 1 + i64::from(i32::from_le_bytes([offset[2], offset[3], offset[4], offset[5]]));
    match (code & CLASS, code & OPERATION) {
        (CLASS_JMP | CLASS_JMP32, EXIT) => Vec::new(),
        (CLASS_JMP, JA) => vec![(near, true)],
        (CLASS_JMP32, JA) => vec![(far, true)],
        // What is called is a function of its own here, and has no way back.
        (CLASS_JMP | CLASS_JMP32, CALL) => vec![(next, false)],
        (CLASS_JMP | CLASS_JMP32, _) => vec![(near, true), (next, true)],
        _ => vec![(next, false)],
    }
}

#[cfg(test)]
mod tests {
    use super::refused;

    #[test]
    fn a_loop_is_refused_where_its_end_runs_into_its_beginning() {
        let lines = |lines: &[&str]| {
            let numbered = lines.iter().enumerate().map(|(number, line)| format!("       {number}:\t{line}\n"));
            format!("0000000000000000 <ingress>:\n{}", numbered.collect::<String>())
        };
        let (jump, mov, exit) = ("05 00", "b7 01 00 00 00 00 00 00\tr1 = 0x0", "95 00 00 00 00 00 00 00\texit");
        let to = |offset: &str| format!("{jump} {offset} 00 00 00 00\tgoto");
        let unless = |offset: &str| format!("15 01 {offset} 00 00 00 00\tif r1 == 0x0 goto");
        // 0: goto 2; 1: r1 = 0; 2: if r1 == 0 goto 1; 3: exit
        let entered_in_the_middle = lines(&[&to("01 00"), mov, &unless("fe ff"), exit]);
        assert_eq!(refused(&entered_in_the_middle).unwrap(), ["ingress: from 1 to 2"]);
        // 0: r1 = 0; 1: if r1 == 0 goto 0; 2: exit
        let with_a_jump_at_its_end = lines(&[mov, &unless("fe ff"), exit]);
        assert_eq!(refused(&with_a_jump_at_its_end).unwrap(), [""; 0]);
        // 0: if r1 == 0 goto 2; 1: exit; 2: r1 = 0; 3: goto 0
        let with_its_way_back_at_the_end = lines(&[&unless("01 00"), exit, mov, &to("fc ff")]);
        assert_eq!(refused(&with_its_way_back_at_the_end).unwrap(), [""; 0]);
    }
}
