//! Who may know whom: the crates' arrows, read from `cargo metadata`.
//!
//! A new arrow is a decision: change `ARROWS` and `ARCHITECTURE.md` in the same commit, or don't
//! draw it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Each crate of ours, and the crates of ours that its own code names.
const ARROWS: &[(&str, &[&str])] = &[
    ("sidegate-mesh", &[]),
    ("sidegate-api", &[]),
    ("sidegate-mtls", &["sidegate-api", "sidegate-mesh"]),
    (
        "sidegate-proxy",
        &["sidegate-api", "sidegate-mesh", "sidegate-mtls"],
    ),
    (
        "sidegate-ca",
        &["sidegate-api", "sidegate-mesh", "sidegate-mtls"],
    ),
    (
        "sidegate-controller",
        &["sidegate-api", "sidegate-mesh", "sidegate-mtls"],
    ),
    (
        "sidegate-injector",
        &["sidegate-api", "sidegate-mesh", "sidegate-mtls"],
    ),
    ("sidegate-init", &[]),
    (
        "sidegate-local",
        &[
            "sidegate-ca",
            "sidegate-mesh",
            "sidegate-mtls",
            "sidegate-proxy",
        ],
    ),
    ("sidegate-examples", &["sidegate-local", "sidegate-mesh"]),
    ("sidegate-loadtest", &[]),
    (
        "sidegate",
        &[
            "sidegate-controller",
            "sidegate-examples",
            "sidegate-injector",
            "sidegate-local",
            "sidegate-mesh",
        ],
    ),
];

/// What must not be reachable from a crate, however indirectly.
const OUT_OF_REACH: &[(&str, &[&str])] = &[
    (
        "sidegate-mesh",
        &["tokio", "hyper", "rustls", "kube", "mio", "socket2"],
    ),
    ("sidegate-mtls", &["kube", "k8s-openapi"]),
    ("sidegate-proxy", &["kube", "k8s-openapi", "sidegate-ca"]),
    ("sidegate-ca", &["sidegate-proxy"]),
    ("sidegate-controller", &["sidegate-proxy", "sidegate-ca"]),
    (
        "sidegate-injector",
        &["sidegate-proxy", "sidegate-ca", "sidegate-controller"],
    ),
    (
        "sidegate",
        &["ring", "openssl", "openssl-sys", "native-tls", "reqwest"],
    ),
];

fn cargo(arguments: &[&str]) -> String {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .current_dir(root)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Our own packages, from `cargo metadata`. Without dependencies: of those, only what this platform
/// needs has been fetched.
fn packages() -> Vec<Value> {
    let arguments = [
        "metadata",
        "--format-version",
        "1",
        "--no-deps",
        "--locked",
        "--offline",
    ];
    let metadata: Value = cargo(&arguments).parse().unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

#[test]
fn every_crate_knows_only_whom_it_may() {
    let packages = packages();
    let ours: BTreeSet<&str> = packages.iter().map(name).collect();
    let drawn: BTreeMap<&str, BTreeSet<&str>> = packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            // A kind that is null is neither `dev` nor `build`.
            let normal = dependencies.filter(|dependency| dependency["kind"].is_null());
            (
                name(package),
                normal
                    .map(name)
                    .filter(|known| ours.contains(known))
                    .collect(),
            )
        })
        .collect();
    let planned: BTreeMap<&str, BTreeSet<&str>> = ARROWS
        .iter()
        .map(|(name, known)| (*name, known.iter().copied().collect()))
        .collect();
    assert_eq!(
        drawn, planned,
        "left: what Cargo.toml draws; right: what ARROWS allows"
    );
}

fn name(described: &Value) -> &str {
    described["name"].as_str().unwrap()
}

#[test]
fn what_a_crate_must_not_reach_is_out_of_its_tree() {
    for (name, forbidden) in OUT_OF_REACH {
        let arguments = [
            "tree",
            "--locked",
            "--offline",
            "-e",
            "normal",
            "--prefix",
            "none",
        ];
        let tree = cargo(&[arguments.as_slice(), &["--format", "{p}", "-p", name]].concat());
        let reached: BTreeSet<&str> = tree
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert!(
            reached.contains(name),
            "cargo tree says nothing about {name}"
        );
        let found: Vec<&&str> = forbidden
            .iter()
            .filter(|name| reached.contains(**name))
            .collect();
        assert_eq!(found, Vec::<&&str>::new(), "{name} must not reach these");
    }
}
