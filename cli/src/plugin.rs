//! `kubectl sidegate`: the same command line, as a plugin of kubectl.
//!
//! Always true: only the name by which the process was called tells; help and errors say the
//! command as the user typed it.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;

use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Command};

/// The name by which kubectl finds a plugin.
const PLUGIN: &str = "kubectl-sidegate";
/// The name by which kubectl finds what completes a plugin's words.
const COMPLETER: &str = "kubectl_complete-sidegate";

/// For kubectl: no file is meant here.
const NO_FILES: u8 = 4;

/// By what name the process was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Called {
    /// As `sidegate`, or anything else.
    Itself,
    /// As `kubectl sidegate`.
    Plugin,
    /// By kubectl, to complete words.
    Completer,
}

impl Called {
    /// By what name this process was called.
    pub(crate) fn now() -> Self {
        Self::by(std::env::args_os().next().as_ref())
    }

    fn by(name: Option<&OsString>) -> Self {
        let name = name.and_then(|name| Path::new(name).file_stem());
        match name.and_then(|name| name.to_str()) {
            Some(PLUGIN) => Self::Plugin,
            Some(COMPLETER) => Self::Completer,
            _ => Self::Itself,
        }
    }

    /// The command as the user types it.
    pub(crate) fn command(self) -> &'static str {
        match self {
            Self::Itself => "sidegate",
            Self::Plugin | Self::Completer => "kubectl sidegate",
        }
    }

    /// The name of the executable, for completions of a shell.
    pub(crate) fn executable(self) -> &'static str {
        match self {
            Self::Itself => "sidegate",
            Self::Plugin | Self::Completer => PLUGIN,
        }
    }

    /// The command line with the right name in usage and help.
    pub(crate) fn named(self, command: Command) -> Command {
        if self == Self::Itself {
            return command;
        }
        let words: Vec<String> = command
            .get_subcommands()
            .map(|subcommand| subcommand.get_name().to_owned())
            .collect();
        rename(command, &words).bin_name(self.command())
    }
}

fn rename(command: Command, words: &[String]) -> Command {
    let text = |text: Option<&StyledStr>| text.map(|text| renamed(&text.to_string(), words));
    let (about, long) = (text(command.get_about()), text(command.get_long_about()));
    let (after, after_long) = (
        text(command.get_after_help()),
        text(command.get_after_long_help()),
    );
    let mut command = command;
    if let Some(about) = about {
        command = command.about(about);
    }
    if let Some(long) = long {
        command = command.long_about(long);
    }
    if let Some(after) = after {
        command = command.after_help(after);
    }
    if let Some(after) = after_long {
        command = command.after_long_help(after);
    }
    let argument = |argument: Arg| match argument.get_help().map(ToString::to_string) {
        Some(help) => argument.help(renamed(&help, words)),
        None => argument,
    };
    let command = command.mut_args(argument);
    command.mut_subcommands(|subcommand| rename(subcommand, words))
}

/// `sidegate logs` becomes `kubectl sidegate logs`; other uses of the word stay.
fn renamed(text: &str, words: &[String]) -> String {
    let mut renamed = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("sidegate ") {
        let (before, from) = rest.split_at(at);
        let (name, after) = from.split_at("sidegate ".len());
        let starts = before.is_empty() || before.ends_with([' ', '`', '\n', '(']);
        let word: String = after.chars().take_while(char::is_ascii_lowercase).collect();
        renamed.push_str(before);
        if starts && !before.ends_with("kubectl ") && words.contains(&word) {
            renamed.push_str("kubectl ");
        }
        renamed.push_str(name);
        rest = after;
    }
    renamed + rest
}

/// Prints what may stand for the last word of the process's arguments, as kubectl wants it.
///
/// # Errors
///
/// When it cannot be written.
pub(crate) fn complete(command: Command) -> io::Result<()> {
    let words: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let mut command = command;
    command.build();
    let (found, directive) = completions(&command, &words);
    let mut out = io::stdout().lock();
    for (word, about) in found {
        writeln!(out, "{word}\t{about}")?;
    }
    writeln!(out, ":{directive}")
}

