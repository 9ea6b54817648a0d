//! A lab that is left running: what one can try in it, with no command that is not there.

use std::path::{Path, PathBuf};

use crate::Lab;

/// Where a shell of root looks for programs anyway.
const USUAL: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Say what to try, and stay until a signal ends the process.
pub(super) fn until_interrupted(lab: &Lab) {
    eprintln!("\nThe lab runs until Ctrl-C. In another shell, as root:\n");
    for line in advice(lab.name(), lab.kubeconfig(), find) {
        eprintln!("  {line}");
    }
    eprintln!();
    loop {
        // The run's own signal handler removes the lab and ends the process.
        std::thread::park();
    }
}

/// Lines for a shell, in this order; `find` is where a program is on the PATH.
fn advice(run: &str, kubeconfig: &Path, find: impl Fn(&str) -> Option<PathBuf>) -> Vec<String> {
    let mut lines = vec![format!("export KUBECONFIG={}", kubeconfig.display())];
    let kubectl = find("kubectl");
    let directory = kubectl.as_deref().and_then(Path::parent);
    if let Some(directory) =
        directory.filter(|directory| !USUAL.iter().any(|usual| Path::new(usual) == *directory))
    {
        lines.push(format!("export PATH=\"$PATH:{}\"", directory.display()));
    }
    for (program, command) in [
        ("kubectl", "kubectl get pods -A -o wide".to_owned()),
        ("kubectl", "kubectl -n ambit-system logs ds/ztunnel".to_owned()),
        (
            "kubectl",
            "kubectl label namespace payments istio.io/dataplane-mode-    # leave the mesh".to_owned(),
        ),
        (
            "tcpdump",
            format!("ip netns exec {run}-fabric tcpdump -ni any port 15008    # what crosses the fabric"),
        ),
        (
            "curl",
            format!(
                "ip netns exec {run}-n1 curl -s \"http://$(kubectl -n ambit-system get pods -l app=ztunnel \
                 --field-selector spec.nodeName=n1 -o jsonpath='{{.items[0].status.podIP}}'):15020/metrics\""
            ),
        ),
    ] {
        if find(program).is_some() {
            lines.push(command);
        }
    }
    lines
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said on a machine with these programs.
    fn told(there: &[&str]) -> Vec<String> {
        let find = |program: &str| {
            there.iter().map(PathBuf::from).find(|path| path.file_name().is_some_and(|name| name == program))
        };
        advice("amb1234", Path::new("/run/k"), find)
    }

    #[test]
    fn names_only_what_is_there_and_where_it_is() {
        let bare = told(&["/w/target/tools/bin/kubectl", "/usr/bin/curl"]);
        assert_eq!(bare[..2], ["export KUBECONFIG=/run/k", "export PATH=\"$PATH:/w/target/tools/bin\""]);
        assert!(bare.iter().any(|line| line.starts_with("kubectl get pods")), "{bare:?}");
        assert!(bare.iter().any(|line| line.starts_with("ip netns exec amb1234-n1 curl")), "{bare:?}");
        assert!(!bare.iter().any(|line| line.contains("tcpdump")), "{bare:?}");
        let full = told(&["/usr/bin/kubectl", "/usr/bin/curl", "/usr/bin/tcpdump"]);
        assert!(!full.iter().any(|line| line.contains("PATH=")), "{full:?}");
        assert!(full.iter().any(|line| line.contains("tcpdump -ni any port 15008")), "{full:?}");
    }
}
