//! The real binary: its command line, its signals, its logs, and a disk that is full.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{
    BundleSet, CaClient, CaClientConfig, Evidence, Issue, IssueError, IssueRequest, JoinToken,
    SystemClock, Trust, Verifier, VerifyLimits, crypto_provider,
};
use tempfile::TempDir;

use crate::harness::{Key, PATIENCE, check_refused};

/// One state folder and configuration; CAs come and go.
pub(crate) struct Site {
    pub(crate) folder: TempDir,
}

/// One CA process, killed when it is dropped.
pub(crate) struct Process {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    pub(crate) address: String,
}

impl Site {
    pub(crate) fn new(more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config =
            format!("stateDir: state\naddress: 127.0.0.1:0\nmetricsAddress: 127.0.0.1:0\n{more}");
        std::fs::write(folder.path().join("ca.yaml"), config).unwrap();
        Self { folder }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("state").join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sidegate-ca"));
        command.current_dir(self.folder.path());
        command.env_remove("SIDEGATE_CA_SOCKET");
        command
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn ask(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        text
    }

    #[track_caller]
    fn refuse(&self, arguments: &[&str], code: i32, words: &str) {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?}: {words}: {error}");
        assert!(output.stdout.is_empty());
    }

    /// Starts a CA and waits until it serves.
    pub(crate) fn serve(&self) -> Process {
        let mut command = self.command();
        command.args(["serve", "--config", "ca.yaml"]);
        let mut process = Process::spawn(command);
        process.wait_until_serving();
        process
    }

    /// Starts a CA and does not wait for it.
    pub(crate) fn begin(&self) -> Process {
        let mut command = self.command();
        command.args(["serve", "--config", "ca.yaml"]);
        Process::spawn(command)
    }

    pub(crate) fn verifier(&self) -> Arc<Verifier> {
        let pem = std::fs::read(self.file("root.pem")).unwrap();
        let bundles = BundleSet::from_pem(&"mesh.local".parse().unwrap(), &pem).unwrap();
        let trust = Trust::from_bundles(bundles);
        Arc::new(Verifier::from_trust(trust, VerifyLimits::default()))
    }

    async fn join(&self, ca: &Process, token: &str, key: &Key) -> Result<(), IssueError> {
        let evidence = Evidence::JoinToken(JoinToken::new(token.trim()));
        let request = IssueRequest {
            csr: key.csr.clone(),
            current: None,
            verifier: self.verifier(),
        };
        client(&ca.address, evidence).issue(request).await.map(drop)
    }
}

pub(crate) fn client(address: &str, evidence: Evidence) -> CaClient {
    let trust_domain = "mesh.local".parse().unwrap();
    let config = CaClientConfig::new(&trust_domain, address, evidence).unwrap();
    CaClient::new(config, crypto_provider(), Arc::new(SystemClock))
}

