//! Authorities and the names of services.
//!
//! Invariant: an [`Authority`] that exists has one spelling: lower case, no default port, no
//! user information. Every name form of a service is brought to one [`ServiceName`].

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use crate::spiffe::TrustDomain;

/// The port of an authority that names none: all calls of an application are plain HTTP.
pub const DEFAULT_PORT: u16 = 80;

const HOST_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// Why a `Host` or `:authority` is refused. Each is answered with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AuthorityError {
    /// There is no host.
    #[error("the authority has no host")]
    Empty,
    /// It holds a `@`.
    #[error("the authority has user information")]
    UserInfo,
    /// It holds a comma, so it may be two.
    #[error("the authority is a list")]
    List,
    /// A label is empty, too long, or has another character than letters, digits, `-` and `_`.
    #[error("the authority's host is not a name or an address")]
    Host,
    /// The port is no number from 1 to 65535 in its plain form.
    #[error("the authority's port is not a number from 1 to 65535")]
    Port,
}

impl AuthorityError {
    /// The reason code of logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Empty => "authority_empty",
            Self::UserInfo => "authority_user_info",
            Self::List => "authority_list",
            Self::Host => "authority_host",
            Self::Port => "authority_port",
        }
    }
}

/// Where a request wants to go: a host in lower case and a port that is not 80.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Authority {
    host: Box<str>,
    port: Option<u16>,
}

impl Authority {
    /// Reads the value of `Host` or `:authority`.
    ///
    /// # Errors
    ///
    /// [`AuthorityError`] when it could mean two things to two servers.
    pub fn parse(text: &str) -> Result<Self, AuthorityError> {
        if text.as_bytes().contains(&b'@') {
            return Err(AuthorityError::UserInfo);
        }
        if text.as_bytes().contains(&b',') {
            return Err(AuthorityError::List);
        }
        let (host, port) = split_port(text)?;
        Ok(Self {
            host: canonical_host(host)?,
            port: port
                .map(parse_port)
                .transpose()?
                .filter(|port| *port != DEFAULT_PORT),
        })
    }

    /// The host in lower case, an IPv6 address in its brackets; never with a trailing dot.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; `None` when it is absent or the default, [`DEFAULT_PORT`].
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// The port that is meant.
    pub fn port_or_default(&self) -> u16 {
        self.port.unwrap_or(DEFAULT_PORT)
    }
}

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => f.write_str(&self.host),
        }
    }
}

/// A service: its name in its namespace. Displayed as `orders.shop`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// The namespace.
    pub namespace: String,
    /// The name in it.
    pub name: String,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.name, self.namespace)
    }
}

/// The service that a host names for a caller in `own_namespace`.
///
/// The forms are `orders`, `orders.shop`, `orders.shop.svc`, `orders.shop.svc.cluster.local` and
/// the same below the mesh's own trust domain, each with or without a dot at its end. Any other
/// host, an address among them, names no service.
pub fn service_of(
    host: &str,
    own_namespace: &str,
    trust_domain: &TrustDomain,
) -> Option<ServiceName> {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let mut labels = host.splitn(4, '.');
    let name = labels.next()?;
    let namespace = labels.next().unwrap_or(own_namespace);
    let has_form = match (labels.next(), labels.next()) {
        (None, None) => true,
        (Some(svc), domain) => {
            let known = |domain| domain == "cluster.local" || domain == trust_domain.as_str();
            svc == "svc" && domain.is_none_or(known)
        }
        (None, Some(_)) => false,
    };
    (has_form && is_dns_label(name) && is_dns_label(namespace)).then(|| ServiceName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

/// Whether a text is a DNS label as RFC 1123 and Kubernetes have it: 1 to 63 characters of `a-z`,
/// `0-9` and `-`, a `-` neither first nor last.
pub(crate) fn is_dns_label(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=LABEL_BYTES_MAX).contains(&text.len())
        && text.bytes().all(allowed)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn split_port(text: &str) -> Result<(&str, Option<&str>), AuthorityError> {
    let after_address = match text.bytes().position(|byte| byte == b']') {
        Some(end) => end + 1,
        None => 0,
    };
    let (address, rest) = text
        .split_at_checked(after_address)
        .ok_or(AuthorityError::Host)?;
    match rest.split_once(':') {
        None if address.is_empty() => Ok((rest, None)),
        None if rest.is_empty() => Ok((address, None)),
        Some((host, port)) if address.is_empty() => Ok((host, Some(port))),
        Some(("", port)) => Ok((address, Some(port))),
        _ => Err(AuthorityError::Host),
    }
}

fn canonical_host(host: &str) -> Result<Box<str>, AuthorityError> {
    if let Some(address) = host.strip_prefix('[') {
        let address = address.strip_suffix(']').ok_or(AuthorityError::Host)?;
        let address: Ipv6Addr = address.parse().ok().ok_or(AuthorityError::Host)?;
        return Ok(format!("[{address}]").into());
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.is_empty() {
        return Err(AuthorityError::Empty);
    }
    if name.len() > HOST_BYTES_MAX || !name.split('.').all(is_host_label) {
        return Err(AuthorityError::Host);
    }
    Ok(name.to_ascii_lowercase().into())
}

fn is_host_label(label: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=LABEL_BYTES_MAX).contains(&label.len())
        && label.bytes().all(allowed)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn parse_port(text: &str) -> Result<u16, AuthorityError> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    match text.parse() {
        Ok(port) if plain => Ok(port),
        _ => Err(AuthorityError::Port),
    }
}
