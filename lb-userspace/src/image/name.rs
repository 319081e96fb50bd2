//! Names of Service ports as the kernel's tables hold them, so that ids survive a restart.

use std::sync::Arc;

use lb_common::layout::{SERVICE_NAME_LEN, ServiceName};

use crate::{
    model::{ObjectName, object::Protocol},
    plan::PortName,
};

/// The bytes that stand for a Service port. Longer names than Kubernetes allows are cut off, and get a new id at each start.
#[must_use]
pub fn encode(name: &PortName) -> ServiceName {
    let mut bytes = [0; SERVICE_NAME_LEN];
    bytes.iter_mut().zip(name.to_string().bytes()).for_each(|(byte, text)| *byte = text);
    bytes
}

/// The text that a table holds; nothing if it is no name of ours.
#[must_use]
pub fn text(bytes: &ServiceName) -> Option<&str> {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    str::from_utf8(&bytes[..len]).ok().filter(|text| !text.is_empty() && !text.contains(char::is_control))
}

/// The Service port that bytes stand for; nothing if they are no name of ours.
#[must_use]
pub fn decode(bytes: &ServiceName) -> Option<PortName> {
    let (rest, protocol) = text(bytes)?.rsplit_once('/')?;
    let (service, port) = rest.rsplit_once(':')?;
    let (namespace, name) = service.split_once('/')?;
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|it| it.to_string() == protocol)?;
    Some(PortName { service: ObjectName::new(namespace, name), port: Arc::from(port), protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_there_and_back() {
        for (namespace, name, port) in [("default", "web", ""), ("kube-system", "dns", "dns-tcp")] {
            let name =
                PortName { service: ObjectName::new(namespace, name), port: port.into(), protocol: Protocol::Udp };
            assert_eq!(decode(&encode(&name)), Some(name));
        }
        let longest = "x".repeat(63);
        let name = PortName {
            service: ObjectName::new(&longest, &longest),
            port: longest.as_str().into(),
            protocol: Protocol::Sctp,
        };
        assert_eq!(decode(&encode(&name)), Some(name));
    }

    #[test]
    fn other_bytes_are_no_names() {
        for text in ["", "web", "ns/web", "ns/web:http", "ns/web:http/ICMP", "web:http/TCP", "ns/w\x1b[2Jeb:http/TCP"] {
            let mut bytes = [0; SERVICE_NAME_LEN];
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            assert_eq!(decode(&bytes), None, "{text}");
        }
        assert_eq!(decode(&[0xff; SERVICE_NAME_LEN]), None);
    }
}
