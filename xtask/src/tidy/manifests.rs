//! Names that the manifests and the code must agree on: environment variables and ports.
//!
//! The code's side is what clap knows: `env = "NAME"` beside a flag, and the port at the end of its default value.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::File;

/// Where the daemons' flags are.
const CODE: [&str; 3] = ["mesh-core/src/", "node-agent/src/", "ztunnel/src/"];
/// Ports of sockets that the datapath opens, which are no flag.
const FIXED_PORTS: [u16; 1] = [15008];

pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let code =
        || files.iter().filter(|f| f.has_extension("rs") && CODE.iter().any(|room| f.path.starts_with(room)));
    let variables: BTreeSet<&str> = code().flat_map(|file| quoted_after(&file.text, "env = \"")).collect();
    let ports: BTreeSet<u16> = code()
        .flat_map(|file| {
            quoted_after(&file.text, "default_value = \"").chain(quoted_after(&file.text, "\"0.0.0.0:"))
        })
        .filter_map(|value| value.rsplit(':').next()?.parse().ok())
        .chain(FIXED_PORTS)
        .collect();
    let mut findings = Vec::new();
    for file in files.iter().filter(|f| f.path.starts_with("manifests/base/") && f.has_extension("yaml")) {
        findings.extend(unknown_variables(file, &variables));
        findings.extend(unknown_ports(file, &ports));
        findings.extend(short_grace(file));
    }
    findings
}

fn quoted_after<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split('"').next())
}

/// Names in an `env:` list are the only upper-case ones.
fn unknown_variables(file: &File, known: &BTreeSet<&str>) -> Vec<Finding> {
    file.lines()
        .filter_map(|(number, line)| Some((number, line.trim().strip_prefix("- name: ")?)))
        .filter(|(_, name)| name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
        .filter(|(_, name)| !known.contains(name))
        .map(|(number, name)| Finding::new(&file.path, number, format!("no daemon reads {name}")))
        .collect()
}

fn unknown_ports(file: &File, known: &BTreeSet<u16>) -> Vec<Finding> {
    let port = |line: &str| {
        let (key, value) = line.trim().trim_start_matches("- ").split_once(": ")?;
        ["port", "containerPort", "prometheus.io/port"]
            .contains(&key)
            .then(|| value.trim_matches('"').parse().ok())?
    };
    file.lines()
        .filter_map(|(number, line)| Some((number, port(line)?)))
        .filter(|(_, port)| !known.contains(port))
        .map(|(number, port)| {
            Finding::new(&file.path, number, format!("no daemon listens on {port} by default"))
        })
        .collect()
}

/// Who is killed before its own deadline cannot end its connections in order.
fn short_grace(file: &File) -> Option<Finding> {
    let seconds = |text: &str| text.trim().trim_matches('"').parse::<u32>().ok();
    let lines: Vec<(usize, &str)> = file.lines().map(|(number, line)| (number, line.trim())).collect();
    let name = lines.iter().position(|(_, line)| *line == "- name: CONNECTION_TERMINATION_DEADLINE")?;
    let deadline = seconds(lines.get(name + 1)?.1.strip_prefix("value:")?)?;
    let (number, grace) = lines
        .iter()
        .find_map(|(number, line)| Some((*number, line.strip_prefix("terminationGracePeriodSeconds:")?)))?;
    (seconds(grace)? <= deadline).then(|| {
        let text = format!("the pod is killed before its connections have had their {deadline} seconds");
        Finding::new(&file.path, number, text)
    })
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::tidy::tree::File;

    #[test]
    fn manifests_use_the_names_and_ports_of_the_code() {
        let code = File::new(
            "ztunnel/src/config.rs",
            "#[arg(long, env = \"NODE_NAME\")]\n#[arg(long, default_value = \"0.0.0.0:15021\")]\n",
        );
        let manifest = |name: &str, port: u16| {
            let text = format!(
                "env:\n  - name: {name}\n    value: x\nports:\n  - name: http-ready\n    containerPort: {port}\n"
            );
            check(&[
                File::new("ztunnel/src/config.rs", &code.text),
                File::new("manifests/base/z.yaml", &text),
            ])
            .len()
        };
        assert_eq!(manifest("NODE_NAME", 15021), 0);
        assert_eq!(manifest("NODENAME", 15021), 1);
        assert_eq!(manifest("NODE_NAME", 15022), 1);
    }
    #[test]
    fn the_kubelet_waits_for_longer_than_connections_may_go_on() {
        let manifest = |grace: u32| {
            let text = format!(
                "terminationGracePeriodSeconds: {grace}\nenv:\n  - name: CONNECTION_TERMINATION_DEADLINE\n    value: \"60\"\n"
            );
            let code = "env = \"CONNECTION_TERMINATION_DEADLINE\"";
            check(&[File::new("ztunnel/src/config.rs", code), File::new("manifests/base/z.yaml", &text)])
                .len()
        };
        assert_eq!(manifest(90), 0);
        assert_eq!(manifest(60), 1);
        assert_eq!(manifest(30), 1);
    }
}
