//! The program: exit codes, what it prints, signals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/mesh.rs"]
mod mesh;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mesh::Mesh;
use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_sidegate-proxy");

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

#[test]
fn the_allocator_is_set_up() {
    // Compiled in from `.cargo/config.toml`, which cargo reads only below this folder.
    let found = Command::new("grep")
        .args([
            "-qaF",
            "narenas:1,tcache_nslots_small_max:64,dirty_decay_ms:1000",
            PROGRAM,
        ])
        .status();
    assert!(found.unwrap().success());
}

#[track_caller]
fn check(output: &Output, code: i32, words: &str) {
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    assert!(
        out.contains(words) || err.contains(words),
        "{words}\n{out}\n{err}"
    );
}

/// A free port: nothing else of this test asks for one in between.
fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

struct Files {
    mesh: Mesh,
    config: PathBuf,
    health: SocketAddr,
}

fn files(more: &str) -> Files {
    let mesh = Mesh::new();
    let config = mesh.path().join("orders.yaml");
    let health = free();
    let text = format!(
        "workload: {{ namespace: shop, serviceAccount: orders }}
ca: {{ address: '127.0.0.1:1', root: root.pem, joinToken: secret-of-orders }}
resources: resources
outbound: {{ address: '127.0.0.1:0' }}
inbound: {{ address: '127.0.0.1:0' }}
admin: {{ address: '127.0.0.1:0' }}
health: {{ address: '{health}' }}
log: {{ path: orders.jsonl }}
{more}
"
    );
    std::fs::write(&config, text).unwrap();
    Files {
        mesh,
        config,
        health,
    }
}

