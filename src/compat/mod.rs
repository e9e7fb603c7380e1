//! What gunicorn and waitress call their settings, and what each of them is here.
//!
//! One table ([`settings`]) says it once. From it come the options that the command line accepts under their names
//! ([`accept`]), the lines that name what is not honoured ([`Said::complaint`]), the lists of `--check`, and the table of
//! docs/migrating.md, which a test compares with it. So a command line or a `gunicorn.conf.py` that worked with gunicorn
//! works here with one word changed, and what it asked for in vain is named.

mod gunicorn;
mod waitress;

use std::collections::BTreeSet;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

/// Sections of a program's settings, as its documentation has them.
pub type Section = (&'static str, &'static [Setting]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Gunicorn,
    Waitress,
}

/// One setting of another server.
#[derive(Debug)]
pub struct Setting {
    pub program: Program,
    /// In its configuration file.
    pub name: &'static str,
    /// On its command line.
    pub cli: &'static [&'static str],
    pub takes: Takes,
    pub here: Here,
    /// A clause: how it differs here; or why it is not honoured, and what to do.
    pub note: &'static str,
}

/// How a setting is given on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Not at all: only the configuration file has it.
    File,
    Value,
    /// By its name alone.
    Flag,
    /// By its name alone, or by the other one, which begins with `--no-`.
    Switch,
}

/// What a setting is here.
#[derive(Clone, Copy, Debug)]
pub enum Here {
    /// The option of this name, with the same values.
    Option(&'static str),
    /// Options made of the value; or why this value is not honoured.
    Words(fn(&str) -> Result<Vec<String>, &'static str>),
    /// The worker program honours it: hooks, and what the application logs.
    Worker,
    /// So anyway, whatever is said.
    Anyway,
    /// There is nothing that it could change.
    Needless,
    /// Not there. These values ask for what is so anyway.
    Missing(&'static [&'static str]),
}

/// Values that switch a thing off which is not there.
const OFF: &[&str] = &["", "false", "0", "[]", "{}"];

/// A setting that somebody gave a value.
#[derive(Clone, Debug)]
pub struct Said {
    pub setting: &'static Setting,
    pub value: Value,
    /// Where it was said: `gunicorn.conf.py`.
    pub place: String,
}

/// Every setting of both programs, by section.
pub fn sections(program: Program) -> &'static [Section] {
    match program {
        Program::Gunicorn => gunicorn::SECTIONS,
        Program::Waitress => waitress::SECTIONS,
    }
}

pub fn settings() -> impl Iterator<Item = &'static Setting> {
    let sections = [Program::Gunicorn, Program::Waitress].into_iter().flat_map(sections);
    sections.flat_map(|section| section.1)
}

/// The same command, which also accepts every name that it does not know yet: as another name of the option that the setting
/// is here, or hidden, for [`said`] to find.
pub fn accept(mut command: Command) -> Command {
    let mut known: BTreeSet<String> = BTreeSet::new();
    for arg in command.get_arguments() {
        let longs = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
        known.extend(longs.map(|name| format!("--{name}")));
        let shorts = arg.get_short().into_iter().chain(arg.get_all_short_aliases().unwrap_or_default());
        known.extend(shorts.map(|name| format!("-{name}")));
    }
    for setting in settings() {
        let mut first: Option<&'static str> = None;
        for name in setting.cli.iter().filter(|name| known.insert((**name).to_owned())) {
            let option = match setting.here {
                Here::Option(option) => Some(id_of(&command, option)),
                // A switch is two options; of other settings, the first name is the option and the others are its aliases.
                _ => first.filter(|_| setting.takes != Takes::Switch).map(str::to_owned),
            };
            command = match option {
                Some(id) => command.mut_arg(id, |arg| with_alias(arg, name)),
                None => command.arg(hidden(setting, name)),
            };
            first.get_or_insert(name);
        }
    }
    command
}

/// The id of the option with this long name.
fn id_of(command: &Command, long: &str) -> String {
    let arg = command.get_arguments().find(|arg| arg.get_long() == Some(long) || arg.get_id() == long);
    arg.unwrap_or_else(|| panic!("the table names --{long}, which is no option")).get_id().to_string()
}

fn with_alias(arg: Arg, name: &'static str) -> Arg {
    match name.strip_prefix("--") {
        Some(long) => arg.alias(long),
        None => arg.short_alias(name.chars().nth(1).expect("a letter after the dash")),
    }
}

