//! Bytes become files of manifests, one version after another.
//!
//! In: any bytes. Each version is taken from them as it is, or made of right manifests by choices that the bytes make: a field has
//! another value, is gone, stands twice; then the text has other bytes. Panics where a reader panics, where a problem names no file
//! or no remedy, or where the tables that follow the changes are not those that a fresh start would make of the same objects.

use std::{collections::BTreeMap, fs, io::Write as _};

use fairlead::{
    image::Image,
    model::{Change, Kind, Object, ObjectName},
    source::{Update, manifests::Unwatched},
};
use serde_json::{Value, json};

use crate::{
    cluster::{agent, assert_bits, assert_same, manifests, start},
    content::Content,
    input::Input,
};

const NAMES: [&str; 4] = ["a.yaml", "a.json", "b.yml", "b.json"];

/// What may stand in YAML and matters there, or is no text at all.
const TOKENS: [&[u8]; 22] = [
    b"---\n",
    b"\n",
    b"&a ",
    b"*a",
    b"{<<: *a}",
    b"? ",
    b"- ",
    b": ",
    b"|\n",
    b">-\n ",
    b"!!binary ",
    b"!!str ",
    b"#",
    b"%YAML 1.1\n",
    b"\t",
    b"[",
    b"}",
    b"\"",
    b"\xff",
    b"\xef\xbb\xbf",
    b"~",
    b"...\n",
];

/// Values that fields don't expect.
fn odd(input: &mut Input<'_>) -> Value {
    let texts = [
        "",
        "None",
        "x",
        "a/b",
        "10.0.0.1",
        "010.96.00.10",
        "10.0.0.256",
        "::",
        "fd00::1%eth0",
        "::ffff:10.0.0.1",
        "0.0.0.0/0",
        "10.0.0.1/33",
        "::/0",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "UDP",
        "SCTP",
        "Local",
        "ClientIP",
        "node1",
        "web",
        "9999999999999999999999",
        "1",
        "true",
        "2026-13-45T99:99:99Z",
        "\u{0}",
        "ü\u{202e}",
    ];
    let numbers = [0, -1, 1, 80, 8080, 30080, 65_535, 65_536, 1 << 31, i64::MAX, i64::MIN];
    match input.byte() % 8 {
        0..=2 => input.one_of(&texts).into(),
        3 | 4 => input.one_of(&numbers).into(),
        5 => Value::Null,
        6 => match input.byte() % 6 {
            0 => json!([]),
            1 => json!({}),
            2 => json!(true),
            3 => json!(1.5),
            4 => json!([[]]),
            _ => "x".repeat(usize::from(input.byte()) * 4).into(),
        },
        _ => String::from_utf8_lossy(input.take(usize::from(input.0.first().copied().unwrap_or(0) % 16))).into(),
    }
}

/// Changes a value somewhere within.
fn change(value: &mut Value, input: &mut Input<'_>) {
    let how = input.byte();
    match value {
        Value::Object(map) if how & 7 != 0 && !map.is_empty() => {
            let key = map.keys().nth(usize::from(input.byte()) % map.len()).cloned().unwrap_or_default();
            if how % 8 == 1 {
                map.remove(&key);
            } else if let Some(inner) = map.get_mut(&key) {
                change(inner, input);
            }
        }
        Value::Array(list) if how & 7 != 0 && !list.is_empty() => {
            let at = usize::from(input.byte()) % list.len();
            match how % 8 {
                1 => _ = list.remove(at),
                2 => list.push(list[at].clone()),
                _ => change(&mut list[at], input),
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            *value = odd(input)
        }
    }
}

/// Some of the manifests, changed here and there, in one text.
fn made(input: &mut Input<'_>) -> Vec<u8> {
    let (which, how) = (input.byte(), input.byte());
    let mut objects: Vec<Value> =
        manifests().into_iter().enumerate().filter(|(at, _)| which >> at & 1 == 0).map(|(_, object)| object).collect();
    for _ in 0..how % 8 {
        let at = usize::from(input.byte());
        let count = objects.len().max(1);
        objects.get_mut(at % count).into_iter().for_each(|object| change(object, input));
    }
    let text = if how & 8 == 0 {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        list.to_string()
    } else {
        objects.iter().map(|object| format!("{object}\n---\n")).collect()
    };
    let mut text = text.into_bytes();
    for _ in 0..(how >> 4) % 8 {
        let at = usize::from(input.u16()) % (text.len() + 1);
        let token = input.one_of(&TOKENS);
        let end = if input.byte() & 1 == 0 { at } else { text.len().min(at + 1) };
        text.splice(at..end, token.iter().copied());
    }
    text
}

fn check(update: &Update) {
    for problem in &update.problems {
        let text = problem.to_string();
        assert!(NAMES.iter().any(|name| text.contains(name)), "names no file: {text}");
        assert!(text.contains("; "), "names no remedy: {text}");
        assert!(!text.chars().any(char::is_control), "writes over other lines: {text:?}");
    }
}

/// Reads what the bytes say.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let folder = tempfile::TempDir::new().unwrap();
    let mut reader = Unwatched::open(folder.path()).unwrap();
    let (mut pipeline, _) = agent(Image::default());
    pipeline.compile(0);
    let mut kernel = pipeline.image().memory().clone();
    let mut objects: BTreeMap<(Kind, ObjectName), Object> = BTreeMap::new();
    for now in 0..4 {
        let how = input.byte();
        let text = if how & 4 == 0 {
            made(&mut input)
        } else {
            let length = usize::from(input.u16());
            input.take(length).to_vec()
        };
        // A file that is written anew may look as it did before.
        let new = folder.path().join(".new");
        fs::File::create(&new).unwrap().write_all(&text).unwrap();
        fs::rename(&new, folder.path().join(NAMES[usize::from(how % 4)])).unwrap();
        let update = reader.read();
        check(&update);
        for change in update.changes {
            match &change {
                Change::Upsert(object) => _ = objects.insert((object.kind(), object.name()), object.clone()),
                Change::Delete(kind, name) => _ = objects.remove(&(*kind, name.clone())),
            }
            pipeline.take(change);
        }
        pipeline.compile(now).iter().for_each(|write| write.apply(&mut kernel));
        assert_same(&kernel, pipeline.image().memory());
        let (fresh, _) = start(objects.values(), Image::default(), 0);
        assert_same(&Content::of(&kernel), &Content::of(fresh.image().memory()));
        assert_bits(&kernel, fresh.image().memory());
        for problem in pipeline.problems() {
            assert!(problem.to_string().contains("; "), "names no remedy: {problem}");
        }
        if input.0.is_empty() {
            return;
        }
    }
}
