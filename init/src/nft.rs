//! The rules as nftables reads them.
//!
//! Invariant: one script is one transaction. It makes the table `sidegate` anew whatever was there,
//! so running it twice is running it once, and no moment is without rules.

use ipnet::IpNet;
use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::rules::{Chain, Family, Hook, Match, Redirection, Rule, Verdict};

/// Returns the script for `nft -f -`.
pub(crate) fn script(redirection: &Redirection, families: &[Family]) -> String {
    let mut script = String::new();
    for &family in families {
        let table = format!("table {} sidegate", keyword(family));
        // Deleting fails where nothing is; adding first makes it always there.
        let _written = writeln!(script, "add {table}\ndelete {table}\n{table} {{");
        for chain in redirection.chains(family) {
            script.push_str(&print_chain(&chain, family));
        }
        script.push_str("}\n");
    }
    script
}

fn print_chain(chain: &Chain, family: Family) -> String {
    let (name, hook) = match chain.hook {
        Hook::Inbound => ("inbound", "type nat hook prerouting priority -100"),
        Hook::Outbound => ("outbound", "type nat hook output priority -100"),
        Hook::Guard => ("guard", "type filter hook input priority 0"),
    };
    let mut text = format!("\tchain {name} {{\n\t\t{hook}; policy accept;\n");
    for rule in &chain.rules {
        text.push_str(&print_rule(rule, family));
    }
    text.push_str("\t}\n");
    text
}

fn print_rule(rule: &Rule, family: Family) -> String {
    let mut text = String::from("\t\t");
    for condition in &rule.matches {
        text.push_str(&print_match(condition, family));
        text.push(' ');
    }
    match rule.verdict {
        Verdict::Leave => text.push_str("accept\n"),
        Verdict::Drop => text.push_str("drop\n"),
        Verdict::Redirect(port) => {
            let _written = writeln!(text, "redirect to :{port}");
        }
    }
    text
}

fn print_match(condition: &Match, family: Family) -> String {
    match condition {
        Match::FromLoopback => "iifname \"lo\"".to_owned(),
        Match::Established => "ct state established".to_owned(),
        Match::Icmp => match family {
            Family::V4 => "meta l4proto 1".to_owned(),
            Family::V6 => "meta l4proto 58".to_owned(),
        },
        Match::Tcp => "meta l4proto 6".to_owned(),
        Match::TcpTo(ports) => format!("tcp dport {}", set(ports)),
        Match::TcpOpens => "tcp flags & (fin | syn | rst | ack) == syn".to_owned(),
        Match::UdpTo(ports) => format!("udp dport {}", set(ports)),
        Match::OwnedBy(uid) => format!("meta skuid {uid}"),
        Match::To(net) => format!("{} daddr {}", keyword(family), destination(net)),
    }
}

fn destination(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        net.addr().to_string()
    } else {
        net.to_string()
    }
}

fn set(ports: &BTreeSet<u16>) -> String {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!("{{ {} }}", ports.join(", "))
}

fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::tests::{full, plain};

    #[test]
    fn the_script_is_as_it_was_reviewed() {
        let expected = include_str!("golden/plain.nft");
        assert_eq!(script(&plain(), &[Family::V4, Family::V6]), expected);
    }

    #[test]
    fn the_script_with_everything_is_as_it_was_reviewed() {
        let expected = include_str!("golden/full.nft");
        assert_eq!(script(&full(), &[Family::V4, Family::V6]), expected);
    }

    #[test]
    fn without_ipv6_nothing_names_it() {
        assert!(!script(&full(), &[Family::V4]).contains("ip6"));
    }
}
