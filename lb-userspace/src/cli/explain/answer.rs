//! The answer to a packet: in fields for tools, in a paragraph for people.

use std::{fmt::Write as _, net::SocketAddr};

use anyhow::Context;
use lb_common::{
    addr::Port,
    affinity::{AffinityKey, node_client},
    decide::{Class, Forward, Question, classify},
    layout::{frontend_flags, node_flags},
    reason::Reason,
    tables::Tables,
};
use serde::Serialize;

use super::{Named, Packet};

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes to an endpoint.
    Dnat,
    /// It is refused at once.
    Reject,
    /// It is dropped.
    Drop,
    /// It is not ours.
    Pass,
}

/// How a client stays with an endpoint (`sessionAffinity: ClientIP`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stay {
    /// Seconds after its last new connection for which it does.
    pub timeout_seconds: u32,
    /// The endpoint that it has now and gets again, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// What happens to a packet, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// What happens to it.
    pub verdict: Verdict,
    /// Every endpoint that may be chosen.
    pub endpoints: Vec<String>,
    /// Whether the source is rewritten, whichever is chosen.
    pub masquerade: bool,
    /// Endpoints for which the source is rewritten, if it is not for all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hairpin: Vec<String>,
    /// Whether the client stays with an endpoint, and with which one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Stay>,
    /// `namespace/name:port`.
    pub service: Option<String>,
    /// Label of the reason, as metrics have it.
    pub reason: &'static str,
    #[serde(skip)]
    why: Reason,
    #[serde(skip)]
    flags: u32,
}

/// What happens to a packet, and why.
///
/// # Errors
///
/// The interface is not known.
pub fn explain<N: Named>(packet: &Packet, named: &N) -> anyhow::Result<Answer> {
    let tables = named.tables();
    let question = question(packet, named)?;
    let name =
        |id| named.service(id).map(|name| name.rsplit_once('/').map(|(name, _)| name.to_owned()).unwrap_or(name));
    let answer = |verdict, why: Reason| {
        let frontend = lb_common::decide::find(&question.dst, question.dport, question.proto, tables);
        Answer {
            verdict,
            endpoints: Vec::new(),
            masquerade: false,
            hairpin: Vec::new(),
            affinity: None,
            service: frontend.and_then(|frontend| name(frontend.service)),
            reason: why.as_str(),
            why,
            flags: frontend.map_or(0, |frontend| frontend.flags),
        }
    };
    Ok(match classify(&question, tables) {
        Class::Forward(forward) => {
            let (endpoints, rewritten) = endpoints(&question, &forward, tables)?;
            let masquerade = rewritten.len() == endpoints.len();
            Answer {
                endpoints,
                affinity: stay(&question, &forward, named),
                masquerade,
                hairpin: if masquerade { Vec::new() } else { rewritten },
                ..answer(Verdict::Dnat, Reason::NewFlow)
            }
        }
        Class::Reject(why) => answer(Verdict::Reject, why),
        Class::Drop(why) => answer(Verdict::Drop, why),
        Class::Pass(why) => answer(Verdict::Pass, why),
    })
}

/// Whom the client stays with. Processes of the node are one client.
fn stay<N: Named>(question: &Question, forward: &Forward, named: &N) -> Option<Stay> {
    let wanted = forward.wanted();
    if wanted.timeout == 0 {
        return None;
    }
    let client = if question.from_node { node_client(&question.src) } else { question.src };
    let key = AffinityKey { client, service: forward.service };
    let endpoint = named.remembered(&key).and_then(|(affinity, now)| {
        let endpoint = named.tables().endpoint(affinity.endpoint_id)?;
        let text = || SocketAddr::new(endpoint.addr.into(), endpoint.port.number()).to_string();
        affinity.holds(endpoint, &wanted, now).then(text)
    });
    Some(Stay { timeout_seconds: wanted.timeout, endpoint })
}

fn question<N: Named>(packet: &Packet, named: &N) -> anyhow::Result<Question> {
    let src = packet.from.into();
    let device = match &packet.from_interface {
        Some(name) => named
            .interface(name)
            .with_context(|| format!("from_interface: there is no interface `{name}` here; `ip link` lists them"))?,
        None => 0,
    };
    let local = named.tables().node_address(&src) & node_flags::LOCAL != 0 || packet.from.is_loopback();
    Ok(Question {
        src,
        dst: packet.to.into(),
        dport: Port::new(packet.port),
        proto: packet.protocol.number(),
        from_node: local,
        device,
    })
}

/// Every endpoint of a range, and those for which the source is rewritten.
fn endpoints<T: Tables>(
    question: &Question,
    forward: &Forward,
    tables: &T,
) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let (mut all, mut rewritten) = (Vec::new(), Vec::new());
    for place in 0..forward.range.len {
        let slot = forward.range.offset.wrapping_add(place);
        let endpoint = tables.slot(slot).and_then(|id| tables.endpoint(id)).with_context(|| {
            format!("slot {slot} names no endpoint; the tables changed while they were read, ask again")
        })?;
        let text = SocketAddr::new(endpoint.addr.into(), endpoint.port.number()).to_string();
        if forward.masquerades(&question.src, endpoint) {
            rewritten.push(text.clone());
        }
        all.push(text);
    }
    Ok((all, rewritten))
}