fn completions(command: &Command, words: &[String]) -> (Vec<(String, String)>, u8) {
    let Some((last, before)) = words.split_last() else {
        return (Vec::new(), NO_FILES);
    };
    let mut command = command;
    for word in before {
        command = command.find_subcommand(word).unwrap_or(command);
    }
    let valued = before.last().and_then(|word| option(command, word));
    if let Some(valued) = valued {
        let found = values(valued, last);
        let directive = if found.is_empty() { 0 } else { NO_FILES };
        return (found, directive);
    }
    let mut found = Vec::new();
    if last.starts_with('-') {
        for argument in command
            .get_arguments()
            .filter(|argument| !argument.is_hide_set())
        {
            let long = argument.get_long().map(|long| format!("--{long}"));
            found.extend(long.map(|long| (long, first_line(argument.get_help()))));
        }
    } else {
        for subcommand in command
            .get_subcommands()
            .filter(|subcommand| !subcommand.is_hide_set())
        {
            let name = subcommand.get_name().to_owned();
            found.push((name, first_line(subcommand.get_about())));
        }
        found.extend(
            command
                .get_positionals()
                .flat_map(|argument| values(argument, last)),
        );
    }
    found.retain(|(word, _)| word.starts_with(last.as_str()));
    (found, NO_FILES)
}

/// The option that `word` is, if it takes a value.
fn option<'a>(command: &'a Command, word: &str) -> Option<&'a Arg> {
    let is = |argument: &&Arg| {
        let long = word.strip_prefix("--");
        let short = word.strip_prefix('-').and_then(|word| word.chars().next());
        match long {
            Some(long) => argument.get_long() == Some(long),
            None => short.is_some() && word.len() == 2 && argument.get_short() == short,
        }
    };
    let mut arguments = command.get_arguments();
    let takes =
        |argument: &&Arg| matches!(argument.get_action(), ArgAction::Set | ArgAction::Append);
    arguments.find(is).filter(takes)
}

fn values(argument: &Arg, start: &str) -> Vec<(String, String)> {
    let values = argument.get_possible_values().into_iter();
    let values = values.filter(|value| value.get_name().starts_with(start));
    values
        .map(|value| (value.get_name().to_owned(), first_line(value.get_help())))
        .collect()
}

fn first_line(text: Option<&StyledStr>) -> String {
    let text = text.map(ToString::to_string).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn complete(words: &str) -> (Vec<String>, u8) {
        let mut command = crate::Cli::command();
        command.build();
        let words: Vec<_> = words.split(' ').map(ToOwned::to_owned).collect();
        let (found, directive) = completions(&command, &words);
        (found.into_iter().map(|(word, _)| word).collect(), directive)
    }

    #[test]
    fn the_name_of_the_process_decides() {
        for (name, called) in [
            ("/usr/local/bin/kubectl-sidegate", Called::Plugin),
            ("kubectl_complete-sidegate", Called::Completer),
            ("target/debug/sidegate", Called::Itself),
        ] {
            assert_eq!(Called::by(Some(&name.into())), called, "{name}");
        }
        assert_eq!(Called::by(None), Called::Itself);
    }

    #[test]
    fn a_plugin_says_the_command_that_the_user_typed() {
        let mut command = Called::Plugin.named(crate::Cli::command());
        let matches = command.try_get_matches_from_mut(["kubectl-sidegate", "logs", "--help"]);
        let help = matches.unwrap_err().to_string();
        assert!(
            help.contains("Usage: kubectl sidegate logs [OPTIONS]"),
            "{help}"
        );
        assert!(
            help.contains("\n  kubectl sidegate logs -n shop -f --denied"),
            "{help}"
        );
        assert!(
            help.contains("-c sidegate-proxy | kubectl sidegate logs --file -"),
            "{help}"
        );
        assert!(!help.contains("kubectl kubectl"), "{help}");
        let mut command = Called::Itself.named(crate::Cli::command());
        let matches = command.try_get_matches_from_mut(["sidegate", "logs", "--help"]);
        assert!(
            matches
                .unwrap_err()
                .to_string()
                .contains("Usage: sidegate logs")
        );
    }

    #[test]
    fn words_of_a_plugin_are_completed() {
        let (commands, directive) = complete("c");
        assert!(commands.contains(&"certs".to_owned()), "{commands:?}");
        assert!(
            commands.iter().all(|word| word.starts_with('c')),
            "{commands:?}"
        );
        assert_eq!(directive, NO_FILES);
        assert_eq!(complete("logs --den").0, ["--denied"]);
        assert_eq!(complete("logs -o j").0, ["json"]);
        assert_eq!(complete("authz te").0, ["test"]);
        assert_eq!(complete("logs --kubeconfig x").1, 0, "a file is meant");
        assert!(complete("completions ba").0.contains(&"bash".to_owned()));
    }
}
