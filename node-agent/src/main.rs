//! The node agent.

fn main() -> std::process::ExitCode {
    node_agent::command_line::run()
}
