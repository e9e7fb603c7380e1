//! Where settings come from, and which of them wins.
//!
//! ```text
//!   command line  >  URINGD_ variables  >  GUNICORN_CMD_ARGS  >  uringd.toml, or gunicorn.conf.py  >  defaults
//! ```
//!
//! Whatever the place, a setting of gunicorn's or waitress's is first turned into words of uringd's own command line
//! (`compat/`), so that it is read and checked in one way, and every complaint is about a name that the operator wrote.

use std::{collections::BTreeMap, ffi::OsString, fmt, fs, iter, path::Path};

use clap::{Command, CommandFactory, FromArgMatches, error::ErrorKind};
use serde_json::{Map, Value};

use crate::{
    cli::{Options, Target, Usage, forwarded_allow_ips},
    compat::{self, Here, Program, Said},
    error::Error,
    python::zygote::Zygote,
};

const TOML_FILE: &str = "uringd.toml";
const GUNICORN_FILE: &str = "gunicorn.conf.py";
const COMMAND_LINE: &str = "command line";
const GUNICORN_ARGUMENTS: &str = "GUNICORN_CMD_ARGS";

/// Everything that was said, wherever.
#[derive(Debug)]
pub struct Sources {
    pub options: Options,
    /// The settings of gunicorn and waitress among it that are no options here, and all of gunicorn's file.
    pub said: Vec<Said>,
    /// gunicorn's configuration file: its path, or `python:MODULE`.
    pub gunicorn: Option<String>,
    /// Words of `GUNICORN_CMD_ARGS` that are nothing to anybody.
    unknown: Vec<String>,
}

/// What was said cannot be understood, or was a question (`--help`).
#[derive(Debug)]
pub enum Misread {
    CommandLine(Box<clap::Error>),
    Elsewhere(Usage),
    /// gunicorn's file could not be evaluated.
    File(Error),
}

impl Sources {
    /// Reads all of them. gunicorn's file is executed by the application's interpreter, and is not looked for when the target
    /// is no Python application.
    ///
    /// # Errors
    /// [`Misread`], for the first that cannot be understood.
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Result<Sources, Misread> {
        let command = compat::accept(Options::command()).args_override_self(true);
        let words: Vec<OsString> = words.into_iter().collect();
        let (options, said) = parse(&command, &words, COMMAND_LINE).map_err(|error| Misread::CommandLine(Box::new(error)))?;
        let mut sources = Sources { options, said, gunicorn: None, unknown: Vec::new() };
        // The command looks at the variables again, in vain: what they say is said already, and wins.
        sources.add_gunicorn_arguments(&command)?;
        sources.add_file(&command)?;
        Ok(sources)
    }

    fn add_gunicorn_arguments(&mut self, command: &Command) -> Result<(), Misread> {
        let Ok(text) = std::env::var(GUNICORN_ARGUMENTS) else { return Ok(()) };
        let misread = |why: &str| Misread::Elsewhere(Usage(format!("{GUNICORN_ARGUMENTS}: {why}")));
        let mut words: Vec<OsString> =
            shlex::split(&text).ok_or_else(|| misread("a quotation has no end"))?.into_iter().map(OsString::from).collect();
        words.insert(0, "uringd".into());
        let (mut options, said) = loop {
            match parse(command, &words, GUNICORN_ARGUMENTS) {
                Ok(parsed) => break parsed,
                Err(error) => match unknown_word(&error, &words) {
                    Some(at) => self.unknown.push(words.remove(at).to_string_lossy().into_owned()),
                    None => return Err(misread(&first_line(&error))),
                },
            }
        };
        // gunicorn takes no application from there either.
        options.target = None;
        self.said.extend(said);
        self.options = std::mem::take(&mut self.options).over(options);
        Ok(())
    }

    fn add_file(&mut self, command: &Command) -> Result<(), Misread> {
        let target = self.options.target.as_deref().map(Target::from_text);
        let may_be_python = matches!(target, None | Some(Ok(Target::Python(_))));
        match self.options.config.clone() {
            Some(path) if is_gunicorns(&path.to_string_lossy()) => self.add_gunicorn_file(command, &path.to_string_lossy()),
            Some(path) => self.add_toml(&path),
            None if Path::new(TOML_FILE).exists() => self.add_toml(Path::new(TOML_FILE)),
            None if may_be_python && Path::new(GUNICORN_FILE).exists() => self.add_gunicorn_file(command, GUNICORN_FILE),
            None => Ok(()),
        }
    }

