//! Logs: one line an event on standard output, as text for people or as JSON for collectors.
//!
//! Other parts only use `tracing`'s macros; the subscriber is chosen here, once, by `main`.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use http::{Request, Response, StatusCode};
use tracing_subscriber::{EnvFilter, reload};

use crate::status;

/// How to log.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Config {
    /// Log format: text or json
    #[arg(long, env = "LOG_FORMAT", default_value = "text", value_enum)]
    pub log_format: Format,
    /// Log level: error, warn, info, debug, trace, or a list such as "info,mesh_core::hbone=debug"
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log_level: String,
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging was not set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is not one.
    #[error("log level {value:?} is not understood ({source}); try \"info\" or \"info,mesh_core=debug\"")]
    Level {
        /// What was configured.
        value: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The log has ended.
    #[error("there is no log any more")]
    Gone,
    /// A subscriber is installed already.
    #[error("logging was set up twice in one process")]
    Twice,
}

/// The level of a process's log, which can be changed while it runs. Clones are the same.
#[derive(Clone)]
pub struct Levels {
    current: Arc<Mutex<String>>,
    reload: Arc<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>,
}

impl std::fmt::Debug for Levels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Levels").field("current", &self.current()).finish_non_exhaustive()
    }
}

impl Levels {
    /// For a process whose log is another's business: what is set changes nothing.
    pub fn fixed(current: &str) -> Self {
        Self { current: Arc::new(Mutex::new(current.to_owned())), reload: Arc::new(|_| Ok(())) }
    }

    /// As it was set last.
    pub fn current(&self) -> String {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs at another level from now on.
    ///
    /// # Errors
    /// When it is not understood.
    pub fn set(&self, level: &str) -> Result<(), TelemetryError> {
        // Held over both steps, so that `current` is what is in force.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        (self.reload)(filter(level)?).map_err(|_| TelemetryError::Gone)?;
        level.clone_into(&mut current);
        Ok(())
    }

    /// Answers `POST /logging`: with `?level=` sets it, and says in any case what it is.
    pub fn answer(&self, request: &Request<()>) -> Response<Bytes> {
        let query = request.uri().query().unwrap_or_default();
        let asked = query.split('&').find_map(|pair| pair.strip_prefix("level="));
        match asked.map(|level| self.set(level)) {
            Some(Err(error)) => status::text(StatusCode::BAD_REQUEST, format!("{error}\n")),
            Some(Ok(())) | None => {
                let current = self.current();
                let text =
                    format!("log level is {current}; set it by POST /logging?level=info,ztunnel=debug\n");
                status::text(StatusCode::OK, text)
            }
        }
    }
}

/// Libraries that would write a line, at a level of people's interest, for a frame or a record of a stranger's: what
/// comes of it is in our own lines, which are counted. A level that names them still turns them on.
const LIBRARIES: &str = "h2=error,rustls=error";

fn filter(level: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(format!("{LIBRARIES},{level}"))
        .map_err(|source| TelemetryError::Level { value: level.to_owned(), source })
}

/// Sends this process's log events to standard output from now on.
///
/// # Errors
/// When the level is not understood, or on a second call.
pub fn init(config: &Config) -> Result<Levels, TelemetryError> {
    let filter = filter(&config.log_level)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stdout);
    // The two forms are of different types.
    macro_rules! install {
        ($builder:expr) => {{
            let builder = $builder.with_filter_reloading();
            let handle = builder.reload_handle();
            builder.try_init().map_err(|_| TelemetryError::Twice)?;
            Arc::new(move |filter| handle.reload(filter))
        }};
    }
    let reload: Arc<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync> = match config.log_format {
        Format::Text => install!(builder.with_ansi(false)),
        Format::Json => install!(builder.json().flatten_event(true).with_current_span(false)),
    };
    Ok(Levels { current: Arc::new(Mutex::new(config.log_level.clone())), reload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_level_that_is_none() {
        let config = Config { log_format: Format::Text, log_level: "info,=,=".into() };
        let error = init(&config).unwrap_err().to_string();
        assert!(error.contains("info,=,="), "{error}");
    }

    #[test]
    fn strangers_write_no_lines_by_way_of_libraries() {
        let directives = |level: &str| filter(level).unwrap().to_string();
        assert!(directives("info").contains("h2=error"), "{}", directives("info"));
        let asked = directives("info,h2=debug");
        assert!(asked.contains("h2=debug") && !asked.contains("h2=error"), "{asked}");
    }

    #[test]
    fn the_level_is_shown_and_set() {
        let levels = Levels::fixed("info");
        let ask = |query: &str| {
            let request = Request::post(format!("http://x/logging{query}")).body(()).unwrap();
            let response = levels.answer(&request);
            (response.status().as_u16(), String::from_utf8(response.body().to_vec()).unwrap())
        };
        let (status, text) = ask("");
        assert!(status == 200 && text.starts_with("log level is info;"), "{text}");
        let (status, text) = ask("?x=1&level=info,mesh_core=debug");
        assert!(status == 200 && text.starts_with("log level is info,mesh_core=debug;"), "{text}");
        assert_eq!(ask("?level=info,=,=").0, 400);
        assert_eq!(levels.current(), "info,mesh_core=debug");
    }
}
