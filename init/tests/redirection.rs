//! The rules with real connections, in network namespaces of this machine: a pod and a peer.
//!
//! Needs root; says SKIPPED without. The test binary plays every part: servers in the pod and at the
//! peer, and clients of any user.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

/// Longest wait for an answer that must come.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long is listened for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(300);

const POD: [&str; 2] = ["10.99.0.1", "fd99::1"];
const PEER: [&str; 2] = ["10.99.0.2", "fd99::2"];
/// Another address of the peer, which the tests skip.
const SKIPPED: [&str; 2] = ["10.98.0.2", "fd98::2"];

const APPLICATION: u32 = 1000;
const SIDECAR: u32 = 1519;

/// Two namespaces joined by a cable, and servers in both.
struct World {
    pod: String,
    peer: String,
    servers: Vec<Child>,
    folder: TempDir,
}

impl World {
    /// `None` where this machine cannot have one.
    fn new(name: &str) -> Option<Self> {
        let can = |program: &str, argument: &str| {
            let run = Command::new(program)
                .arg(argument)
                .stdout(Stdio::null())
                .status();
            run.is_ok_and(|status| status.success())
        };
        let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
        let tools = can("nft", "--version") && can("iptables-nft", "--version");
        if !root || !tools || !can("setpriv", "--version") || !can("ip", "-V") {
            // Not by a macro, whose text the harness keeps.
            let line = "SKIPPED: redirection with real connections needs root, ip, setpriv, nft and iptables-nft\n";
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        // Other users may not be able to enter the build folder.
        std::fs::copy(std::env::current_exe().unwrap(), folder.path().join("role")).unwrap();
        let mut world = Self {
            pod: format!("sg{name}{}a", std::process::id()),
            peer: format!("sg{name}{}b", std::process::id()),
            servers: Vec::new(),
            folder,
        };
        world.lay_cables();
        world.serve();
        Some(world)
    }

    fn lay_cables(&self) {
        let (pod, peer) = (&self.pod, &self.peer);
        for namespace in [pod, peer] {
            ip(&format!("netns add {namespace}"));
            ip(&format!("-n {namespace} link set lo up"));
        }
        ip(&format!(
            "-n {pod} link add eth0 type veth peer name eth0 netns {peer}"
        ));
        for (namespace, addresses) in [(pod, vec![POD]), (peer, vec![PEER, SKIPPED])] {
            for [v4, v6] in addresses {
                ip(&format!("-n {namespace} addr add {v4}/24 dev eth0"));
                ip(&format!("-n {namespace} addr add {v6}/64 dev eth0 nodad"));
            }
            ip(&format!("-n {namespace} link set eth0 up"));
        }
        ip(&format!("-n {pod} route add 10.98.0.0/24 dev eth0"));
        ip(&format!("-n {pod} route add fd98::/64 dev eth0"));
    }

    fn serve(&mut self) {
        let pod = "tcp:[::]:19006 tcp:127.0.0.1:19001 tcp:[::1]:19001 tcp:[::]:19021 tcp:[::]:8080 \
                   tcp:[::]:9090 udp:[::]:5000 udp:[::]:5001";
        let peer = "tcp:[::]:8080 tcp:[::]:3306 tcp:[::]:53 udp:[::]:5000";
        for (namespace, listeners) in [(self.pod.clone(), pod), (self.peer.clone(), peer)] {
            let mut child = self
                .role(&namespace, 0, &format!("serve {listeners}"))
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap().contains("ready")));
            self.servers.push(child);
        }
    }

    /// This binary in another role, namespace and user.
    fn role(&self, namespace: &str, user: u32, role: &str) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", namespace, "setpriv"])
            .args([
                &format!("--reuid={user}"),
                &format!("--regid={user}"),
                "--clear-groups",
            ])
            .arg(self.folder.path().join("role"))
            .args(["role", "--exact", "--ignored", "--nocapture"])
            .env("SIDEGATE_TEST_ROLE", role);
        command
    }

    /// What a client is answered, or why not.
    fn ask(&self, namespace: &str, user: u32, question: &str) -> String {
        let output = self.role(namespace, user, question).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let answer = text.lines().find_map(|line| line.split("ANSWER ").nth(1));
        answer
            .unwrap_or_else(|| panic!("{question}: {text}"))
            .to_owned()
    }

    /// A connection from the peer.
    #[track_caller]
    fn peer_calls(&self, to: &str, expected: &str) {
        assert_eq!(
            self.ask(&self.peer, 0, &format!("tcp {to}")),
            expected,
            "peer to {to}"
        );
    }

    /// A connection from the pod.
    #[track_caller]
    fn pod_calls(&self, user: u32, to: &str, expected: &str) {
        let answer = self.ask(&self.pod, user, &format!("tcp {to}"));
        assert_eq!(answer, expected, "user {user} of the pod to {to}");
    }

    /// Runs `sidegate-init` in the pod; `path` says which backends it finds.
    fn init(&self, path: &Path) {
        let resolv_conf = self.folder.path().join("resolv.conf");
        std::fs::write(
            &resolv_conf,
            format!("nameserver {}\nnameserver {}\n", PEER[0], PEER[1]),
        )
        .unwrap();
        let status = Command::new("ip")
            .args(["netns", "exec", &self.pod, "/usr/bin/env"])
            .arg(format!("PATH={}", path.display()))
            .arg(env!("CARGO_BIN_EXE_sidegate-init"))
            .args("--skip-inbound-port 9090 --skip-outbound-port 3306 --udp-port 5000".split(' '))
            .args([
                "--skip-outbound-cidr",
                "10.98.0.0/24,fd98::/64",
                "--resolv-conf",
            ])
            .arg(resolv_conf)
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// The rules that are there, without counters.
    fn rules(&self) -> String {
        self.nft("-s list ruleset")
    }

    fn nft(&self, arguments: &str) -> String {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.pod, "nft"])
            .args(arguments.split(' '))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for server in &mut self.servers {
            server.kill().ok();
            server.wait().ok();
        }
        for namespace in [&self.pod, &self.peer] {
            Command::new("ip")
                .args(["netns", "del", namespace])
                .status()
                .ok();
        }
    }
}