/// Reasons that a packet which starts a connection can meet, in words.
const WORDS: [(Reason, &str); 8] = [
    (Reason::NotService, "No Service of this node has this address and port, so the host's own stack treats it."),
    (Reason::OwnAddress, "The address is the node's own (or localhost, from outside), so the host itself has it."),
    (Reason::UnknownPort, "The ClusterIP has no such port for this protocol."),
    (Reason::NoEndpoints, "There is no endpoint anywhere."),
    (Reason::NoLocalEndpoints, "The traffic policy is Local, and all endpoints are on other nodes."),
    (Reason::SourceRange, "The source is in none of spec.loadBalancerSourceRanges."),
    (Reason::Unallocated, "The address is in a ServiceCIDR, but no Service has it."),
    (Reason::Internal, "The tables are inconsistent; `fairlead status` says more."),
];

impl Answer {
    /// The answer as a person reads it.
    #[must_use]
    pub fn paragraph(&self, packet: &Packet) -> String {
        let Packet { from, to, port, protocol, from_interface } = packet;
        let to = SocketAddr::new(*to, *port);
        let by = from_interface.as_ref().map(|name| format!(" by {name}")).unwrap_or_default();
        let fate = match self.verdict {
            Verdict::Dnat => "is sent on",
            Verdict::Reject => "is refused at once",
            Verdict::Drop => "is dropped without an answer",
            Verdict::Pass => "is left alone",
        };
        let mut text = format!("{protocol} from {from}{by} to {to} {fate}.");
        if let Some(service) = &self.service {
            let kind = if self.flags & frontend_flags::NODE_PORT != 0 { " (its NodePort)" } else { "" };
            _ = write!(text, " The Service is {service}{kind}.");
        }
        match (self.verdict, &self.endpoints[..]) {
            (Verdict::Dnat, [only]) => _ = write!(text, " Its endpoint is {only}. {}", self.source()),
            (Verdict::Dnat, all) => {
                _ = write!(
                    text,
                    " One of these {} endpoints gets it: {}. {}",
                    all.len(),
                    all.join(", "),
                    self.source()
                );
            }
            (Verdict::Reject | Verdict::Drop | Verdict::Pass, _) => {
                let why = WORDS.iter().find(|(reason, _)| *reason == self.why).map_or(self.reason, |(_, words)| words);
                _ = write!(text, " {why}");
            }
        }
        if let Some(Stay { timeout_seconds, endpoint }) = &self.affinity {
            let who = endpoint.as_ref().map(|endpoint| format!(", now with {endpoint}")).unwrap_or_default();
            _ = write!(text, " The client stays with its endpoint for {timeout_seconds} s{who}.");
        }
        text
    }

    fn source(&self) -> String {
        if self.masquerade {
            "The endpoint sees this node's address as the source.".to_owned()
        } else if self.hairpin.is_empty() {
            "The endpoint sees the client's own address.".to_owned()
        } else {
            let list = self.hairpin.join(", ");
            format!("The endpoint sees the client's own address, but {list} sees this node's.")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_told_what_happens_and_why() {
        let line = r#"{"from":"10.0.0.2","to":"172.30.0.41","port":80,"protocol":"TCP"}"#;
        let packet = Packet::from_json(line).unwrap();
        let answer = |verdict, endpoints: &[&str], why: Reason| Answer {
            verdict,
            endpoints: endpoints.iter().map(|text| (*text).to_owned()).collect(),
            masquerade: false,
            hairpin: Vec::new(),
            affinity: None,
            service: Some("shop/web:http".to_owned()),
            reason: why.as_str(),
            why,
            flags: 0,
        };
        let start = "TCP from 10.0.0.2 to 172.30.0.41:80 is";
        for (answer, want) in [
            (
                answer(Verdict::Dnat, &["10.0.0.3:80"], Reason::NewFlow),
                " sent on. The Service is shop/web:http. Its endpoint is 10.0.0.3:80. The endpoint sees the client's own address.",
            ),
            (
                Answer {
                    affinity: Some(Stay { timeout_seconds: 10, endpoint: Some("10.0.0.3:80".to_owned()) }),
                    ..answer(Verdict::Dnat, &["10.0.0.3:80"], Reason::NewFlow)
                },
                " sent on. The Service is shop/web:http. Its endpoint is 10.0.0.3:80. The endpoint sees the client's own address. The client stays with its endpoint for 10 s, now with 10.0.0.3:80.",
            ),
            (
                Answer { service: None, ..answer(Verdict::Drop, &[], Reason::Unallocated) },
                " dropped without an answer. The address is in a ServiceCIDR, but no Service has it.",
            ),
            (
                answer(Verdict::Reject, &[], Reason::NoEndpoints),
                " refused at once. The Service is shop/web:http. There is no endpoint anywhere.",
            ),
        ] {
            assert_eq!(answer.paragraph(&packet), format!("{start}{want}"));
        }
    }
}
