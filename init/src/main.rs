//! `sidegate-init`: redirects a pod's traffic to its sidecar, then ends.
//!
//! It runs as an init container with `NET_ADMIN` directly before the sidecar. Running it again
//! changes nothing.
//!
//! Invariant: only this file decides to exit, and with which code: 0 done, 1 failed, 2 wrong usage.
//! It says done only when the kernel has taken every rule that this pod needs.

mod apply;
mod iptables;
mod nft;
mod rules;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Parser;
use ipnet::IpNet;

use crate::apply::{Applied, Host, Ipv6};
use crate::rules::{Family, Redirection};

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

/// Where the kernel lists IPv6 addresses.
const IPV6_ADDRESSES: &str = "/proc/net/if_inet6";

/// Longest text of another program that is repeated, in characters.
const SAID_MAX: usize = 400;

/// Redirects a pod's traffic to its sidecar.
#[derive(Debug, Parser)]
#[command(
    name = "sidegate-init",
    version,
    after_help = "Example: sidegate-init --skip-inbound-port 9090 --dry-run"
)]
struct Cli {
    /// Port of the sidecar to which connections that come in are sent.
    #[arg(long, value_name = "PORT", default_value_t = 19006, value_parser = port())]
    inbound_port: u16,
    /// Port of the sidecar, on loopback, to which connections that go out are sent.
    #[arg(long, value_name = "PORT", default_value_t = 19001, value_parser = port())]
    outbound_port: u16,
    /// User of the sidecar; its own connections are left alone.
    #[arg(long, value_name = "UID", default_value_t = 1519, value_parser = clap::value_parser!(u32).range(1..))]
    proxy_uid: u32,
    /// Port of the sidecar's own that is reached without redirection: health, metrics, probes.
    #[arg(long, value_name = "PORT", default_value_t = 19021, value_parser = port())]
    inbound_exempt_port: u16,
    /// TCP port of the pod that callers reach without the sidecar. May be repeated.
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = port())]
    skip_inbound_port: Vec<u16>,
    /// TCP port that the pod calls without the sidecar. May be repeated.
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = port())]
    skip_outbound_port: Vec<u16>,
    /// Network that the pod calls without the sidecar, such as 10.0.0.0/8. May be repeated.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    skip_outbound_cidr: Vec<IpNet>,
    /// UDP port of the pod that callers reach; every other one is closed. May be repeated.
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = port())]
    udp_port: Vec<u16>,
    /// Where the pod's DNS servers are listed; DNS over TCP to them is left alone.
    #[arg(long, value_name = "FILE", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// Print the nftables script and change nothing.
    #[arg(long)]
    dry_run: bool,
}

fn port() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..)
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(wrong) = cli.check() {
        return fail(WRONG_USAGE, &wrong);
    }
    let wanted = cli.redirection(&std::fs::read_to_string(&cli.resolv_conf).unwrap_or_default());
    if cli.dry_run {
        let script = nft::script(&wanted, &[Family::V4, Family::V6]);
        return match io::stdout().write_all(script.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(FAILED, &format!("cannot print: {error}")),
        };
    }
    match apply::apply(&wanted, &Pod) {
        Ok(applied) => {
            report(&applied);
            ExitCode::SUCCESS
        }
        Err(error) => fail(
            FAILED,
            &format!("{error}; the container needs user 0 and the capability NET_ADMIN"),
        ),
    }
}

impl Cli {
    /// Checks what no single flag shows.
    fn check(&self) -> Result<(), String> {
        let own = [
            ("--inbound-port", self.inbound_port),
            ("--outbound-port", self.outbound_port),
            ("--inbound-exempt-port", self.inbound_exempt_port),
        ];
        for (index, (flag, port)) in own.iter().enumerate() {
            let others = own.iter().skip(index + 1);
            if let Some((other, _)) = others.into_iter().find(|(_, other)| other == port) {
                return Err(format!("{flag} and {other} are both {port}"));
            }
            // Skipping it would hand callers a port of the sidecar that is not meant for them.
            if self.skip_inbound_port.contains(port) {
                return Err(format!(
                    "--skip-inbound-port {port} is the sidecar's own port"
                ));
            }
        }
        Ok(())
    }

    fn redirection(&self, resolv_conf: &str) -> Redirection {
        let mut inbound_open: BTreeSet<u16> = self.skip_inbound_port.iter().copied().collect();
        inbound_open.insert(self.inbound_exempt_port);
        Redirection {
            inbound_port: self.inbound_port,
            outbound_port: self.outbound_port,
            proxy_uid: self.proxy_uid,
            inbound_open,
            outbound_skipped: self.skip_outbound_port.iter().copied().collect(),
            outbound_skipped_nets: self.skip_outbound_cidr.clone(),
            udp_open: self.udp_port.iter().copied().collect(),
            resolvers: resolvers(resolv_conf),
        }
    }
}

