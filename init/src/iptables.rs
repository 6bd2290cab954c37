//! The rules as `iptables-restore` reads them, for nodes whose kernel refuses our nftables script.
//!
//! Invariants: the chains are ours alone, other rules of the pod stay. A table is one transaction,
//! and what closes comes first, so that a failure between two tables has opened nothing.

use crate::rules::{Chain, Family, Hook, Match, Redirection, Rule, Verdict};
use std::fmt::Write as _;

/// A jump from a built-in chain to one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    /// The table of both.
    pub(crate) table: &'static str,
    /// The built-in chain.
    pub(crate) from: &'static str,
    /// Our chain.
    pub(crate) to: &'static str,
}

impl Jump {
    const ALL: [Self; 3] = [
        Self::of(Hook::Guard),
        Self::of(Hook::Inbound),
        Self::of(Hook::Outbound),
    ];

    /// Every jump that must be there.
    pub(crate) fn all() -> &'static [Self] {
        &Self::ALL
    }

    const fn of(hook: Hook) -> Self {
        let (table, from, to) = match hook {
            Hook::Guard => ("filter", "INPUT", "SIDEGATE_GUARD"),
            Hook::Inbound => ("nat", "PREROUTING", "SIDEGATE_INBOUND"),
            Hook::Outbound => ("nat", "OUTPUT", "SIDEGATE_OUTBOUND"),
        };
        Self { table, from, to }
    }
}

/// Returns the input of `iptables-restore --noflush`, or of its IPv6 twin. `present` are the jumps
/// that an earlier run made: naming a chain empties it, but a jump would be there twice.
pub(crate) fn script(redirection: &Redirection, family: Family, present: &[Jump]) -> String {
    let chains = redirection.chains(family);
    let mut script = String::new();
    for table in ["filter", "nat"] {
        let here = |chain: &&Chain| Jump::of(chain.hook).table == table;
        let _written = writeln!(script, "*{table}");
        for chain in chains.iter().filter(here) {
            let _written = writeln!(script, ":{} - [0:0]", Jump::of(chain.hook).to);
        }
        for chain in chains.iter().filter(here) {
            script.push_str(&print_chain(chain, family));
            let jump = Jump::of(chain.hook);
            if !present.contains(&jump) {
                let _written = writeln!(script, "-I {} 1 -j {}", jump.from, jump.to);
            }
        }
        script.push_str("COMMIT\n");
    }
    script
}

fn print_chain(chain: &Chain, family: Family) -> String {
    let name = Jump::of(chain.hook).to;
    let mut text = String::new();
    for rule in &chain.rules {
        for condition in conditions(rule, family) {
            let verdict = match rule.verdict {
                Verdict::Leave => "RETURN".to_owned(),
                Verdict::Drop => "DROP".to_owned(),
                Verdict::Redirect(port) => format!("REDIRECT --to-ports {port}"),
            };
            let _written = writeln!(text, "-A {name}{condition} -j {verdict}");
        }
    }
    text
}

/// What iptables must be told for one rule: a line for each port of it.
fn conditions(rule: &Rule, family: Family) -> Vec<String> {
    let mut lines = vec![String::new()];
    for condition in &rule.matches {
        let choices = choices(condition, family);
        let with = |line: &String| -> Vec<String> {
            let longer = choices.iter().map(|choice| format!("{line} {choice}"));
            longer.collect()
        };
        lines = lines.iter().flat_map(with).collect();
    }
    lines
}

fn choices(condition: &Match, family: Family) -> Vec<String> {
    let ports = |protocol: &str, ports: &std::collections::BTreeSet<u16>| -> Vec<String> {
        let to = |port| format!("-p {protocol} -m {protocol} --dport {port}");
        ports.iter().map(to).collect()
    };
    let one = |text: &str| vec![text.to_owned()];
    match condition {
        Match::FromLoopback => one("-i lo"),
        Match::Established => one("-m conntrack --ctstate ESTABLISHED"),
        Match::Icmp => match family {
            Family::V4 => one("-p icmp"),
            Family::V6 => one("-p ipv6-icmp"),
        },
        Match::Tcp => one("-p tcp"),
        Match::TcpTo(to) => ports("tcp", to),
        Match::TcpOpens => one("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"),
        Match::UdpTo(to) => ports("udp", to),
        Match::OwnedBy(uid) => vec![format!("-m owner --uid-owner {uid}")],
        Match::To(net) => vec![format!("-d {net}")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::tests::{full, plain};

    #[test]
    fn the_script_is_as_it_was_reviewed() {
        let expected = include_str!("golden/plain.iptables");
        assert_eq!(script(&plain(), Family::V4, &[]), expected);
    }

    #[test]
    fn the_script_with_everything_is_as_it_was_reviewed() {
        let expected = include_str!("golden/full.ip6tables");
        assert_eq!(script(&full(), Family::V6, &[]), expected);
    }

    #[test]
    fn a_jump_that_is_there_is_not_made_again() {
        let again = script(&plain(), Family::V4, Jump::all());
        assert!(!again.contains("-I "), "{again}");
        assert!(again.contains(":SIDEGATE_GUARD"), "it is emptied: {again}");
    }
}
