//! stub
use std::process::ExitCode;
pub(crate) async fn compare(_options: crate::cli::Compare) -> anyhow::Result<ExitCode> {
    anyhow::bail!("todo")
}