    fn add_toml(&mut self, path: &Path) -> Result<(), Misread> {
        let misread = |why: String| Misread::Elsewhere(Usage(why));
        let text = fs::read_to_string(path)
            .map_err(|error| misread(format!("cannot read {}: {error}; try: --config with the path of a file", path.display())))?;
        let file = toml::from_str(&text).map_err(|error| misread(format!("{}: {error}", path.display())))?;
        let mut options = std::mem::take(&mut self.options);
        // The environment wins over the file under gunicorn's name, too.
        options.forwarded_allow_ips = options.forwarded_allow_ips.or_else(forwarded_allow_ips);
        self.options = options.over(file);
        Ok(())
    }

    fn add_gunicorn_file(&mut self, command: &Command, location: &str) -> Result<(), Misread> {
        let misread = |why: String| Misread::Elsewhere(Usage(why));
        let location = location.strip_prefix("file:").unwrap_or(location);
        if !location.starts_with("python:") && !Path::new(location).is_file() {
            return Err(misread(format!("there is no file {location}; try: --config with the path of one, or python:MODULE")));
        }
        let all: BTreeMap<&str, &'static compat::Setting> =
            compat::sections(Program::Gunicorn).iter().flat_map(|section| section.1).map(|setting| (setting.name, setting)).collect();
        let names: Vec<&str> = all.keys().copied().collect();
        let interpreter = self.options.interpreter();
        let evaluated = Zygote::settings(&interpreter, location, &names);
        let evaluated = evaluated.map_err(|source| Misread::File(Error::Interpreter { path: interpreter, source }))?;
        let values = evaluated.map_err(|told| Misread::File(Error::Settings { place: location.to_owned(), told }))?;
        // None is how gunicorn says that nothing was said.
        let values = values.into_iter().filter(|(_, value)| !value.is_null());
        let said = values.filter_map(|(name, value)| Some(Said { setting: all.get(name.as_str())?, value, place: location.to_owned() }));
        let said: Vec<Said> = said.collect();
        let is_flag = |option: &str| is_flag(command, option);
        let mut words: Vec<OsString> = vec!["uringd".into()];
        for one in &said {
            let more = one.words(is_flag).into_iter().map(OsString::from);
            // Alone first, so that the name of what cannot be meant is known.
            let alone: Vec<OsString> = iter::once("uringd".into()).chain(more.clone()).collect();
            if let Err(error) = command.clone().try_get_matches_from(alone) {
                return Err(misread(format!("{location}: {} = {}: {}", one.setting.name, one.value, first_line(&error))));
            }
            words.extend(more);
        }
        let (options, _) = parse(command, &words, location).map_err(|error| misread(format!("{location}: {}", first_line(&error))))?;
        self.said.extend(said);
        self.options = std::mem::take(&mut self.options).over(options);
        self.gunicorn = Some(location.to_owned());
        Ok(())
    }

    /// A line for each setting that is not honoured.
    pub fn complaints(&self) -> Vec<String> {
        let unknown = self.unknown.iter().map(|word| format!("{word} ({GUNICORN_ARGUMENTS}) is no option of gunicorn or uringd"));
        self.said.iter().filter_map(Said::complaint).chain(unknown).collect()
    }

    /// What uringd must not start without: who asked for encryption would get none.
    pub fn missing(&self) -> Option<String> {
        let vital = |said: &&Said| matches!(said.setting.name, "certfile" | "keyfile");
        self.said.iter().filter(vital).find_map(Said::complaint)
    }

    /// Whether a setting of this name was said.
    pub fn says(&self, name: &str) -> bool {
        self.said.iter().any(|said| said.setting.name == name)
    }

    /// gunicorn's settings as its hooks see them: what is effective, where it is an option here. `effective` are keys and
    /// values of the configuration file.
    pub fn settings(&self, effective: &BTreeMap<&str, &str>) -> Map<String, Value> {
        let mut settings = Map::new();
        for setting in compat::sections(Program::Gunicorn).iter().flat_map(|section| section.1) {
            let value = match setting.here {
                Here::Option(option) => effective.get(option).map(|value| serde_json::from_str(value).unwrap_or_else(|_| (*value).into())),
                _ => None,
            };
            // The command line's, when it is said there and in the file.
            let said = self.said.iter().find(|said| said.setting.name == setting.name && said.value.is_string());
            let value = value.or_else(|| said.map(|said| said.value.clone()));
            settings.insert(setting.name.to_owned(), value.unwrap_or(Value::Null));
        }
        settings
    }

