//! The node agent with maps of another layout, as of another version: upgrades are tested with it.

fn main() -> std::process::ExitCode {
    node_agent::command_line::run()
}
