//! `sidegate`: the command line of the mesh.
//!
//! Exit codes: 0 done, 1 failed (or: denied, problems found), 2 wrong usage or configuration.

mod authz;
mod certs;
mod check;
mod demo;
mod inject;
mod install;
mod kube;
mod logs;
mod output;
mod plugin;
mod status;
mod top;
mod uninstall;
mod validate;
mod version;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use plugin::Called;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// A zero-trust sidecar mesh: identity, policy and a log of every call.
#[derive(Parser)]
#[command(name = "sidegate", version, after_help = "Example:\n  sidegate demo")]
struct Cli {
    /// Say more about what happens, on standard error; twice for details.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    Logs(logs::LogsArgs),
    Top(top::TopArgs),
    Status(status::StatusArgs),
    Authz(authz::AuthzArgs),
    Validate(validate::ValidateArgs),
    Certs(certs::CertsArgs),
    Check(check::CheckArgs),
    Install(install::InstallArgs),
    Uninstall(uninstall::UninstallArgs),
    Inject(inject::InjectArgs),
    Completions(CompletionsArgs),
    Version(version::VersionArgs),
}

/// Completions for a shell.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  sidegate completions bash > /etc/bash_completion.d/sidegate")]
struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

fn main() -> ExitCode {
    let called = Called::now();
    let command = called.named(Cli::command());
    if called == Called::Completer {
        let completed = plugin::complete(command);
        return ExitCode::from(u8::from(completed.is_err()));
    }
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    install_diagnostics(cli.verbose);
    match run(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to report to when standard error is gone too.
            drop(writeln!(io::stderr(), "sidegate: {error:#}"));
            ExitCode::from(1)
        }
    }
}

fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Logs(arguments) => logs::run(&arguments),
        Command::Top(arguments) => top::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Authz(arguments) => authz::run(&arguments),
        Command::Validate(arguments) => validate::run(&arguments),
        Command::Certs(arguments) => certs::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Install(arguments) => install::run(&arguments),
        Command::Uninstall(arguments) => uninstall::run(&arguments),
        Command::Inject(arguments) => inject::run(&arguments),
        Command::Version(arguments) => version::run(&arguments),
        Command::Completions(arguments) => {
            let mut script = Vec::new();
            let name = Called::now().executable();
            clap_complete::generate(arguments.shell, &mut Cli::command(), name, &mut script);
            io::stdout().write_all(&script)?;
            Ok(0)
        }
    }
}

/// Whoever reads us (`head`, a pager) has had enough: that is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error
        .chain()
        .any(|cause| cause.downcast_ref().is_some_and(broken))
}

fn install_diagnostics(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let mut targets = Targets::new().with_default(level);
    if verbose < 2 {
        // What fails on the way to a cluster is said once, as the command's own error.
        targets = targets.with_target("kube_client", LevelFilter::OFF);
    }
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_writer(io::stderr);
    tracing_subscriber::registry()
        .with(targets)
        .with(lines)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    /// The words of a line of a shell, up to a comment; quotes keep words together.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
        for character in line.chars() {
            match (quote, character) {
                (Some(open), _) if open == character => quote = None,
                (None, '\'' | '"') => {
                    quote = Some(character);
                    word.get_or_insert_default();
                }
                (None, '#') if word.is_none() => break,
                (None, ' ') => words.extend(word.take()),
                _ => word.get_or_insert_default().push(character),
            }
        }
        words.extend(word);
        words
    }

    /// The command lines of ours that a page shows, in blocks and within sentences.
    fn commands(page: &str) -> Vec<Vec<String>> {
        let page = page.replace("\\\n", " ");
        let lines = page
            .lines()
            .map(|line| line.trim().trim_start_matches("$ "));
        let within = page.split('`').skip(1).step_by(2);
        let segments = lines.chain(within).flat_map(|text| text.split(" | "));
        segments
            .flat_map(|text| text.split(" && "))
            .filter(|text| !text.contains(['…', '\n']))
            .map(words)
            .filter_map(|words| match &words[..] {
                [first, ..] if first.ends_with("/sidegate") || first == "sidegate" => Some(words),
                [kubectl, ours, ..] if kubectl == "kubectl" && ours == "sidegate" => {
                    Some(words[1..].to_vec())
                }
                _ => None,
            })
            .collect()
    }

    #[test]
    fn every_command_that_the_documentation_shows_is_taken() {
        use clap::error::ErrorKind;
        let pages = [
            include_str!("../../README.md"),
            include_str!("../../docs/command-line.md"),
            include_str!("../../docs/ca-in-a-cluster.md"),
            include_str!("../../docs/errors.md"),
            include_str!("../../docs/standalone.md"),
            include_str!("../../docs/kubernetes/adopting.md"),
            include_str!("../../docs/kubernetes/concepts.md"),
            include_str!("../../docs/kubernetes/getting-started.md"),
            include_str!("../../docs/kubernetes/policies.md"),
            include_str!("../../docs/kubernetes/threat-model.md"),
            include_str!("../../docs/kubernetes/troubleshooting.md"),
            include_str!("../../docs/kubernetes/uninstall.md"),
        ];
        let commands: Vec<_> = pages.into_iter().flat_map(commands).collect();
        assert!(commands.len() > 40, "only {} were found", commands.len());
        for words in commands {
            let taken = Cli::command().try_get_matches_from(&words);
            // Within a sentence a command may stand without what it needs.
            let fine = [
                ErrorKind::DisplayHelp,
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
                ErrorKind::MissingRequiredArgument,
                ErrorKind::MissingSubcommand,
            ];
            let error = taken.err().filter(|error| !fine.contains(&error.kind()));
            assert!(error.is_none(), "{words:?}: {}", error.unwrap());
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.clone().render_long_help().to_string();
            let nested = command.has_subcommands();
            assert!(
                nested || help.contains("Example"),
                "{} has no example",
                command.get_name()
            );
        }
    }
}
