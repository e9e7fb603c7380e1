//! The program: options to configuration to server. Exit statuses: 0 drained, 1 could not start, 2
//! usage, 3 requests lost at the drain limit.

use std::process::ExitCode;

use uringd::{
    Config, Server,
    cli::{Target, Usage},
    config::{MEMORY_BASE_BYTES, quoted},
    doctor,
    error::Error,
    sources::{Misread, Sources, keys_and_values},
};

fn main() -> ExitCode {
    let sources = match Sources::read(std::env::args_os()) {
        Ok(sources) => sources,
        Err(Misread::CommandLine(error)) => error.exit(),
        Err(Misread::Elsewhere(usage)) => return fail(&usage, 1),
        Err(Misread::File(error)) => return fail_to_start(&error),
    };
    let options = &sources.options;
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
    match serve(&sources) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(usage)) => fail(&usage, 2),
        Err(Failure::Target(usage)) => fail(&usage, 1),
        Err(Failure::Server(error @ Error::DrainLimit { .. })) => fail(&error, 3),
        Err(Failure::Server(error)) => fail_to_start(&error),
    }
}

enum Failure {
    Usage(Usage),
    Target(Usage),
    Server(Error),
}

fn serve(sources: &Sources) -> Result<(), Failure> {
    let options = &sources.options;
    let config = options.config(std::env::var("PORT").ok().as_deref()).map_err(Failure::Usage)?;
    if options.target.is_none() && sources.says("paste") {
        let text = "--paste: ini files are not read; try: a module as the target, with application = paste.deploy.loadapp('config:FILE')";
        return Err(Failure::Target(Usage(text.to_owned())));
    }
    let text = options.target.as_deref().unwrap_or("builtin:welcome");
    let mut effective = format!("target = {}\n{config}{}", quoted(text), options.rest());
    let concurrency = std::env::var("WEB_CONCURRENCY").ok();
    let (server, app) = match Target::from_text(text).map_err(Failure::Target)? {
        Target::Builtin(builtin) => (Server::with_handler(builtin).target(builtin.name()), None),
        Target::Python(app) => {
            let mut app = options.python_app(&app, concurrency.as_deref()).map_err(Failure::Usage)?;
            effective += &app.to_string();
            app.config.clone_from(&sources.gunicorn);
            app.has_worker_abort = sources.says("worker_abort");
            app.settings = sources.settings(&keys_and_values(&effective));
            (Server::with_python(app.clone()), Some(app))
        }
        Target::Unsupported(what) => {
            return Err(Failure::Target(Usage(format!(
                "{text} looks like {what}, which this version cannot serve yet; try: builtin:welcome"
            ))));
        }
    };
    if let Some(missing) = sources.missing() {
        return Err(Failure::Usage(Usage(missing)));
    }
    if options.check {
        print!("{effective}\n{}{}", memory(&config), sources.report(&keys_and_values(&effective)));
        if let Some(app) = app {
            let about = app.check().map_err(Failure::Server)?;
            let interface = about.interface.as_deref().unwrap_or("wsgi");
            println!("# the application {} loads: {interface}, Python {} ({})", app.app, about.python, about.implementation);
        }
        return Ok(());
    }
    sources.complaints().iter().for_each(|line| tracing::warn!("{line}"));
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

/// First what Python told, as it shows it; then our own line.
fn fail_to_start(error: &Error) -> ExitCode {
    eprint!("{}", error.told().unwrap_or_default());
    fail(error, 1)
}

fn fail(error: &dyn std::error::Error, status: u8) -> ExitCode {
    eprintln!("uringd: {error}");
    ExitCode::from(status)
}