/// An option that is accepted and not shown. Its id is its name.
fn hidden(setting: &Setting, name: &'static str) -> Arg {
    let arg = Arg::new(name).hide(true);
    let arg = match name.strip_prefix("--") {
        Some(long) => arg.long(long),
        None => arg.short(name.chars().nth(1).expect("a letter after the dash")),
    };
    match setting.takes {
        Takes::Value | Takes::File => arg.action(ArgAction::Append),
        Takes::Flag | Takes::Switch => arg.action(ArgAction::SetTrue),
    }
}

/// The hidden options that were given on this command line, with their values.
pub fn said(matches: &ArgMatches, place: &str) -> Vec<Said> {
    let mut found = Vec::new();
    for setting in settings() {
        for name in setting.cli {
            let value = match setting.takes {
                Takes::Value | Takes::File => {
                    let values = matches.try_get_many::<String>(name).ok().flatten();
                    values.and_then(|mut values| values.next_back().cloned()).map(Value::String)
                }
                Takes::Flag | Takes::Switch => {
                    let given = matches.try_get_one::<bool>(name).ok().flatten().copied().unwrap_or(false);
                    given.then_some(Value::Bool(!(setting.takes == Takes::Switch && name.starts_with("--no-"))))
                }
            };
            found.extend(value.map(|value| Said { setting, value, place: place.to_owned() }));
        }
    }
    found
}

impl Said {
    /// What to say about it to uringd's own command line.
    pub fn words(&self, is_flag: impl Fn(&str) -> bool) -> Vec<String> {
        match self.setting.here {
            Here::Option("target") => vec![text(&self.value)],
            Here::Option(option) if is_flag(option) => (text(&self.value) == "true").then(|| format!("--{option}")).into_iter().collect(),
            Here::Option(option) => {
                let values = self.value.as_array().map_or(std::slice::from_ref(&self.value), Vec::as_slice);
                values.iter().map(|value| format!("--{option}={}", text(value))).collect()
            }
            Here::Words(make) => make(&text(&self.value)).unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// Why it is not honoured, and what to do; `None` when it is.
    pub fn unhonoured(&self) -> Option<String> {
        let Setting { here, note, .. } = self.setting;
        match here {
            Here::Missing(harmless) if !self.value.is_null() && !harmless.contains(&text(&self.value).as_str()) => Some((*note).to_owned()),
            Here::Needless => Some(format!("{note}; leave it out")),
            Here::Words(make) => make(&text(&self.value)).err().map(str::to_owned),
            _ => None,
        }
    }

    /// The line that names it, when it is not honoured.
    pub fn complaint(&self) -> Option<String> {
        let why = self.unhonoured()?;
        let verdict = if matches!(self.setting.here, Here::Needless) { "needed" } else { "honoured" };
        let Said { setting, place, .. } = self;
        Some(format!("{} ({place}) is not {verdict}: {why}", setting.name))
    }
}

impl Setting {
    /// Its cell of the documentation.
    pub fn documented(&self) -> String {
        let with_note = |text: String| if self.note.is_empty() { text } else { format!("{text}: {}", self.note) };
        match self.here {
            Here::Option("target") => self.note.to_owned(),
            Here::Option(option) => with_note(format!("`--{option}`")),
            Here::Words(_) => self.note.to_owned(),
            Here::Worker => with_note("honoured".to_owned()),
            Here::Anyway => with_note("so anyway".to_owned()),
            Here::Needless => with_note("not needed".to_owned()),
            Here::Missing(_) => with_note("**not honoured**".to_owned()),
        }
    }
}

/// A value as a command line has it.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) if ["true", "false"].iter().any(|word| text.eq_ignore_ascii_case(word)) => text.to_ascii_lowercase(),
        Value::String(text) => text.trim().to_owned(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn header_map(value: &str) -> Result<Vec<String>, &'static str> {
    match value {
        "" | "drop" => Ok(Vec::new()),
        "dangerous" => Ok(vec!["--permit=underscore-headers".to_owned()]),
        _ => Err("fields with an underscore are removed and their requests go on"),
    }
}

fn forwarded_fields(value: &str) -> Result<Vec<String>, &'static str> {
    let names: Vec<String> = value.split([' ', ',', '\n']).filter(|name| !name.is_empty()).map(str::to_ascii_lowercase).collect();
    let kind = match &names[..] {
        [] => return Ok(Vec::new()),
        [name] if name == "forwarded" => "forwarded",
        names if names.iter().all(|name| name.starts_with("x-forwarded-")) => "x-forwarded",
        _ => return Err("Forwarded and the X-Forwarded fields cannot both be trusted; name one kind"),
    };
    Ok(vec![format!("--forwarded-fields={kind}")])
}

/// waitress bounds the head as a whole and none of its parts.
fn limit_head(value: &str) -> Result<Vec<String>, &'static str> {
    let parts = ["--limit-request-line=0".to_owned(), "--limit-request-field-size=0".to_owned()];
    Ok([format!("--limit-head={value}")].into_iter().chain(parts).collect())
}

