//! Redirects a pod's traffic to its sidecar.

fn main() {}
