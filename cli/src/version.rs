//! `sidegate version`.

use std::io::{self, Write};

use serde::Serialize;

use crate::output::Format;

/// The version of this command line.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  sidegate version -o json")]
pub(crate) struct VersionArgs {
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct About {
    version: &'static str,
    api: &'static str,
    wire: &'static str,
}

/// Prints the version, the API group of resources, and the wire between sidecars.
///
/// # Errors
///
/// When it cannot be written.
pub(crate) fn run(arguments: &VersionArgs) -> anyhow::Result<u8> {
    let about = About {
        version: env!("CARGO_PKG_VERSION"),
        api: "sidegate.dev/v1alpha1",
        wire: "sidegate/1",
    };
    let mut out = io::stdout().lock();
    match arguments.output {
        Format::Table => writeln!(
            out,
            "sidegate {} (resources {}, wire {})",
            about.version, about.api, about.wire
        )?,
        other => other.print(&mut out, &about)?,
    }
    Ok(0)
}