#[track_caller]
fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// A folder in which only the programs of `iptables` are.
fn without_nft(folder: &Path) -> PathBuf {
    let bin = folder.join("bin");
    std::fs::create_dir(&bin).unwrap();
    for name in [
        "iptables-nft",
        "ip6tables-nft",
        "iptables-nft-restore",
        "ip6tables-nft-restore",
    ] {
        let found = ["/usr/sbin", "/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(name));
        let program = found.into_iter().find(|path| path.exists()).unwrap();
        symlink(program, bin.join(name)).unwrap();
    }
    bin
}

/// Every kind of connection goes where it must.
#[track_caller]
fn check_redirection(world: &World) {
    for family in [0, 1] {
        let at = |address: [&str; 2], port: u16| {
            SocketAddr::new(address[family].parse::<IpAddr>().unwrap(), port).to_string()
        };
        let loopback = ["127.0.0.1", "::1"];
        let to = |port: u16, original: &str| format!("{port} {original}");
        // In: everything to the gate, but for the ports that are open.
        world.peer_calls(&at(POD, 8080), &to(19006, &at(POD, 8080)));
        world.peer_calls(&at(POD, 19001), &to(19006, &at(POD, 19001)));
        world.peer_calls(&at(POD, 19006), "19006 -");
        world.peer_calls(&at(POD, 19021), "19021 -");
        world.peer_calls(&at(POD, 9090), "9090 -");
        // Out: any user but the sidecar's.
        for user in [APPLICATION, 0] {
            world.pod_calls(user, &at(PEER, 8080), &to(19001, &at(PEER, 8080)));
            world.pod_calls(user, &at(POD, 8080), &to(19001, &at(POD, 8080)));
            world.pod_calls(user, &at(loopback, 8080), "8080 -");
            world.pod_calls(user, &at(PEER, 3306), "3306 -");
            world.pod_calls(user, &at(SKIPPED, 8080), "8080 -");
            world.pod_calls(user, &at(PEER, 53), "53 -");
        }
        world.pod_calls(SIDECAR, &at(PEER, 8080), "8080 -");
        world.pod_calls(SIDECAR, &at(POD, 8080), "8080 -");
        // Other protocols: what is named comes in, and answers do.
        let closed = world.ask(&world.peer, 0, &format!("udp {}", at(POD, 5001)));
        assert_eq!(closed, "silence");
        let open = world.ask(&world.peer, 0, &format!("udp {}", at(POD, 5000)));
        assert_eq!(open, "5000");
        let answered = world.ask(&world.pod, APPLICATION, &format!("udp {}", at(PEER, 5000)));
        assert_eq!(answered, "5000", "DNS is such an answer");
    }
}

#[test]
fn nftables_redirects_every_kind_of_connection_and_twice_is_once() {
    let Some(world) = World::new("n") else { return };
    world.init(Path::new("/usr/sbin:/usr/bin:/sbin:/bin"));
    let once = world.rules();
    assert!(once.contains("table ip sidegate"), "{once}");
    world.init(Path::new("/usr/sbin:/usr/bin:/sbin:/bin"));
    assert_eq!(world.rules(), once);
    check_redirection(&world);
}

#[test]
fn iptables_redirects_every_kind_of_connection_and_twice_is_once() {
    let Some(world) = World::new("i") else { return };
    let path = without_nft(world.folder.path());
    world.init(&path);
    let once = world.rules();
    assert!(once.contains("SIDEGATE_INBOUND"), "{once}");
    assert!(!once.contains("table ip sidegate"), "{once}");
    world.init(&path);
    assert_eq!(world.rules(), once);
    check_redirection(&world);
}

#[test]
fn a_connection_that_was_not_redirected_is_not_let_in() {
    let Some(world) = World::new("g") else { return };
    world.init(Path::new("/usr/sbin:/usr/bin:/sbin:/bin"));
    world.nft("delete chain ip sidegate inbound");
    world.peer_calls("10.99.0.1:9090", "9090 -");
    world.peer_calls("10.99.0.1:8080", "silence");
}

/// The other roles of this binary; not a test.
#[test]
#[ignore = "a role of the other tests"]
fn role() {
    let Ok(role) = std::env::var("SIDEGATE_TEST_ROLE") else {
        return;
    };
    let words: Vec<&str> = role.split_whitespace().collect();
    match words[0] {
        "serve" => serve(&words[1..]),
        "tcp" => answer(&ask_tcp(words[1].parse().unwrap())),
        "udp" => answer(&ask_udp(words[1].parse().unwrap())),
        other => panic!("{other}"),
    }
}

fn answer(text: &str) {
    println!("\nANSWER {text}");
}

fn serve(listeners: &[&str]) {
    for listener in listeners {
        let (protocol, address) = listener.split_once(':').unwrap();
        let address: SocketAddr = address.parse().unwrap();
        if protocol == "udp" {
            let socket = UdpSocket::bind(address).unwrap();
            std::thread::spawn(move || serve_udp(&socket, address.port()));
        } else {
            let listener = TcpListener::bind(address).unwrap();
            std::thread::spawn(move || serve_tcp(&listener, address.port()));
        }
    }
    println!("\nready");
    loop {
        std::thread::park();
    }
}

/// Says which port it is, and where the caller was going before it was redirected.
fn serve_tcp(listener: &TcpListener, port: u16) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let socket = socket2::SockRef::from(&stream);
        let local = canonical(stream.local_addr().unwrap());
        let original = if local.is_ipv4() {
            socket.original_dst_v4()
        } else {
            socket.original_dst_v6()
        };
        let original = original.ok().and_then(|it| it.as_socket());
        let original = original
            .map(canonical)
            .filter(|original| *original != local);
        let original = original.map_or("-".to_owned(), |original| original.to_string());
        stream
            .write_all(format!("{port} {original}").as_bytes())
            .ok();
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn serve_udp(socket: &UdpSocket, port: u16) {
    let mut buffer = [0; 16];
    loop {
        let (_, from) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(port.to_string().as_bytes(), from).unwrap();
    }
}

fn ask_tcp(to: SocketAddr) -> String {
    // Only the test of what must not come in waits this long for nothing.
    let Ok(mut stream) = TcpStream::connect_timeout(&to, PATIENCE / 10) else {
        return "silence".to_owned();
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn ask_udp(to: SocketAddr) -> String {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    let patience = if to.port() == 5001 { SILENCE } else { PATIENCE };
    socket.set_read_timeout(Some(patience)).unwrap();
    socket.send_to(b"?", to).unwrap();
    let mut buffer = [0; 16];
    match socket.recv(&mut buffer) {
        Ok(length) => String::from_utf8_lossy(&buffer[..length]).into_owned(),
        Err(_) => "silence".to_owned(),
    }
}