/// The servers that a `resolv.conf` names. What is no address is passed over, as resolvers do.
fn resolvers(resolv_conf: &str) -> BTreeSet<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next() == Some("nameserver");
        words.next().filter(|_| name)?.parse().ok()
    };
    resolv_conf.lines().filter_map(server).collect()
}

/// The pod that this process runs in.
struct Pod;

impl Host for Pod {
    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<(), String> {
        let failed = |what: &str| {
            let what: String = what.trim().chars().take(SAID_MAX).collect();
            format!("{program}: {what}")
        };
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(&error.to_string()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // It may end before it has read all; its exit code and its message say why.
            drop(stdin.write_all(input.as_bytes()));
        }
        let output = child
            .wait_with_output()
            .map_err(|error| failed(&error.to_string()))?;
        if output.status.success() {
            Ok(())
        } else {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(&format!("{}: {said}", output.status)))
        }
    }

    fn ipv6(&self) -> Ipv6 {
        match std::fs::read_to_string(Path::new(IPV6_ADDRESSES)) {
            Ok(table) => Ipv6::of(Some(&table)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ipv6::of(None),
            // Addresses that cannot be seen may be there.
            Err(_) => Ipv6::Addressed,
        }
    }
}

fn report(applied: &Applied) {
    let name = |family: &Family| match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    let families: Vec<&str> = applied.families.iter().map(name).collect();
    say(&serde_json::json!({
        "kind": "diagnostic",
        "level": if applied.refused.is_empty() { "info" } else { "warn" },
        "message": "the pod's traffic is redirected",
        "backend": applied.backend.name(),
        "families": families,
        "refused": applied.refused,
    }));
}

fn fail(code: u8, message: &str) -> ExitCode {
    say(&serde_json::json!({ "kind": "diagnostic", "level": "error", "message": message }));
    ExitCode::from(code)
}

fn say(line: &serde_json::Value) {
    // With standard error gone there is nobody to tell; the exit code still says it.
    drop(writeln!(io::stderr(), "{line}"));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, String> {
        let words = std::iter::once("sidegate-init").chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        cli.check().map(|()| cli)
    }

    #[track_caller]
    fn check_refused(line: &str, expected: &str) {
        let error = parse(line).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_reaches_the_rules() {
        let line = "--inbound-port 1 --outbound-port 2 --proxy-uid 3 --inbound-exempt-port 4 \
             --skip-inbound-port 5 --skip-inbound-port 6,7 --skip-outbound-port 8 \
             --skip-outbound-cidr 10.0.0.0/8,fd00::/8 --udp-port 9";
        let wanted = parse(line).unwrap().redirection("nameserver 10.96.0.10\n");
        assert_eq!((wanted.inbound_port, wanted.outbound_port), (1, 2));
        assert_eq!(wanted.proxy_uid, 3);
        assert_eq!(wanted.inbound_open, BTreeSet::from([4, 5, 6, 7]));
        assert_eq!(wanted.outbound_skipped, BTreeSet::from([8]));
        assert_eq!(wanted.outbound_skipped_nets.len(), 2);
        assert_eq!(wanted.udp_open, BTreeSet::from([9]));
        assert_eq!(wanted.resolvers.len(), 1);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        check_refused("--skip-inbound-port 0", "0");
        check_refused("--skip-inbound-port 65536", "65536");
        check_refused("--skip-outbound-port http", "http");
        check_refused("--skip-outbound-cidr 10.0.0.0/33", "10.0.0.0/33");
        check_refused("--skip-outbound-cidr 10.0.0.0", "10.0.0.0");
        check_refused("--proxy-uid 0", "0");
        check_refused("--inbound-port 19001", "both 19001");
        check_refused("--skip-inbound-port 19006", "sidecar's own");
        check_refused("--skip-inbound-port 19001", "sidecar's own");
        check_refused("--skip-port 1", "unexpected argument");
        check_refused("extra", "unexpected argument");
    }

    #[test]
    fn only_servers_of_the_resolver_are_read() {
        let text = "# nameserver 1.1.1.1\nsearch svc.cluster.local\nnameserver 10.96.0.10\n\
             nameserver\tfd00::a # the second\nnameserver fe80::1%eth0\nnameserver\n";
        let expected = ["10.96.0.10", "fd00::a"].map(|ip| ip.parse().unwrap());
        assert_eq!(resolvers(text), BTreeSet::from(expected));
    }
}
