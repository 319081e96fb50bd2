//! The first file system of a virtual machine. In: files. Out: a cpio archive in the form that the kernel unpacks ("newc").

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// An archive in the making.
pub struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Archive {
    /// An empty one.
    pub fn new() -> Self {
        Self { bytes: Vec::new(), names: BTreeSet::new() }
    }

    /// Adds a folder and those that it is in.
    pub fn folder(&mut self, name: &str) {
        let name = name.trim_matches('/');
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.folder(parent);
        }
        if !name.is_empty() && self.names.insert(name.to_owned()) {
            self.entry(name, 0o040_755, &[]);
        }
    }

    /// Adds a file; the first of a name counts.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        let name = name.trim_matches('/');
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.folder(parent);
        }
        if self.names.insert(name.to_owned()) {
            self.entry(name, 0o100_000 | mode, content);
        }
    }

    /// Adds a program with the libraries and the loader that it needs, each under the name by which it is asked for.
    pub fn program(&mut self, path: &Path, name: &str) -> Result<()> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
        self.file(name, 0o755, &read(path)?);
        let output = Command::new("ldd").arg(path).output().context("running ldd")?;
        ensure!(output.status.success(), "ldd {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            self.file(library, 0o755, &read(Path::new(library))?);
        }
        Ok(())
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let number = self.names.len();
        // Of magic, inode, mode, owner, group, links, time, size, four device numbers, length of the name, checksum.
        let fields = [number, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The files that `ldd` names: `libc.so.6 => /lib/x/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn libraries(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let place = line.split_once("=>").map_or(line, |(_, place)| place);
        place.split_whitespace().next().filter(|place| place.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::{Archive, libraries};

    #[test]
    fn ldd_names_libraries_and_the_loader() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found: Vec<&str> = libraries(text).collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }

    #[test]
    fn an_archive_has_folders_before_what_is_in_them_and_a_trailer() {
        let mut archive = Archive::new();
        archive.file("/a/b/c", 0o755, b"12345");
        archive.folder("/a/b");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let places: Vec<usize> =
            ["a\0", "a/b\0", "a/b/c\0", "12345", "TRAILER!!!\0"].iter().map(|name| text.find(name).unwrap()).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(text.matches("070701").count(), 4);
        assert!(text.starts_with("07070100000001000041ed"), "a folder, mode 0755");
    }
}
