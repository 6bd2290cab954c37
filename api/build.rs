//! Generates the gRPC code from `proto/`, without protoc.

use std::error::Error;

const PROTOS: &[&str] = &[
    "sidegate/identity/v1alpha1/identity.proto",
    "sidegate/ca/v1alpha1/admin.proto",
    "sidegate/control/v1alpha1/control.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
