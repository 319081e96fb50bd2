//! The kernel's types (BTF), no more of them than an iterator needs.
//!
//! aya reads all of them to find the number of one function (0.14), which takes twenty megabytes: more than anything else that the
//! agent does. It is given types of the same numbers that say nothing.

use std::{ffi::CStr, fs};

use anyhow::{Context as _, Result};
use aya::Btf;

/// Kinds of types, as `include/uapi/linux/btf.h` numbers them.
mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FWD: u32 = 7;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// Bytes of a `struct btf_header`, and of what all types begin with.
const HEADER: usize = 24;
const TYPE: usize = 12;

/// What [`Iter::load`](aya::programs::Iter::load) needs to know of this kernel for iterators of a kind.
///
/// # Errors
///
/// When the kernel shows no types, or has no such iterator.
pub fn of_iterator(kind: &str) -> Result<Btf> {
    let all = fs::read("/sys/kernel/btf/vmlinux").context("cannot read the kernel's types (CONFIG_DEBUG_INFO_BTF)")?;
    let name = format!("bpf_iter_{kind}");
    let number = number(&all, &name).with_context(|| format!("no function {name} among the kernel's types"))?;
    drop(all);
    Ok(Btf::parse(&stand_in(number, &name), Default::default())?)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// How many types are before the function of this name.
fn number(all: &[u8], name: &str) -> Option<usize> {
    let section = |at: usize| {
        let field = |at| word(all, at).map(|word| word as usize);
        all.get(field(4)? + field(at)?..)?.get(..field(at + 4)?)
    };
    let (mut types, strings) = (section(8)?, section(16)?);
    let mut number = 0;
    loop {
        let (name_offset, info) = (word(types, 0)?, word(types, 4)?);
        let (kind, len) = (info >> 24 & 0x1f, info as usize & 0xffff);
        if kind == kind::FUNC
            && CStr::from_bytes_until_nul(strings.get(name_offset as usize..)?).ok()?.to_bytes() == name.as_bytes()
        {
            return Some(number);
        }
        let more = match kind {
            kind::PTR | kind::FWD..=kind::FUNC | kind::FLOAT | kind::TYPE_TAG => 0,
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::ENUM | kind::FUNC_PROTO => 8 * len,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * len,
            _ => return None,
        };
        types = types.get(TYPE + more..)?;
        number += 1;
    }
}

/// Types whose only name is that of the function behind the first so many.
fn stand_in(number: usize, name: &str) -> Vec<u8> {
    let strings = [b"\0", name.as_bytes(), b"\0"].concat();
    let types = (number + 1) * TYPE;
    let header = [HEADER, 0, types, types, strings.len()].map(|field| (field as u32).to_ne_bytes());
    let mut bytes = Vec::with_capacity(HEADER + types + strings.len());
    bytes.extend(0xeb9f_u16.to_ne_bytes());
    bytes.extend([1, 0]);
    bytes.extend(header.as_flattened());
    let type_of = |name: u32, kind: u32| [name, kind << 24, 0].map(u32::to_ne_bytes);
    bytes.extend(std::iter::repeat_n(type_of(0, kind::FWD), number).flatten().flatten());
    bytes.extend(type_of(1, kind::FUNC).as_flattened());
    bytes.extend(strings);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_has_the_function_at_the_same_place() {
        for (place, name) in [(0, "bpf_iter_tcp"), (1, "bpf_iter_udp"), (70_000, "f")] {
            let bytes = stand_in(place, name);
            assert_eq!(number(&bytes, name), Some(place));
            assert_eq!(number(&bytes, "bpf_iter"), None);
            for len in 0..bytes.len().min(200) {
                assert_eq!(number(&bytes[..len], name), None, "{len}");
            }
        }
    }

    #[test]
    fn types_of_every_kind_are_passed_over() {
        let kinds =
            [(1, 4), (2, 0), (3, 12), (4, 24), (5, 24), (6, 16), (7, 0), (8, 0), (9, 0), (10, 0), (11, 0), (12, 0)];
        let more = [(13, 16), (14, 4), (15, 24), (16, 0), (17, 4), (18, 0), (19, 24)];
        let mut types = Vec::new();
        for (kind, len) in kinds.into_iter().chain(more) {
            // Two members, where there are members.
            types.extend([0, kind << 24 | 2, 0].map(u32::to_ne_bytes).as_flattened());
            types.extend(vec![0xff; len]);
        }
        let count = kinds.len() + more.len();
        let end = stand_in(0, "f");
        let mut bytes = end[..HEADER].to_vec();
        let (all, strings) = (types.len() + TYPE, end.len() - HEADER - TYPE);
        for (at, field) in [(12, all), (16, all), (20, strings)] {
            bytes[at..at + 4].copy_from_slice(&(field as u32).to_ne_bytes());
        }
        bytes.extend(types);
        bytes.extend(&end[HEADER..]);
        assert_eq!(number(&bytes, "f"), Some(count));
    }
}
