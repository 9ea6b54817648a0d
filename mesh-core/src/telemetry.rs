//! Logs: one line an event on standard output, as text for people or as JSON for collectors.
//!
//! Other parts only use `tracing`'s macros; the subscriber is chosen here, once, by `main`.

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

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
    /// A subscriber is installed already.
    #[error("logging was set up twice in one process")]
    Twice,
}

/// Sends this process's log events to standard output from now on.
///
/// # Errors
/// When the level is not understood, or on a second call.
pub fn init(config: &Config) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(&config.log_level)
        .map_err(|source| TelemetryError::Level { value: config.log_level.clone(), source })?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stdout);
    let installed = match config.log_format {
        Format::Text => subscriber.with_ansi(false).try_init(),
        Format::Json => subscriber.json().flatten_event(true).with_current_span(false).try_init(),
    };
    installed.map_err(|_| TelemetryError::Twice)
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
}