    /// What became of every setting, as comments of the configuration file.
    pub fn report<'a>(&'a self, effective: &'a BTreeMap<&str, &str>) -> impl fmt::Display + 'a {
        Report { sources: self, effective }
    }
}

struct Report<'a> {
    sources: &'a Sources,
    effective: &'a BTreeMap<&'a str, &'a str>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (honoured, vain): (Vec<&Said>, Vec<&Said>) = self.sources.said.iter().partition(|said| said.unhonoured().is_none());
        if !honoured.is_empty() {
            writeln!(f, "# gunicorn's and waitress's settings that are honoured:")?;
        }
        for Said { setting, place, .. } in honoured {
            let effective = match setting.here {
                Here::Option(option) => self.effective.get(option).map(|value| format!("{option} = {value}")),
                Here::Missing(_) => Some("as it is anyway".to_owned()),
                _ => None,
            };
            match effective.unwrap_or_else(|| setting.note.to_owned()) {
                text if text.is_empty() => writeln!(f, "#   {} ({place})", setting.name)?,
                text => writeln!(f, "#   {} ({place}): {text}", setting.name)?,
            }
        }
        if !vain.is_empty() || !self.sources.unknown.is_empty() {
            writeln!(f, "# and those that are not:")?;
        }
        for said in vain {
            writeln!(f, "#   {} ({}): {}", said.setting.name, said.place, said.unhonoured().unwrap_or_default())?;
        }
        for word in &self.sources.unknown {
            writeln!(f, "#   {word} ({GUNICORN_ARGUMENTS}): no option of gunicorn or uringd")?;
        }
        Ok(())
    }
}

/// Keys and values of lines like `workers = 2`.
pub fn keys_and_values(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(" = ")).collect()
}

/// The options that the words are, and the settings of other servers among them that are none.
fn parse(command: &Command, words: &[OsString], place: &str) -> Result<(Options, Vec<Said>), clap::Error> {
    let mut matches = command.clone().try_get_matches_from(words)?;
    let said = compat::said(&matches, place);
    let made: Vec<OsString> = said.iter().flat_map(|said| said.words(|option| is_flag(command, option))).map(OsString::from).collect();
    if !made.is_empty() {
        // Before what was written, which has the last word.
        let words: Vec<OsString> = words[..1].iter().cloned().chain(made).chain(words[1..].iter().cloned()).collect();
        matches = command.clone().try_get_matches_from(words)?;
    }
    Options::from_arg_matches(&matches).map(|options| (options, said))
}

/// Whether the option takes no value.
fn is_flag(command: &Command, long: &str) -> bool {
    command.get_arguments().any(|arg| arg.get_long() == Some(long) && !arg.get_action().takes_values())
}

/// Where among the words the one stands that nobody knows, if that is what is wrong.
fn unknown_word(error: &clap::Error, words: &[OsString]) -> Option<usize> {
    use clap::error::{ContextKind, ContextValue};
    let ErrorKind::UnknownArgument = error.kind() else { return None };
    let ContextValue::String(word) = error.get(ContextKind::InvalidArg)? else { return None };
    let is_it = |said: &OsString| {
        let said = said.to_string_lossy();
        said == word.as_str() || said.split_once('=').is_some_and(|(name, _)| name == word)
    };
    // The first word is the program's name. Of letters behind one dash, only the first can be found by its word.
    let found = words.iter().skip(1).position(is_it);
    found.or_else(|| words.iter().skip(1).position(|said| said.to_string_lossy().starts_with(word))).map(|at| at + 1)
}

/// `invalid value 'x' for '--timeout <SECS>': ...`
fn first_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    text.lines().next().unwrap_or("").trim_start_matches("error: ").to_owned()
}

/// By its name: gunicorn's file is Python, ours is TOML.
fn is_gunicorns(location: &str) -> bool {
    let path = Path::new(location);
    let is_python = path.extension().is_some_and(|ending| ending == "py" || ending == "pyc");
    let names_gunicorn = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("gunicorn"));
    location.starts_with("python:") || location.starts_with("file:") || is_python || names_gunicorn
}
