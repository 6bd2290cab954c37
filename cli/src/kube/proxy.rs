//! Proxies on the way to a cluster.
//!
//! Always true: the same proxy as kubectl's. The kubeconfig's own `proxy-url` counts as it stands;
//! one of the environment only where `NO_PROXY` does not spare the cluster. What cannot be used is
//! an error before anything is asked.

use std::net::IpAddr;

use anyhow::{Context, bail};
use hyper::Uri;
use kube::Config;
use kube::config::Kubeconfig;

/// What the kubeconfig itself says about the way to the cluster of this context.
pub(super) fn said_by(kubeconfig: &Kubeconfig, context: &str) -> Option<String> {
    let mut contexts = kubeconfig.contexts.iter();
    let context = contexts.find(|known| known.name == context)?;
    let cluster = &context.context.as_ref()?.cluster;
    let mut clusters = kubeconfig.clusters.iter();
    let cluster = clusters.find(|known| known.name == *cluster)?;
    cluster.cluster.as_ref()?.proxy_url.clone()
}

/// Chooses the proxy through which a cluster is reached, or none; gives it as messages show it. What
/// the client has chosen by
/// itself does not count: it asks `NO_PROXY` about the proxy instead of the cluster.
///
/// # Errors
///
/// When the proxy is none that can be used.
pub(super) fn choose(
    config: &mut Config,
    said: Option<String>,
    name: &str,
) -> anyhow::Result<Option<String>> {
    let environment = |variable: &str| std::env::var(variable).ok();
    let proxy = proxy_for(&config.cluster_url, said, &environment);
    config.proxy_url = proxy.as_ref().map(|proxy| read(proxy, name)).transpose()?;
    Ok(proxy.map(|proxy| shown(&proxy).to_owned()))
}

fn proxy_for(
    cluster: &Uri,
    said: Option<String>,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Option<String> {
    let variable = |name: &str| {
        let spellings = [name.to_owned(), name.to_lowercase()];
        let mut values = spellings.iter().filter_map(|name| environment(name));
        values.find(|value| !value.is_empty())
    };
    let of_environment = || {
        let list = variable("NO_PROXY").unwrap_or_default();
        let host = cluster.host().unwrap_or_default();
        let proxy = variable(match cluster.scheme_str() {
            Some("http") => "HTTP_PROXY",
            _ => "HTTPS_PROXY",
        });
        proxy.filter(|_| !is_spared(host, port_of(cluster), &list))
    };
    said.filter(|said| !said.is_empty()).or_else(of_environment)
}

fn port_of(cluster: &Uri) -> Option<u16> {
    let usual = match cluster.scheme_str() {
        Some("http") => 80,
        _ => 443,
    };
    cluster.port_u16().or(Some(usual))
}

/// A password may stand before the `@`.
fn shown(proxy: &str) -> &str {
    proxy.rsplit_once('@').map_or(proxy, |(_, host)| host)
}

fn read(proxy: &str, name: &str) -> anyhow::Result<Uri> {
    let whole = if proxy.contains("://") {
        proxy.to_owned()
    } else {
        format!("http://{proxy}")
    };
    let shown = shown(proxy);
    let uri: Uri = whole
        .parse()
        .with_context(|| format!("the proxy {shown} of the cluster {name} is no URL"))?;
    match uri.scheme_str() {
        Some("http" | "https") if uri.host().is_some_and(|host| !host.is_empty()) => Ok(uri),
        scheme => bail!(
            "the cluster {name} would be reached through the proxy {shown} by `{}`, and only http \
             and https are supported: put the cluster into NO_PROXY, or run `kubectl proxy` and use \
             a kubeconfig whose server is http://127.0.0.1:8001",
            scheme.unwrap_or_default()
        ),
    }
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

    #[test]
    fn the_kubeconfigs_proxy_counts_as_it_stands_and_the_environments_unless_spared() {
        let environment = |variable: &str| {
            let value = match variable {
                "HTTPS_PROXY" => "proxy.example.com:3128",
                "http_proxy" => "http://plain.example.com",
                "no_proxy" => ".internal",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let chosen = |cluster: &str, said: Option<&str>| {
            let cluster = cluster.parse().unwrap();
            let proxy = proxy_for(&cluster, said.map(str::to_owned), &environment)?;
            Some(read(&proxy, "test").unwrap().to_string())
        };
        let https = Some("http://proxy.example.com:3128/".to_owned());
        assert_eq!(chosen("https://k8s.example.com:6443", None), https);
        assert_eq!(chosen("https://k8s.example.com:6443", Some("")), https);
        assert_eq!(chosen("https://k8s.internal:6443", None), None);
        assert_eq!(chosen("https://127.0.0.1:6443", None), None);
        let plain = Some("http://plain.example.com/".to_owned());
        assert_eq!(chosen("http://k8s.example.com", None), plain);
        let own = Some("https://own.example.com/".to_owned());
        assert_eq!(
            chosen("https://k8s.internal:6443", Some("https://own.example.com")),
            own
        );
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_said_without_its_password() {
        for (proxy, expected) in [
            ("socks5://user:secret@proxy:1080", "proxy:1080 by `socks5`"),
            (
                "http://user:secret@pro xy",
                "the proxy pro xy of the cluster test is no URL",
            ),
        ] {
            let error = format!("{:#}", read(proxy, "test").unwrap_err());
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
