//! The conet command line: arguments in, tables or JSON out.
//!
//! What it is not: it decides nothing. The daemon and the lab do.
//!
//! Results go to standard output, progress and failures to standard error. A
//! failure is one line that says what to do, and an exit status: 1, or 2 for a
//! command line that is none, or as shells do 126 and 127 for a program that
//! cannot be run or is not there.

mod cli;
mod commands;
mod table;

use std::io::Write;
use std::process::ExitCode;

use cli::CommandLine;

fn main() -> ExitCode {
    match cli::parse() {
        Ok(cli) => match commands::run(cli) {
            Ok(status) => status,
            Err(error) => fail(&error),
        },
        Err(CommandLine::Help(help)) => {
            // Nobody is left to tell when the terminal has gone.
            help.print().ok();
            ExitCode::SUCCESS
        }
        Err(CommandLine::Wrong(line)) => {
            say(&line);
            ExitCode::from(2)
        }
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // `conet ps | head` is no failure of ours.
    let broken_pipe = error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe);
    if broken_pipe {
        return ExitCode::SUCCESS;
    }
    let line = error.to_string();
    say(line.lines().collect::<Vec<_>>().join(" ").as_str());
    ExitCode::from(commands::exit_status(error))
}

fn say(line: &str) {
    // Nobody is left to tell when standard error has gone.
    writeln!(std::io::stderr(), "conet: {line}").ok();
}
