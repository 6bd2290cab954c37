//! Proxies on the way to a cluster, which this command line cannot use.
//!
//! Always true: a proxy of the environment counts only where `NO_PROXY` does not spare the
//! cluster, as for kubectl; one that counts is an error that says what to do instead.

use std::net::IpAddr;

use anyhow::bail;
use hyper::Uri;
use kube::Config;

/// Leaves out a proxy of the environment that does not count for this cluster.
///
/// # Errors
///
/// When the cluster is to be reached through a proxy.
pub(super) fn spare(config: &mut Config, name: &str) -> anyhow::Result<()> {
    let Some(proxy) = config.proxy_url.clone() else {
        return Ok(());
    };
    let variable = |names: [&str; 2]| {
        let mut values = names
            .into_iter()
            .filter_map(|name| std::env::var(name).ok());
        values.find(|value| !value.is_empty())
    };
    let of_environment = variable(["HTTPS_PROXY", "https_proxy"]);
    let is_of_environment =
        of_environment.is_some_and(|of| of.parse::<Uri>().is_ok_and(|of| of == proxy));
    let host = config.cluster_url.host().unwrap_or_default();
    let list = variable(["NO_PROXY", "no_proxy"]).unwrap_or_default();
    if is_of_environment && is_spared(host, config.cluster_url.port_u16(), &list) {
        config.proxy_url = None;
        return Ok(());
    }
    let proxy = proxy.authority().map(|authority| {
        // A password may stand before the `@`.
        let authority = authority.as_str();
        authority
            .rsplit_once('@')
            .map_or(authority, |(_, host)| host)
            .to_owned()
    });
    bail!(
        "the cluster {name} would be reached through the proxy {}, which is not supported: put {host} \
         into NO_PROXY, or run `kubectl proxy` and use a kubeconfig whose server is \
         http://127.0.0.1:8001",
        proxy.unwrap_or_default()
    );
}

/// Whether `NO_PROXY` spares a host: this machine always; else by name, domain, address or network,
/// each perhaps with a port.
fn is_spared(host: &str, port: Option<u16>, list: &str) -> bool {
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_ascii_lowercase();
    let address: Option<IpAddr> = host.parse().ok();
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    let mut entries = list
        .split(',')
        .map(|entry| entry.trim().to_ascii_lowercase());
    entries.any(|entry| {
        if let (Some(address), Ok(network)) = (address, entry.parse::<ipnet::IpNet>()) {
            return network.contains(&address);
        }
        let (entry, of) = match entry.rsplit_once(':') {
            Some((entry, of)) if of.parse::<u16>().is_ok() && !entry.contains(':') => {
                (entry.to_owned(), of.parse().ok())
            }
            _ => (entry, None),
        };
        let domain = entry.trim_start_matches("*.").trim_start_matches('.');
        let is_below = || {
            host.strip_suffix(domain)
                .is_some_and(|rest| rest.ends_with('.'))
        };
        let is_it = host == entry || (address.is_none() && !domain.is_empty() && is_below());
        (entry == "*" || is_it) && (of.is_none() || of == port)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_spares_as_for_kubectl() {
        for (host, list, spared) in [
            ("127.0.0.1", "", true),
            ("localhost", "", true),
            ("[::1]", "", true),
            ("k8s.example.com", "", false),
            ("k8s.example.com", "other, example.com", true),
            ("k8s.example.com", ".example.com", true),
            ("k8s.example.com", "*.example.com", true),
            ("k8s.badexample.com", "example.com", false),
            ("K8S.example.com", "k8s.example.com:6443", true),
            ("k8s.example.com", "k8s.example.com:443", false),
            ("10.1.2.3", "10.0.0.0/8", true),
            ("10.1.2.3", "10.1.2.3", true),
            ("11.1.2.3", "10.0.0.0/8", false),
            ("k8s.example.com", "*", true),
        ] {
            assert_eq!(is_spared(host, Some(6443), list), spared, "{host} {list}");
        }
    }
}
