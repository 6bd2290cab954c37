//! Generates the shop's gRPC code and its descriptor (for server reflection), without protoc.

use std::error::Error;
use std::path::PathBuf;

use protox::prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        ["shop/v1/inventory.proto", "grpc/health/v1/health.proto"],
        ["proto"],
    )?;
    let descriptor_file = PathBuf::from(std::env::var("OUT_DIR")?).join("shop.bin");
    std::fs::write(descriptor_file, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