/// A running program, and the lines of its standard error.
struct Running {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Running {
    fn start(files: &Files) -> Self {
        let mut command = Command::new(PROGRAM);
        command.arg("--config").arg(&files.config);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// Waits for the diagnostic with this message.
    fn until(&self, message: &str) -> serde_json::Value {
        loop {
            let line = self.lines.recv_timeout(Duration::from_mins(1));
            let line = line.unwrap_or_else(|error| panic!("no {message:?}: {error}"));
            let value: serde_json::Value =
                serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line}"));
            assert_eq!(value["kind"], "diagnostic", "{line}");
            if value["message"] == message {
                return value;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    fn exit_code(mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only when a test failed before the program ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn wrong_usage_and_wrong_configuration_end_with_2() {
    check(&run(&[]), 2, "--config FILE is needed");
    check(&run(&["--nonsense"]), 2, "--nonsense");
    check(&run(&["--print-config"]), 2, "--config");
    check(
        &run(&["--config", "/nowhere/orders.yaml"]),
        2,
        "/nowhere/orders.yaml",
    );
    let files = files("workers: 0");
    let path = files.config.display().to_string();
    check(
        &run(&["--config", &path]),
        2,
        &format!("{path}:9:10: `workers`"),
    );
}

#[test]
fn printed_configuration_has_defaults_and_no_secret() {
    let files = files("");
    let output = run(&[
        "--config",
        &files.config.display().to_string(),
        "--print-config",
    ]);
    check(&output, 0, "drainTimeout: 30s");
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(
        out.contains("[redacted]") && !out.contains("secret-of-orders"),
        "{out}"
    );
    let root = files.mesh.path().join("root.pem").display().to_string();
    assert!(out.contains(&root), "paths are relative to the file: {out}");
}

#[test]
fn version_is_printed_in_each_form() {
    check(
        &run(&["version"]),
        0,
        concat!("sidegate-proxy ", env!("CARGO_PKG_VERSION")),
    );
    let json = run(&["version", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    check(&run(&["--help"]), 0, "Example: sidegate-proxy --config");
}

#[test]
fn without_a_file_the_environment_says_it() {
    const CONFIG: &str = "
workload: { namespace: shop, serviceAccount: orders }
ca: { root: /root.pem, tokenFile: /token }
controller: { address: 'controller:19012' }
destination: original
";
    let run = |pod: &[(&str, &str)], config: &str, arguments: &[&str]| {
        let mut program = Command::new(PROGRAM);
        program.env("SIDEGATE_CONFIG", config).args(arguments);
        program.envs(pod.iter().copied()).output().unwrap()
    };
    let pod = [
        ("POD_NAME", "orders-1"),
        ("POD_UID", "6f1c"),
        ("POD_IPS", "10.245.1.4"),
    ];
    let printed = run(&pod, CONFIG, &["--print-config"]);
    check(&printed, 0, "10.245.1.4");
    check(&printed, 0, "controller:19012");
    check(&run(&[], CONFIG, &[]), 2, "POD_NAME is not set");
    let wrong = CONFIG.replace("destination", "destinatoin");
    check(
        &run(&pod, &wrong, &[]),
        2,
        "SIDEGATE_CONFIG:5:1: unknown field",
    );
}

#[test]
fn waiting_for_nobody_ends_with_1() {
    let url = format!("http://{}/readyz", free());
    let output = run(&["wait", "--timeout", "200ms", "--url", &url]);
    check(&output, 1, "not ready after 200ms");
    check(
        &run(&["wait", "--url", "https://127.0.0.1/"]),
        1,
        "not an http URL",
    );
}

#[test]
fn a_taken_port_ends_with_1_and_names_the_key() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let files = files("");
    let text = std::fs::read_to_string(&files.config).unwrap();
    let text = text.replace(&files.health.to_string(), &address.to_string());
    std::fs::write(&files.config, text).unwrap();
    let output = run(&["--config", &files.config.display().to_string()]);
    check(
        &output,
        1,
        &format!("cannot listen on {address} (`health.address`"),
    );
    check(&output, 1, "in use");
}

#[test]
fn a_signal_drains_and_ends_with_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let files = files("drainGrace: 10ms");
        let running = Running::start(&files);
        let started = running.until("sidecar started");
        assert_eq!(started["peer.id"], "spiffe://mesh.local/ns/shop/sa/orders");
        let url = format!("http://{}/readyz", files.health);
        // Without its CA it runs, says that it is not ready, and why.
        check(
            &run(&["wait", "--timeout", "1s", "--url", &url]),
            1,
            "no SVID yet",
        );
        running.signal(signal);
        running.until("drain ended");
        assert_eq!(running.exit_code(), 0);
    }
}

#[test]
fn a_second_signal_ends_at_once_with_1() {
    let files = files("drainGrace: 10m\ndrainTimeout: 10m");
    let running = Running::start(&files);
    running.until("sidecar started");
    running.signal(Signal::TERM);
    running.until("drain begun");
    let second = Instant::now();
    running.signal(Signal::TERM);
    assert_eq!(running.exit_code(), 1);
    assert!(second.elapsed() < Duration::from_mins(1));
}

#[test]
fn its_memory_cannot_be_read_by_others_of_the_same_user() {
    let files = files("");
    // Root owns its processes in /proc in any case; only another user's can show the difference.
    let nobody = rustix::process::getuid().is_root().then_some(65_534);
    let program = files.mesh.path().join("sidegate-proxy");
    std::fs::copy(PROGRAM, &program).unwrap();
    for open in [
        files.mesh.path().to_owned(),
        files.config.clone(),
        program.clone(),
    ] {
        std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let mut command = Command::new(&program);
    command.arg("--config").arg(&files.config);
    if let Some(nobody) = nobody {
        command.uid(nobody).gid(nobody);
    }
    let running = Running::spawn(command);
    running.until("sidecar started");
    let memory = std::fs::metadata(format!("/proc/{}/mem", running.child.id())).unwrap();
    assert_eq!(
        memory.uid(),
        0,
        "what cannot be dumped belongs to root in /proc"
    );
    running.signal(Signal::TERM);
    running.until("drain ended");
}
