//! What the kernel itself says of redirected connections, in a network of its own. Needs root.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use sidegate_proxy::original::{Kernel, Originals, canonical};
use tokio::net::TcpListener;

/// Set in the process that listens within the network.
const ROLE: &str = "SIDEGATE_TEST_LISTEN";

const RULES: &str = "
table inet sidegate_test {
  chain in { type nat hook prerouting priority -100;
    tcp dport != 19006 redirect to :19006
  }
  chain out { type nat hook output priority -100;
    tcp dport 1-1024 redirect to :19001
  }
}
";

/// Two networks, connected: `pod` redirects, `peer` calls.
struct Networks {
    pod: String,
    peer: String,
}

fn run(command: &str) -> bool {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap();
    let output = Command::new(program).args(words).output();
    match output {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("{command}: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(error) => {
            eprintln!("{command}: {error}");
            false
        }
    }
}

impl Networks {
    /// `None` where this machine gives none.
    fn new() -> Option<Self> {
        let id = std::process::id();
        let networks = Self {
            pod: format!("sgpod{id}"),
            peer: format!("sgpeer{id}"),
        };
        let (pod, peer) = (&networks.pod, &networks.peer);
        let made = [
            format!("ip netns add {pod}"),
            format!("ip netns add {peer}"),
            format!("ip -n {pod} link add eth0 type veth peer name eth0 netns {peer}"),
            format!("ip -n {pod} addr add 10.245.1.4/24 dev eth0"),
            format!("ip -n {peer} addr add 10.245.1.5/24 dev eth0"),
            format!("ip -n {pod} link set lo up"),
            format!("ip -n {pod} link set eth0 up"),
            format!("ip -n {peer} link set eth0 up"),
            format!("ip -n {pod} route add default via 10.245.1.5"),
        ];
        if !made.iter().all(|command| run(command)) {
            return None;
        }
        // Where there is no IPv6 the rest is tried without.
        run(&format!("ip -n {pod} addr add fd00::4/64 dev eth0 nodad"));
        run(&format!("ip -n {peer} addr add fd00::5/64 dev eth0 nodad"));
        let rules = std::env::temp_dir().join(format!("{pod}.nft"));
        std::fs::write(&rules, RULES).ok()?;
        let loaded = run(&format!("ip netns exec {pod} nft -f {}", rules.display()));
        drop(std::fs::remove_file(rules));
        loaded.then_some(networks)
    }

    /// This test again, as the process that listens in the pod's network.
    fn listen(&self) -> Child {
        Command::new("ip")
            .args(["netns", "exec", &self.pod])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "kernel::it_says_where_connections_were_going",
            ])
            .env(ROLE, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn connect(network: &str, to: SocketAddr) {
        let script = format!("exec 3<>/dev/tcp/{}/{}", to.ip(), to.port());
        let status = Command::new("ip")
            .args(["netns", "exec", network, "bash", "-c", &script])
            .status();
        assert!(status.unwrap().success(), "{to}");
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        run(&format!("ip netns del {}", self.pod));
        run(&format!("ip netns del {}", self.peer));
    }
}

/// Prints what the kernel says of each connection, until it is killed.
async fn listen() {
    let mut listening = tokio::task::JoinSet::new();
    for address in ["127.0.0.1:19001", "[::1]:19001", "[::]:19006"] {
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) => {
                println!("no {address}: {error}");
                continue;
            }
        };
        println!("listening {address}");
        listening.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                match Kernel.of(&stream) {
                    Ok(original) => println!("original {}", canonical(original)),
                    Err(error) => println!("error {:?}", error.kind()),
                }
            }
        });
    }
    println!("ready");
    listening.join_all().await;
}

/// Kills what listens, however the test ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
async fn it_says_where_connections_were_going() {
    if std::env::var_os(ROLE).is_some() {
        return listen().await;
    }
    let Some(networks) = Networks::new() else {
        eprintln!("SKIPPED: no network namespaces with nftables here; they need root");
        return;
    };
    let mut listener = Killed(networks.listen());
    let output = BufReader::new(listener.0.stdout.take().unwrap());
    let mut lines = output.lines().map_while(Result::ok);
    let mut line = |wanted: &str| lines.find(|line| line.contains(wanted)).unwrap();
    line("ready");
    let mut check = |network: &str, to: &str, said: &str| {
        Networks::connect(network, to.parse().unwrap());
        let heard = line(" ");
        assert_eq!(heard, said, "{to}");
    };
    // The application's own calls.
    check(&networks.pod, "10.96.0.7:80", "original 10.96.0.7:80");
    check(&networks.pod, "10.245.1.4:80", "original 10.245.1.4:80");
    // Callers; the listener is one for IPv6 and IPv4.
    check(
        &networks.peer,
        "10.245.1.4:8080",
        "original 10.245.1.4:8080",
    );
    // Made to the listeners themselves.
    check(&networks.pod, "127.0.0.1:19001", "error NotFound");
    check(&networks.peer, "10.245.1.4:19006", "error NotFound");
    let six = Command::new("ip")
        .args(["-n", &networks.peer, "-6", "addr", "show", "dev", "eth0"])
        .output();
    if !String::from_utf8_lossy(&six.unwrap().stdout).contains("fd00::5") {
        eprintln!("SKIPPED: no IPv6 here");
        return;
    }
    check(&networks.peer, "[fd00::4]:8080", "original [fd00::4]:8080");
    check(&networks.pod, "[fd00::5]:80", "original [fd00::5]:80");
}
