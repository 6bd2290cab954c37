//! Gives the rules to the kernel.
//!
//! Invariants: nftables first, iptables where nftables is missing or refused. It has succeeded only
//! when every family in which the pod can be reached is redirected: IPv6 may be left out only while
//! the pod has no IPv6 address but those of loopback and of the link.

use crate::iptables::{self, Jump};
use crate::nft;
use crate::rules::{Family, Redirection};

/// What the rules need from the machine.
pub(crate) trait Host {
    /// Runs a program with `input`, to its end.
    ///
    /// # Errors
    ///
    /// A sentence: it is not there, or it says why not.
    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<(), String>;

    /// What the pod has of IPv6.
    fn ipv6(&self) -> Ipv6;
}

/// What a pod has of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ipv6 {
    /// The kernel has none.
    Absent,
    /// No address by which others reach the pod; one may come later.
    Unaddressed,
    /// At least one such address.
    Addressed,
}

/// A program that gives rules to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// `nft`.
    Nft,
    /// `iptables-nft-restore` and its IPv6 twin.
    Iptables,
}

/// What was done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) backend: Backend,
    pub(crate) families: Vec<Family>,
    /// What was tried before, and why it did not do.
    pub(crate) refused: Vec<String>,
}

/// Nothing could be done.
#[derive(Debug, thiserror::Error)]
#[error("the pod's traffic is not redirected: {}", refused.join("; "))]
pub(crate) struct ApplyError {
    refused: Vec<String>,
}

impl Ipv6 {
    /// Reads `/proc/net/if_inet6`; `None` is a kernel without that file.
    pub(crate) fn of(table: Option<&str>) -> Self {
        const SCOPE: usize = 3;
        const HOST_AND_LINK: [&str; 2] = ["10", "20"];
        let Some(table) = table else {
            return Self::Absent;
        };
        let scopes = table.lines().map(|line| line.split_whitespace().nth(SCOPE));
        let reachable = |scope: Option<&str>| scope.is_none_or(|it| !HOST_AND_LINK.contains(&it));
        if scopes.into_iter().any(reachable) {
            Self::Addressed
        } else {
            Self::Unaddressed
        }
    }

    /// The sets of families that will do, the best one first.
    fn choices(self) -> &'static [&'static [Family]] {
        match self {
            Self::Absent => &[&[Family::V4]],
            Self::Unaddressed => &[&[Family::V4, Family::V6], &[Family::V4]],
            Self::Addressed => &[&[Family::V4, Family::V6]],
        }
    }
}

impl Backend {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
        }
    }

    fn apply(
        self,
        wanted: &Redirection,
        families: &[Family],
        host: &impl Host,
    ) -> Result<(), String> {
        match self {
            Self::Nft => host.run("nft", &["-f", "-"], &nft::script(wanted, families)),
            Self::Iptables => families
                .iter()
                .try_for_each(|&family| restore(wanted, family, host)),
        }
    }
}

/// Makes the kernel redirect as `wanted` says, whatever an earlier run did.
///
/// # Errors
///
/// [`ApplyError`] with what each program said. Rules may be there then, but none that open anything.
pub(crate) fn apply(wanted: &Redirection, host: &impl Host) -> Result<Applied, ApplyError> {
    let mut refused = Vec::new();
    for backend in [Backend::Nft, Backend::Iptables] {
        for families in host.ipv6().choices() {
            match backend.apply(wanted, families, host) {
                Ok(()) => {
                    return Ok(Applied {
                        backend,
                        families: families.to_vec(),
                        refused,
                    });
                }
                Err(why) => refused.push(why),
            }
        }
    }
    Err(ApplyError { refused })
}

