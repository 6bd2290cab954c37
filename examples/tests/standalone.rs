//! The shop as separate processes, as `examples/standalone/mesh` starts them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sidegate_examples::client;

/// A copy of `examples/standalone` in a folder of its own, taken down when it goes.
struct Standalone {
    dir: tempfile::TempDir,
    binaries: PathBuf,
    prefix: u16,
}

impl Standalone {
    fn new() -> Self {
        let binaries = Path::new(env!("CARGO_BIN_EXE_sidegate-shop"))
            .parent()
            .unwrap()
            .to_owned();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--workspace", "--bins", "--quiet", "--offline"])
            .current_dir(root);
        if binaries.ends_with("release") {
            build.arg("--release");
        }
        assert!(
            build.status().unwrap().success(),
            "the binaries do not build"
        );
        let dir = tempfile::tempdir().unwrap();
        // -L: the policies are links to the shop's.
        let copied = Command::new("cp")
            .args(["-rL", "standalone/.", dir.path().to_str().unwrap()])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(copied.success());
        std::fs::remove_dir_all(dir.path().join("run")).ok();
        let prefix = free_prefix();
        let moved = Command::new("sh")
            .args([
                "-c",
                "sed -i \"s/\\b19\\([0-9][0-9][0-9]\\)\\b/$0\\1/g\" mesh *.yaml resources/*.yaml",
            ])
            .arg(prefix.to_string())
            .current_dir(dir.path())
            .status()
            .unwrap();
        assert!(moved.success());
        Self {
            dir,
            binaries,
            prefix,
        }
    }

    /// The address whose port ends in `last`, wherever this copy's ports are.
    fn at(&self, last: &str) -> SocketAddr {
        format!("127.0.0.1:{}{last}", self.prefix).parse().unwrap()
    }

    fn mesh(&self, verb: &str) -> Output {
        // Output goes to a file: what the script starts would keep a pipe open for ever.
        let log = self.dir.path().join("mesh.out");
        let file = std::fs::File::create(&log).unwrap();
        let status = Command::new(self.dir.path().join("mesh"))
            .arg(verb)
            .env("BIN_DIR", &self.binaries)
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .status()
            .unwrap();
        let stderr = std::fs::read(log).unwrap();
        Output {
            status,
            stdout: Vec::new(),
            stderr,
        }
    }

    #[track_caller]
    fn must(&self, verb: &str) {
        let done = self.mesh(verb);
        assert!(
            done.status.success(),
            "mesh {verb}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    fn pid(&self, name: &str) -> String {
        let file = self.dir.path().join(format!("run/{name}.pid"));
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }
}

impl Drop for Standalone {
    fn drop(&mut self) {
        self.mesh("down");
    }
}

/// The first two digits of five-digit ports of which none that the files name is taken: somebody
/// may run the mesh as it is while the tests run.
fn free_prefix() -> u16 {
    let free = |prefix: &u16| {
        let ports = (0..500).map(|last| prefix * 1000 + last);
        ports
            .into_iter()
            .all(|port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok())
    };
    (20..32)
        .find(free)
        .expect("500 free ports in a row below 32000")
}

async fn status(outbound: SocketAddr, path: &str) -> u16 {
    client::get(outbound, "orders.shop", path, &[])
        .await
        .unwrap()
        .status
        .as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh_runs_as_processes_and_outlives_its_ca() {
    let standalone = Standalone::new();
    standalone.must("up");
    assert_eq!(status(standalone.at("001"), "/orders/7").await, 200);
    assert_eq!(status(standalone.at("401"), "/orders/7").await, 403);
    assert_eq!(status(standalone.at("401"), "/healthz").await, 200);
    let checkout: SocketAddr = standalone.at("080");
    let answer = client::get(checkout, "web", "/checkout/7", &[])
        .await
        .unwrap();
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );

    let killed = Command::new("kill")
        .args(["-KILL", &standalone.pid("ca")])
        .status()
        .unwrap();
    assert!(killed.success());
    for _ in 0..20 {
        assert_eq!(
            status(standalone.at("001"), "/orders/7").await,
            200,
            "without a CA"
        );
    }

    // Down and up again: key and SVID are kept, so that no second join token is needed.
    standalone.must("down");
    std::fs::remove_file(standalone.dir.path().join("run/web.token")).unwrap();
    standalone.must("up");
    assert_eq!(status(standalone.at("001"), "/orders/7").await, 200);
    let log = std::fs::read_to_string(standalone.dir.path().join("run/orders.log")).unwrap();
    assert!(log.contains("\"decision\":\"deny\""), "{log}");
}

#[test]
fn a_process_that_was_killed_is_not_taken_for_running_while_nobody_has_reaped_it() {
    let standalone = Standalone::new();
    let mut ended = Command::new("true").spawn().unwrap();
    let run = standalone.dir.path().join("run");
    std::fs::create_dir_all(&run).unwrap();
    std::fs::write(run.join("ca.pid"), ended.id().to_string()).unwrap();
    let state = format!("/proc/{}/stat", ended.id());
    while std::fs::read_to_string(&state).is_ok_and(|stat| !stat.contains(") Z ")) {
        std::thread::yield_now();
    }
    let said = String::from_utf8(standalone.mesh("status").stderr).unwrap();
    assert!(said.contains("ca has ended"), "{said}");
    std::fs::remove_file(run.join("ca.pid")).unwrap();
    ended.wait().unwrap();
}