impl Process {
    fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = read_lines(child.stderr.take().unwrap());
        Self {
            child,
            lines,
            seen: Vec::new(),
            address: String::new(),
        }
    }

    pub(crate) fn wait_until_serving(&mut self) {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("it does not serve: {:?}", self.seen));
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            self.seen.push(line);
            if event["message"] == "serving" {
                self.address = event["address"].as_str().unwrap().into();
                return;
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn terminate(mut self) -> (Option<i32>, Vec<String>) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        let mut lines = std::mem::take(&mut self.seen);
        lines.extend(self.lines.iter());
        (status.code(), lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already, mostly.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn read_lines(stderr: ChildStderr) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

#[test]
fn the_configuration_is_printed_and_wrong_ones_exit_with_two() {
    let site = Site::new("leafLifetime: 90m\n");
    let printed = site.ask(&["serve", "--config", "ca.yaml", "--print-config"]);
    assert!(printed.contains("leafLifetime: 1h 30m") && printed.contains("trustDomain"));
    assert!(!site.file("root.key").exists(), "nothing is made");
    site.refuse(&["serve", "--config", "none.yaml"], 2, "none.yaml");
    let wrong = Site::new("leafLifetme: 1h\n");
    wrong.refuse(&["serve"], 2, "leafLifetme");
    wrong.refuse(&["serve", "--nonsense"], 2, "--nonsense");
}

#[test]
fn without_a_running_ca_the_remedy_is_named() {
    let site = Site::new("");
    site.refuse(&["token", "list"], 1, "start it with `sidegate-ca serve");
    site.refuse(
        &["issued", "--socket", "/nowhere/admin.sock"],
        1,
        "no CA answers at /nowhere",
    );
    std::fs::remove_file(site.folder.path().join("ca.yaml")).unwrap();
    site.refuse(&["status"], 2, "--config FILE");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_prints_tables_json_and_yaml() {
    let site = Site::new("");
    let ca = site.serve();
    let token = site.ask(&[
        "token",
        "create",
        "--namespace",
        "shop",
        "--service-account",
        "web",
    ]);
    let key = Key::new();
    site.join(&ca, &token, &key).await.unwrap();
    let id = "spiffe://mesh.local/ns/shop/sa/web";
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_str(&site.ask(&[arguments, &["-o", "json"]].concat())).unwrap()
    };
    let listed = json(&["token", "list"]);
    assert_eq!(
        (&listed[0]["spiffe_id"], &listed[0]["used"]),
        (&id.into(), &true.into())
    );
    assert!(
        !listed
            .to_string()
            .contains(token.trim().rsplit('_').next().unwrap())
    );
    let issued = json(&["issued", "--id", id]);
    assert_eq!(issued.as_array().unwrap().len(), 1);
    assert_eq!(issued[0]["state"], "issued");
    assert!(
        issued[0]["evidence"]
            .as_str()
            .unwrap()
            .starts_with("join-token:")
    );
    assert_eq!(json(&["issued", "--verify"])["intact"], true);
    assert_eq!(json(&["root", "list"])[0]["state"], "active");
    assert_eq!(json(&["status"])["unacknowledged_spiffe_ids"][0], id);
    let serial = issued[0]["serial"].as_str().unwrap();
    assert!(json(&["revoke", serial])["bundle_sequence"].is_u64());
    assert!(json(&["revoke", id])["bundle_sequence"].is_u64());
    assert!(json(&["reinstate", id])["bundle_sequence"].is_u64());
    json(&["root", "prepare"]);
    site.refuse(&["root", "retire"], 1, "no root is retiring");
    let yaml: Value = serde_saphyr::from_str(&site.ask(&["issued", "-o", "yaml"])).unwrap();
    assert_eq!(yaml, json(&["issued"]));
    assert!(site.ask(&["issued"]).starts_with("INDEX  RECORDED"));
    let made = json(&[
        "token",
        "create",
        "-n",
        "shop",
        "-s",
        "x",
        "--lifetime",
        "1h",
    ]);
    json(&["token", "revoke", made["id"].as_str().unwrap()]);
    site.refuse(&["token", "revoke", "ffff"], 1, "no join token ffff");
    site.refuse(
        &["token", "create", "-n", "sidegate-system", "-s", "x"],
        1,
        "control plane",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_it_cleanly_and_no_secret_is_in_its_logs() {
    let site = Site::new("");
    let mut command = site.command();
    command.args(["serve"]).env("SIDEGATE_LOG", "trace");
    let mut ca = Process::spawn(command);
    ca.wait_until_serving();
    let token = site.ask(&["token", "create", "-n", "shop", "-s", "web"]);
    let key = Key::new();
    site.join(&ca, &token, &key).await.unwrap();
    let wrong = site.join(&ca, &token, &Key::new()).await;
    check_refused(wrong, "UNAUTHENTICATED", "another key");
    let (code, lines) = ca.terminate();
    assert_eq!(code, Some(0), "{lines:?}");
    assert!(!site.file("admin.sock").exists());
    let secret = token.trim().rsplit('_').next().unwrap();
    let keys = ["root.key", "intermediate.key"].map(|name| key_text(&site.file(name)));
    let ledger = std::fs::read_to_string(site.file("ledger")).unwrap();
    assert!(
        !ledger.contains(secret),
        "the ledger holds the secret's hash only"
    );
    assert!(lines.len() > 3);
    for line in &lines {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert_eq!(event["kind"], "diagnostic", "{line}");
        assert!(!line.contains(secret), "{line}");
        assert!(!keys.iter().any(|key| line.contains(key)), "{line}");
    }
}

/// The middle of a key's base64, which is different for each.
fn key_text(path: &Path) -> String {
    let pem = std::fs::read_to_string(path).unwrap();
    pem.lines().nth(2).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_nothing_is_signed_and_afterwards_all_goes_on() {
    let site = Site::new("");
    // Ignored signals stay ignored over exec: writes behind the limit fail instead of killing.
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "trap '' XFSZ; exec \"$0\" serve",
            env!("CARGO_BIN_EXE_sidegate-ca"),
        ])
        .current_dir(site.folder.path());
    let mut ca = Process::spawn(command);
    ca.wait_until_serving();
    let tokens: Vec<String> = (0..3)
        .map(|n| site.ask(&["token", "create", "-n", "shop", "-s", &format!("w{n}")]))
        .collect();
    let full = std::fs::metadata(site.file("ledger")).unwrap().len() + 100;
    let limit = |current| Rlimit {
        current,
        maximum: None,
    };
    prlimit(Some(ca.pid()), Resource::Fsize, limit(Some(full))).unwrap();
    let key = Key::new();
    for _ in 0..3 {
        let joined = site.join(&ca, &tokens[0], &key).await;
        check_refused(joined, "UNAVAILABLE", "nothing is signed");
    }
    site.refuse(
        &["token", "create", "-n", "shop", "-s", "x"],
        1,
        "cannot be written",
    );
    assert_eq!(
        std::fs::metadata(site.file("ledger")).unwrap().len(),
        full - 100
    );
    site.ask(&["issued", "--verify"]);
    prlimit(Some(ca.pid()), Resource::Fsize, limit(None)).unwrap();
    // Another key: what failed has claimed nothing.
    site.join(&ca, &tokens[0], &Key::new()).await.unwrap();
    site.join(&ca, &tokens[1], &Key::new()).await.unwrap();
    ca.kill();
    let again = site.serve();
    site.join(&again, &tokens[2], &Key::new()).await.unwrap();
    site.ask(&["issued", "--verify"]);
}

#[test]
fn only_its_own_user_may_open_the_socket() {
    use std::os::unix::fs::MetadataExt;
    let site = Site::new("");
    let _ca = site.serve();
    let socket = std::fs::metadata(site.file("admin.sock")).unwrap();
    assert_eq!(socket.mode() & 0o777, 0o600);
    assert_eq!(
        std::fs::metadata(site.file("")).unwrap().mode() & 0o777,
        0o700
    );
}

#[test]
fn a_first_start_is_quick() {
    // Fsyncs included. The bound is wide because the machine may be busy; the figure is printed.
    let site = Site::new("");
    let begun = std::time::Instant::now();
    let _ca = site.serve();
    let took = begun.elapsed();
    println!("first start: {took:?}");
    assert!(took.as_secs() < 10, "{took:?}");
}

pub(crate) fn workload(n: usize) -> SpiffeId {
    format!("spiffe://mesh.local/ns/shop/sa/w{n}")
        .parse()
        .unwrap()
}
