//! What is redirected, what is left alone, what is dropped: the rules, before any tool's words.
//!
//! Invariants: this module is pure. Both backends print the same list of [`Rule`]s, so they mean
//! the same. A packet that no rule lets pass is redirected (TCP) or dropped (everything else that
//! comes in), so a rule that is missing closes and never opens.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// TCP port of DNS.
const DNS_PORT: u16 = 53;

/// Which addresses a rule set is about; each family has rules of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What is wanted for a pod.
#[derive(Clone, Debug)]
pub(crate) struct Redirection {
    /// Where connections that come in are sent.
    pub(crate) inbound_port: u16,
    /// Where connections that go out are sent; the sidecar listens on loopback there.
    pub(crate) outbound_port: u16,
    /// User of the sidecar, whose own connections are left alone.
    pub(crate) proxy_uid: u32,
    /// TCP ports that callers reach without the sidecar: its own health port, and skipped ones.
    pub(crate) inbound_open: BTreeSet<u16>,
    /// TCP ports that the application calls without the sidecar.
    pub(crate) outbound_skipped: BTreeSet<u16>,
    /// Networks that the application calls without the sidecar.
    pub(crate) outbound_skipped_nets: Vec<IpNet>,
    /// UDP ports that callers reach.
    pub(crate) udp_open: BTreeSet<u16>,
    /// The pod's own DNS servers: what UDP can't carry is asked over TCP, and DNS is left alone.
    pub(crate) resolvers: BTreeSet<IpAddr>,
}

/// Where a chain is hooked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// Connections that come in, before they are delivered: redirects.
    Inbound,
    /// Connections that go out: redirects.
    Outbound,
    /// Packets about to be delivered: drops what must not arrive.
    Guard,
}

/// One chain of rules; the first rule that matches decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) hook: Hook,
    pub(crate) rules: Vec<Rule>,
}

/// One rule: every match of it must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) matches: Vec<Match>,
    pub(crate) verdict: Verdict,
}

/// A property of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// It comes from this pod itself.
    FromLoopback,
    /// It answers what this pod began, or goes on with what was let in.
    Established,
    /// ICMP of the family.
    Icmp,
    /// Any TCP.
    Tcp,
    /// TCP to one of these ports.
    TcpTo(BTreeSet<u16>),
    /// The first packet of a TCP connection.
    TcpOpens,
    /// UDP to one of these ports.
    UdpTo(BTreeSet<u16>),
    /// It is sent by a process of this user.
    OwnedBy(u32),
    /// It is sent to this network.
    To(IpNet),
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Goes on as it is; other chains of the pod still see it.
    Leave,
    /// Goes to this port of the sidecar.
    Redirect(u16),
    /// Is not delivered.
    Drop,
}

impl Redirection {
    /// The chains of one family, in the order in which they must appear if they appear one by one:
    /// what closes first.
    pub(crate) fn chains(&self, family: Family) -> Vec<Chain> {
        vec![
            self.guard(),
            self.inbound(),
            Chain {
                hook: Hook::Outbound,
                rules: self.outbound(family),
            },
        ]
    }

    /// Ports that a packet from outside may have as its destination once redirection is done.
    fn gates(&self) -> BTreeSet<u16> {
        let mut gates = self.inbound_open.clone();
        gates.insert(self.inbound_port);
        gates
    }

    fn inbound(&self) -> Chain {
        Chain {
            hook: Hook::Inbound,
            rules: vec![
                leave([Match::FromLoopback]),
                leave([Match::TcpTo(self.gates())]),
                Rule {
                    matches: vec![Match::Tcp],
                    verdict: Verdict::Redirect(self.inbound_port),
                },
            ],
        }
    }

    fn outbound(&self, family: Family) -> Vec<Rule> {
        let mut rules = vec![
            leave([Match::OwnedBy(self.proxy_uid)]),
            leave([Match::To(family.loopback())]),
        ];
        let skipped = family.only(&self.outbound_skipped_nets);
        rules.extend(skipped.into_iter().map(|net| leave([Match::To(net)])));
        if !self.outbound_skipped.is_empty() {
            rules.push(leave([Match::TcpTo(self.outbound_skipped.clone())]));
        }
        let resolvers = self.resolvers.iter().filter(|server| family.has(**server));
        rules.extend(resolvers.map(|server| {
            let dns = Match::TcpTo(BTreeSet::from([DNS_PORT]));
            leave([Match::To(IpNet::from(*server)), dns])
        }));
        rules.push(Rule {
            matches: vec![Match::Tcp],
            verdict: Verdict::Redirect(self.outbound_port),
        });
        rules
    }

