//! Where a connection was going before it was redirected to this sidecar.
//!
//! The kernel remembers the address that each redirected connection was made to; nothing that the
//! peer sends has a say in it.
//!
//! Invariants: an address is told in one form, IPv4 as IPv4 however the listener sees it; no call
//! goes to loopback, to no address at all, or to a port of this sidecar, whoever asks.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{SockAddr, SockRef};
use tokio::net::TcpStream;

use crate::config::Config;

/// Ports that are a sidecar's in every pod, whatever its configuration says.
const RESERVED: [u16; 4] = [19000, 19001, 19006, 19021];

/// Knows where connections were going.
pub trait Originals: Send + Sync {
    /// The address that the peer of `stream` connected to.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] when it was this sidecar's own, so that nothing was redirected.
    fn of(&self, stream: &TcpStream) -> io::Result<SocketAddr>;
}

/// Asks the kernel's connection tracking, `SO_ORIGINAL_DST`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kernel;

impl Originals for Kernel {
    fn of(&self, stream: &TcpStream) -> io::Result<SocketAddr> {
        let local = stream.local_addr()?;
        let socket = SockRef::from(stream);
        let original = match local.ip().to_canonical() {
            IpAddr::V4(_) => socket.original_dst_v4(),
            IpAddr::V6(_) => socket.original_dst_v6(),
        };
        let original = original.map_err(|error| match error.raw_os_error() {
            // ENOENT: no entry in the table. ENOPROTOOPT: there is no table. ENOTCONN, EINVAL: the
            // connection is gone already.
            Some(2 | 92) => io::ErrorKind::NotFound.into(),
            _ => error,
        })?;
        let original = of_kernel(&original)?;
        if original == canonical(local) {
            // Tracked, but never redirected: it was made to the listener itself.
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(original)
    }
}

fn of_kernel(address: &SockAddr) -> io::Result<SocketAddr> {
    let address = address.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(canonical(address))
}

/// The one form of an address: IPv4 where IPv6 only wraps it, and a scope only where the address
/// means nothing without one.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => address,
        _ => SocketAddr::new(address.ip().to_canonical(), address.port()),
    }
}

/// What is this sidecar's own among all addresses.
#[derive(Clone, Debug, Default)]
pub struct Own {
    ips: Vec<IpAddr>,
    ports: Vec<u16>,
}

impl Own {
    /// The pod's addresses and the listeners of `config`. Without a pod nothing is own.
    pub fn of(config: &Config) -> Self {
        let ips = config.pod.iter().flat_map(|pod| pod.ips.iter());
        let listeners = config.listeners();
        let listeners = listeners.iter().map(|(_, address)| address.port());
        Self {
            ips: ips.map(IpAddr::to_canonical).collect(),
            ports: listeners
                .chain(RESERVED)
                .filter(|port| *port != 0)
                .collect(),
        }
    }

    /// Whether this is an address of the pod.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.ips.contains(&ip)
    }

    /// Why the application may not call `to`, as the log says it.
    pub fn refuses_outbound(&self, to: SocketAddr) -> Option<&'static str> {
        if self.has(to.ip()) {
            return self.ports.contains(&to.port()).then_some("own_port");
        }
        match to.ip() {
            ip if ip.is_unspecified() || to.port() == 0 => Some("unspecified"),
            ip if ip.is_loopback() => Some("loopback"),
            ip if ip.is_multicast() => Some("multicast"),
            _ => None,
        }
    }

    /// Why nobody may call `to` here, as the log says it.
    pub fn refuses_inbound(&self, to: SocketAddr) -> Option<&'static str> {
        match self.has(to.ip()) {
            false => Some("not_this_pod"),
            true if self.ports.contains(&to.port()) || to.port() == 0 => Some("own_port"),
            true => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn own() -> Own {
        Own {
            ips: vec!["10.245.1.4".parse().unwrap(), "fd00::4".parse().unwrap()],
            ports: RESERVED.to_vec(),
        }
    }

    #[track_caller]
    fn outbound(to: &str, refused: Option<&str>) {
        let to = canonical(to.parse().unwrap());
        assert_eq!(own().refuses_outbound(to), refused, "{to}");
    }

    #[track_caller]
    fn inbound(to: &str, refused: Option<&str>) {
        let to = canonical(to.parse().unwrap());
        assert_eq!(own().refuses_inbound(to), refused, "{to}");
    }

    #[test]
    fn the_application_reaches_no_port_of_ours_and_no_loopback_by_redirection() {
        outbound("10.96.0.7:80", None);
        outbound("192.0.2.1:19006", None);
        outbound("10.245.1.4:8080", None);
        for port in RESERVED {
            outbound(&format!("10.245.1.4:{port}"), Some("own_port"));
            outbound(&format!("[fd00::4]:{port}"), Some("own_port"));
            outbound(&format!("[::ffff:10.245.1.4]:{port}"), Some("own_port"));
        }
        outbound("127.0.0.1:8080", Some("loopback"));
        outbound("127.1.2.3:8080", Some("loopback"));
        outbound("[::1]:8080", Some("loopback"));
        outbound("[::ffff:127.0.0.1]:8080", Some("loopback"));
        outbound("0.0.0.0:80", Some("unspecified"));
        outbound("[::]:80", Some("unspecified"));
        outbound("10.96.0.7:0", Some("unspecified"));
        outbound("224.0.0.1:80", Some("multicast"));
    }

    #[test]
    fn callers_reach_the_pods_own_address_and_no_port_of_ours() {
        inbound("10.245.1.4:8080", None);
        inbound("[::ffff:10.245.1.4]:8080", None);
        inbound("[fd00::4]:8080", None);
        inbound("127.0.0.1:8080", Some("not_this_pod"));
        inbound("10.245.1.5:8080", Some("not_this_pod"));
        inbound("10.96.0.7:80", Some("not_this_pod"));
        for port in RESERVED {
            inbound(&format!("10.245.1.4:{port}"), Some("own_port"));
        }
    }

    #[test]
    fn an_address_has_one_form() {
        for (written, read) in [
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("[fe80::1%3]:80", "[fe80::1%3]:80"),
            ("[fd00::1%3]:80", "[fd00::1]:80"),
            ("10.0.0.1:80", "10.0.0.1:80"),
        ] {
            assert_eq!(canonical(written.parse().unwrap()), read.parse().unwrap());
        }
    }

    #[tokio::test]
    async fn a_connection_that_nobody_redirected_has_no_original_destination() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                continue;
            };
            let client = TcpStream::connect(listener.local_addr().unwrap());
            let (client, accepted) = tokio::join!(client, listener.accept());
            let error = Kernel.of(&accepted.unwrap().0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error:?}");
            drop(client);
        }
    }
}
