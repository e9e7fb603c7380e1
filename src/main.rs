//! The program: options to configuration to server. Exit statuses: 0 drained, 1 could not start, 2
//! usage, 3 requests lost at the drain limit.

use std::{fs, path::Path, process::ExitCode};

use clap::Parser;
use uringd::{
    Config, Server,
    cli::{Options, Target, Usage},
    config::MEMORY_BASE_BYTES,
    doctor,
    error::{Error, split_hint},
};

const CONFIG_FILE: &str = "uringd.toml";

fn main() -> ExitCode {
    let options = match Options::parse().with_file() {
        Ok(options) => options,
        Err(usage) => return fail(&usage, 1),
    };
    // Kept until the end: dropping it writes what is still in the log's queue.
    let _log = match uringd::log::start(options.log_level.as_deref(), options.log_format.as_deref()) {
        Ok(guard) => guard,
        Err(usage) => return fail(&usage, 2),
    };
    if options.doctor {
        return match options.config(std::env::var("PORT").ok().as_deref()) {
            Ok(config) => examine(&config),
            Err(usage) => fail(&usage, 2),
        };
    }
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(usage)) => fail(&usage, 2),
        Err(Failure::Target(usage)) => fail(&usage, 1),
        Err(Failure::Server(error @ Error::DrainLimit { .. })) => fail(&error, 3),
        Err(Failure::Server(error)) => {
            if let Error::Application { told, .. } = &error {
                // As Python shows it; what it ends with is what to try, and stands in our own line.
                eprint!("{}", split_hint(told).0);
            }
            fail(&error, 1)
        }
    }
}

enum Failure {
    Usage(Usage),
    Target(Usage),
    Server(Error),
}

fn serve(options: &Options) -> Result<(), Failure> {
    let config = options.config(std::env::var("PORT").ok().as_deref()).map_err(Failure::Usage)?;
    let text = options.target.as_deref().unwrap_or("builtin:welcome");
    let concurrency = std::env::var("WEB_CONCURRENCY").ok();
    let server = match Target::from_text(text).map_err(Failure::Target)? {
        Target::Builtin(builtin) => Server::with_handler(builtin).target(builtin.name()),
        Target::Python(app) => Server::with_python(options.python_app(&app, concurrency.as_deref()).map_err(Failure::Usage)?),
        Target::Unsupported(what) => {
            return Err(Failure::Target(Usage(format!(
                "{text} looks like {what}, which this version cannot serve yet; try: builtin:welcome"
            ))));
        }
    };
    if options.check {
        print!("target = \"{text}\"\n{config}\n{}", memory(&config));
        return Ok(());
    }
    server.config(config).run().map_err(Failure::Server)
}

/// The memory ceiling, as comments of the configuration file.
fn memory(config: &Config) -> String {
    let mib = |bytes: u64| format!("{:>8.1} MiB", bytes as f64 / (1 << 20) as f64);
    let parts = config.memory_ceiling();
    let core: u64 = parts.iter().map(|part| part.1).sum();
    let rows: Vec<String> = parts.iter().map(|(name, bytes)| format!("# {}  {name}\n", mib(*bytes))).collect();
    format!(
        "# memory, at most, for each core:\n{}# {}  in all, and {} for the process; what handlers allocate comes on top\n",
        rows.concat(),
        mib(core),
        mib(MEMORY_BASE_BYTES).trim(),
    )
}

/// What the doctor found, on standard output.
fn examine(config: &Config) -> ExitCode {
    let report = doctor::examine(config);
    print!("{report}");
    ExitCode::from(u8::from(report.has_problem()))
}

fn fail(error: &dyn std::error::Error, status: u8) -> ExitCode {
    eprintln!("uringd: {error}");
    ExitCode::from(status)
}

trait WithFile: Sized {
    fn with_file(self) -> Result<Self, Usage>;
}

impl WithFile for Options {
    /// Adds what the configuration file says.
    fn with_file(self) -> Result<Options, Usage> {
        let path = match &self.config {
            Some(path) => path.clone(),
            None if Path::new(CONFIG_FILE).exists() => CONFIG_FILE.into(),
            None => return Ok(self),
        };
        let text =
            fs::read_to_string(&path).map_err(|error| Usage(format!("cannot read {}: {error}; try: --config FILE", path.display())))?;
        let file = toml::from_str(&text).map_err(|error| Usage(format!("{}: {error}", path.display())))?;
        Ok(self.over(file))
    }
}