    /// Redirection needs connection tracking to see a connection; what it does not see must not
    /// reach the application either, so a connection is opened at a gate or not at all.
    fn guard(&self) -> Chain {
        let mut rules = vec![
            leave([Match::FromLoopback]),
            leave([Match::Icmp]),
            leave([Match::TcpTo(self.gates())]),
            drop([Match::TcpOpens]),
            leave([Match::Tcp]),
            leave([Match::Established]),
        ];
        if !self.udp_open.is_empty() {
            rules.push(leave([Match::UdpTo(self.udp_open.clone())]));
        }
        rules.push(drop([]));
        Chain {
            hook: Hook::Guard,
            rules,
        }
    }
}

impl Family {
    fn loopback(self) -> IpNet {
        match self {
            Self::V4 => Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into(),
            Self::V6 => Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128).into(),
        }
    }

    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }

    /// The networks of this family, each part of the address space once.
    fn only(self, nets: &[IpNet]) -> Vec<IpNet> {
        let mine = nets.iter().filter(|net| self.has(net.addr()));
        IpNet::aggregate(&mine.map(IpNet::trunc).collect())
    }
}

fn leave<const N: usize>(matches: [Match; N]) -> Rule {
    Rule {
        matches: matches.into(),
        verdict: Verdict::Leave,
    }
}

fn drop<const N: usize>(matches: [Match; N]) -> Rule {
    Rule {
        matches: matches.into(),
        verdict: Verdict::Drop,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What the injector asks for when nobody asks for anything else.
    pub(crate) fn plain() -> Redirection {
        Redirection {
            inbound_port: 19006,
            outbound_port: 19001,
            proxy_uid: 1519,
            inbound_open: BTreeSet::from([19021]),
            outbound_skipped: BTreeSet::new(),
            outbound_skipped_nets: Vec::new(),
            udp_open: BTreeSet::new(),
            resolvers: BTreeSet::from(["10.96.0.10".parse().unwrap()]),
        }
    }

    /// Everything that can be asked for.
    pub(crate) fn full() -> Redirection {
        let nets = ["10.0.0.1/8", "10.1.0.0/16", "fd00::1/8", "0.0.0.0/32"];
        let resolvers = ["10.96.0.10", "fd00::a"];
        Redirection {
            inbound_open: BTreeSet::from([19021, 9090, 22]),
            outbound_skipped: BTreeSet::from([3306, 25]),
            outbound_skipped_nets: nets.iter().map(|net| net.parse().unwrap()).collect(),
            udp_open: BTreeSet::from([514, 53]),
            resolvers: resolvers.iter().map(|ip| ip.parse().unwrap()).collect(),
            ..plain()
        }
    }

    #[test]
    fn whatever_no_rule_lets_pass_is_redirected_or_dropped() {
        for family in [Family::V4, Family::V6] {
            for chain in full().chains(family) {
                let last = chain.rules.last().unwrap();
                let expected = match chain.hook {
                    Hook::Inbound => (vec![Match::Tcp], Verdict::Redirect(19006)),
                    Hook::Outbound => (vec![Match::Tcp], Verdict::Redirect(19001)),
                    Hook::Guard => (vec![], Verdict::Drop),
                };
                assert_eq!((last.matches.clone(), last.verdict), expected);
            }
        }
    }

    #[test]
    fn what_closes_comes_first() {
        let hooks = plain().chains(Family::V4).into_iter().map(|it| it.hook);
        let order = [Hook::Guard, Hook::Inbound, Hook::Outbound];
        assert_eq!(hooks.collect::<Vec<_>>(), order);
    }

    #[test]
    fn the_sidecar_is_left_alone_before_anything_else_is_asked() {
        let chains = plain().chains(Family::V6);
        let outbound = chains.iter().find(|it| it.hook == Hook::Outbound).unwrap();
        assert_eq!(outbound.rules[0].matches, [Match::OwnedBy(1519)]);
    }
}
