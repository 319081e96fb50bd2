//! How deep the programs' stacks get, by the count of older kernels. In: the disassembled object. Out: the deepest chain of calls of each
//! program. The kernel allows 512 bytes for a chain; Linux before 6.7 rounds each frame in it up to 32 bytes, newer ones to 16, so that an object
//! may load here and be refused there.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// What the kernel allows for a chain of calls.
pub const LIMIT: u64 = 512;

/// What each frame is rounded up to.
const ROUNDED_TO: u64 = 32;

/// A chain of calls and its size.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    /// Bytes of stack.
    pub bytes: u64,
    /// Functions with their own bytes, outermost first.
    pub functions: Vec<(String, u64)>,
}

#[derive(Default)]
struct Function {
    depth: u64,
    calls: Vec<Call>,
}

/// A call: where it is, the number in the instruction, the symbol of its relocation.
struct Call {
    at: i64,
    number: i64,
    symbol: Option<String>,
}

/// The deepest chain of calls, from what `llvm-objdump --disassemble --reloc` prints.
pub fn deepest(text: &str) -> Result<Chain> {
    let (functions, places) = parse(text)?;
    let mut chains = Vec::new();
    for ((section, name), _) in functions.iter().filter(|((section, _), _)| section != ".text") {
        chains.push(chain(&functions, &places, &(section.clone(), name.clone()))?);
    }
    chains.into_iter().max().context("the object has no program")
}

/// Section and name.
type Id = (String, String);
type Functions = BTreeMap<Id, Function>;
/// Section and first instruction of each function.
type Places = BTreeMap<(String, i64), Id>;

fn parse(text: &str) -> Result<(Functions, Places)> {
    let (mut functions, mut places) = (Functions::new(), Places::new());
    let mut section = String::new();
    let mut current: Option<Id> = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("Disassembly of section ") {
            section = name.trim_end_matches(':').to_owned();
        } else if let Some((address, name)) = line.strip_suffix(">:").and_then(|line| line.split_once(" <")) {
            let address = i64::from_str_radix(address, 16).with_context(|| format!("an address in {line}"))?;
            let id = (section.clone(), name.to_owned());
            places.insert((section.clone(), address / 8), id.clone());
            functions.entry(id.clone()).or_default();
            current = Some(id);
        } else if let Some(function) = current.as_ref().and_then(|id| functions.get_mut(id)) {
            read_line(line, function);
        }
    }
    Ok((functions, places))
}

fn read_line(line: &str, function: &mut Function) {
    if let Some((_, symbol)) = line.split_once("R_BPF_64_32") {
        if let Some(call) = function.calls.last_mut() {
            call.symbol = Some(symbol.trim().to_owned());
        }
        return;
    }
    // Only what is addressed from the frame's end is the frame's: `r10 - 0x98`, or `r2 = r10` and then `r2 += -0x98`.
    for sign in ["r10 - 0x", "r10 + -0x", " += -0x"] {
        for (at, _) in line.match_indices(sign) {
            let digits = line[at + sign.len()..].split(|c: char| !c.is_ascii_hexdigit()).next().unwrap_or_default();
            let depth = u64::from_str_radix(digits, 16).unwrap_or(0);
            if depth <= LIMIT {
                function.depth = function.depth.max(depth);
            }
        }
    }
    // The second byte tells calls of our functions from calls of the kernel's.
    let Some((at, rest)) = line.split_once(":\t85 10 ") else { return };
    let number = rest.split_once("call ").map(|(_, number)| number.trim());
    if let (Ok(at), Some(number)) = (at.trim().parse(), number.and_then(signed)) {
        function.calls.push(Call { at, number, symbol: None });
    }
}

fn signed(text: &str) -> Option<i64> {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |digits| (-1, digits));
    let digits = digits.split_whitespace().next()?.strip_prefix("0x")?;
    i64::from_str_radix(digits, 16).ok().map(|number| sign * number)
}

fn chain(functions: &Functions, places: &Places, id: &Id) -> Result<Chain> {
    let function = functions.get(id).with_context(|| format!("no function {}", id.1))?;
    let mut deepest = Chain { bytes: 0, functions: Vec::new() };
    for call in &function.calls {
        let target = match &call.symbol {
            None => places.get(&(id.0.clone(), call.at + call.number + 1)),
            Some(symbol) if symbol.starts_with('.') => places.get(&(symbol.clone(), call.number + 1)),
            Some(symbol) => functions.keys().find(|(_, name)| name == symbol),
        };
        let Some(target) = target else { bail!("instruction {} of {} calls something unknown", call.at, id.1) };
        deepest = deepest.max(chain(functions, places, target)?);
    }
    let own = function.depth.max(1).next_multiple_of(ROUNDED_TO);
    let mut names = vec![(readable(&id.1), function.depth)];
    names.extend(deepest.functions);
    Ok(Chain { bytes: own + deepest.bytes, functions: names })
}

/// `_ZN9lb_common4path4open4open17h0123456789abcdefE` is `lb_common::path::open::open`.
fn readable(symbol: &str) -> String {
    let Some(mut rest) = symbol.strip_prefix("_ZN") else { return symbol.to_owned() };
    let mut parts = Vec::new();
    while let Some(end) = rest.find(|c: char| !c.is_ascii_digit()) {
        let Some(part) = rest[..end].parse::<usize>().ok().and_then(|length| rest.get(end..end + length)) else {
            break;
        };
        parts.push(part);
        rest = &rest[end + part.len()..];
    }
    // The last part is a hash.
    parts.pop();
    parts.join("::")
}

#[cfg(test)]
mod tests {
    use super::{deepest, readable};

    #[test]
    fn the_deepest_chain_counts_rounded_frames() {
        let text = "
Disassembly of section .text:

0000000000000000 <_ZN2lb4leaf17h0123456789abcdefE>:
       0:\t7b 1a f8 ff 00 00 00 00\t*(u64 *)(r10 - 0x8) = r1
       1:\t95 00 00 00 00 00 00 00\texit

0000000000000010 <_ZN2lb3mid17h0123456789abcdefE>:
       2:\tbf a2 00 00 00 00 00 00\tr2 = r10
       3:\t07 02 00 00 d0 ff ff ff\tr2 += -0x30
       4:\t85 10 00 00 fb ff ff ff\tcall -0x5
       5:\t95 00 00 00 00 00 00 00\texit

Disassembly of section classifier:

0000000000000000 <ingress>:
       0:\t85 00 00 00 05 00 00 00\tcall 0x5
       1:\t85 10 00 00 01 00 00 00\tcall 0x1
\t\t0000000000000008:  R_BPF_64_32\t.text
       2:\t95 00 00 00 00 00 00 00\texit
";
        let chain = deepest(text).unwrap();
        assert_eq!(chain.bytes, 32 + 64 + 32);
        let names: Vec<&str> = chain.functions.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["ingress", "lb::mid", "lb::leaf"]);
    }

    #[test]
    fn symbols_are_readable() {
        assert_eq!(readable("_ZN9lb_common4path4open4open17h0123456789abcdefE"), "lb_common::path::open::open");
        assert_eq!(readable("memset"), "memset");
    }
}