fn unix_socket(value: &str) -> Result<Vec<String>, &'static str> {
    Ok(vec![format!("--bind=unix:{value}")])
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Options;

    #[test]
    fn every_name_is_understood_and_means_what_the_table_says() {
        let command = accept(Options::command());
        command.clone().debug_assert();
        for setting in settings() {
            for name in setting.cli {
                let is_it = |arg: &&Arg| {
                    let longs = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
                    let shorts = arg.get_short().into_iter().chain(arg.get_all_short_aliases().unwrap_or_default());
                    longs.map(|long| format!("--{long}")).chain(shorts.map(|short| format!("-{short}"))).any(|own| own == *name)
                };
                let arg = command.get_arguments().find(is_it).unwrap_or_else(|| panic!("nobody understands {name}"));
                match setting.here {
                    Here::Option(option) => assert_eq!(arg.get_long(), Some(option), "{name}"),
                    // An option of ours that the table does not know to be there.
                    _ => assert!(arg.is_hide_set(), "{name} is an option now"),
                }
            }
        }
    }

    #[test]
    fn what_is_not_honoured_says_why() {
        for setting in settings().filter(|setting| !matches!(setting.here, Here::Option(_) | Here::Worker)) {
            assert!(!setting.note.is_empty(), "{}", setting.name);
        }
    }

    fn of(name: &str, value: Value) -> Said {
        let setting = settings().find(|setting| setting.name == name).expect("a setting");
        Said { setting, value, place: "there".to_owned() }
    }

    #[test]
    fn a_value_that_asks_for_nothing_is_no_reason_to_complain() {
        for (name, value) in [
            ("accesslog", Value::Null),
            ("daemon", false.into()),
            ("errorlog", "-".into()),
            ("protocol", "http".into()),
            ("header_map", "drop".into()),
            ("reload_extra_files", Value::Array(Vec::new())),
            ("capture_output", true.into()),
            ("workers", 3.into()),
        ] {
            assert_eq!(of(name, value).complaint(), None, "{name}");
        }
        for (name, value) in [
            ("accesslog", Value::from("-")),
            ("daemon", true.into()),
            ("worker_tmp_dir", "/dev/shm".into()),
            ("header_map", "refuse".into()),
            ("ipv4", false.into()),
        ] {
            let line = of(name, value).complaint().expect("not honoured");
            assert!(line.starts_with(&format!("{name} (there) is not ")), "{line}");
        }
    }

    #[test]
    fn values_become_words_of_our_own_command_line() {
        let words = |name: &str, value: Value| of(name, value).words(|option| option == "check");
        assert_eq!(words("bind", serde_json::json!(["a:1", "unix:/x"])), ["--bind=a:1", "--bind=unix:/x"]);
        assert_eq!(words("timeout", " 30 ".into()), ["--timeout=30"]);
        assert_eq!(words("preload_app", true.into()), ["--preload=true"]);
        assert_eq!(words("preload_app", "False".into()), ["--preload=false"]);
        assert_eq!(words("check_config", true.into()), ["--check"]);
        assert!(words("check_config", false.into()).is_empty() && words("accesslog", "-".into()).is_empty());
        assert_eq!(words("trusted_proxy_headers", "x-forwarded-for X-Forwarded-Proto".into()), ["--forwarded-fields=x-forwarded"]);
        assert_eq!(words("trusted_proxy_headers", "forwarded".into()), ["--forwarded-fields=forwarded"]);
        assert!(of("trusted_proxy_headers", "forwarded x-forwarded-for".into()).unhonoured().is_some());
    }
}