fn restore(wanted: &Redirection, family: Family, host: &impl Host) -> Result<(), String> {
    let (ask, restore) = match family {
        Family::V4 => ("iptables-nft", "iptables-nft-restore"),
        Family::V6 => ("ip6tables-nft", "ip6tables-nft-restore"),
    };
    let there = |jump: &&Jump| {
        let question = ["-t", jump.table, "-C", jump.from, "-j", jump.to];
        host.run(ask, &question, "").is_ok()
    };
    let present: Vec<Jump> = Jump::all().iter().filter(there).copied().collect();
    let script = iptables::script(wanted, family, &present);
    host.run(restore, &["--noflush"], &script)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::rules::tests::plain;

    const LOOPBACK: &str = "00000000000000000000000000000001 01 80 10 80       lo\n";
    const LINK: &str = "fe800000000000004008d9fffe5f0001 02 40 20 80     eth0\n";
    const UNIQUE_LOCAL: &str = "fd000000000000004008d9fffe5f0001 02 40 00 80     eth0\n";

    /// A machine on which some programs do not do.
    struct Fake {
        ipv6: Ipv6,
        refuses: fn(&str, &str) -> bool,
        ran: RefCell<Vec<String>>,
    }

    impl Fake {
        fn new(ipv6: Ipv6, refuses: fn(&str, &str) -> bool) -> Self {
            let ran = RefCell::default();
            Self { ipv6, refuses, ran }
        }
    }

    impl Host for Fake {
        fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<(), String> {
            let line = format!("{program} {}", arguments.join(" "));
            self.ran.borrow_mut().push(line.clone());
            if arguments.contains(&"-C") || (self.refuses)(program, input) {
                return Err(format!("{line}: refused"));
            }
            Ok(())
        }

        fn ipv6(&self) -> Ipv6 {
            self.ipv6
        }
    }

    #[test]
    fn both_families_go_in_with_one_call_of_nft() {
        let host = Fake::new(Ipv6::Addressed, |_, _| false);
        let applied = apply(&plain(), &host).unwrap();
        assert_eq!(applied.backend, Backend::Nft);
        assert_eq!(applied.families, [Family::V4, Family::V6]);
        assert_eq!(*host.ran.borrow(), ["nft -f -"]);
    }

    #[test]
    fn iptables_takes_over_where_nft_is_refused() {
        let host = Fake::new(Ipv6::Addressed, |program, _| program == "nft");
        let applied = apply(&plain(), &host).unwrap();
        assert_eq!(applied.backend, Backend::Iptables);
        assert_eq!(applied.families, [Family::V4, Family::V6]);
        assert_eq!(applied.refused, ["nft -f -: refused"], "and says why");
    }

    #[test]
    fn ipv6_that_cannot_be_redirected_fails_a_pod_that_has_an_address() {
        let without_ipv6 = |program: &str, input: &str| {
            program == "ip6tables-nft-restore" || input.contains("table ip6")
        };
        let host = Fake::new(Ipv6::Addressed, without_ipv6);
        let error = apply(&plain(), &host).unwrap_err().to_string();
        assert!(error.contains("ip6tables"), "{error}");

        let host = Fake::new(Ipv6::Unaddressed, without_ipv6);
        let applied = apply(&plain(), &host).unwrap();
        assert_eq!(applied.families, [Family::V4]);
        assert_eq!(applied.backend, Backend::Nft);
    }

    #[test]
    fn a_kernel_without_ipv6_is_asked_for_none() {
        let host = Fake::new(Ipv6::Absent, |_, input| input.contains("ip6"));
        assert_eq!(apply(&plain(), &host).unwrap().families, [Family::V4]);
    }

    #[test]
    fn it_fails_when_nothing_does() {
        let host = Fake::new(Ipv6::Absent, |_, _| true);
        let error = apply(&plain(), &host).unwrap_err().to_string();
        assert!(error.contains("nft -f -: refused"), "{error}");
        assert!(error.contains("iptables-nft-restore"), "{error}");
    }

    #[test]
    fn an_address_that_others_reach_is_known_by_its_scope() {
        let of = |lines: &[&str]| Ipv6::of(Some(&lines.concat()));
        assert_eq!(Ipv6::of(None), Ipv6::Absent);
        assert_eq!(of(&[]), Ipv6::Unaddressed);
        assert_eq!(of(&[LOOPBACK, LINK]), Ipv6::Unaddressed);
        assert_eq!(of(&[LOOPBACK, LINK, UNIQUE_LOCAL]), Ipv6::Addressed);
        assert_eq!(of(&["unreadable\n"]), Ipv6::Addressed, "not safe to skip");
    }
}
