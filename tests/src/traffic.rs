//! Real sockets in namespaces: servers that say who they are and whom they saw, clients that ask, streams whose every byte is compared.
//!
//! One protocol over TCP, line by line: `who` is answered with `<name> <peer>`; `echo <n>` and n bytes with the same bytes; `sum <n>
//! <seed>` and n bytes with `ok` or where they differ; `give <n> <seed>` with n bytes; `GET …` as a small web server would.
//! Over UDP a datagram `who` is answered like that, every other one comes back as it is.

pub mod bytes;
pub mod client;
pub mod http;
pub mod packet;
pub mod raw_tcp;
pub mod server;
pub mod socket;
