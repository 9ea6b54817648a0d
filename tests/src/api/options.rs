//! What a request's parameters say of how to write or delete: `CreateOptions`, `UpdateOptions`, `PatchOptions` and
//! `DeleteOptions` of meta/v1.

use serde_json::Value;

use super::cluster::{Deletion, Write};
use super::meta;
use super::serve::Call;
use super::status::Status;

const APPLY: &str = "application/apply-patch+yaml";

impl Call<'_> {
    /// How to write, or 422 if the parameters make no sense.
    pub(super) fn write(&self) -> Result<Write, Status> {
        let query = &self.request.query;
        let applies = self.content_type.starts_with(APPLY);
        let mut faults = Vec::new();
        for (name, supported) in
            [("dryRun", &["All"][..]), ("fieldValidation", &["Ignore", "Strict", "Warn"][..])]
        {
            let value = query.text(name);
            if !value.is_empty() && !supported.contains(&value) {
                let supported: Vec<String> = supported.iter().map(|word| format!("{word:?}")).collect();
                let why = format!("Unsupported value: {value:?}: supported values: {}", supported.join(", "));
                faults.push((name.to_owned(), why));
            }
        }
        let options = match self.request.attributes.verb.as_str() {
            "patch" => "PatchOptions",
            "update" => "UpdateOptions",
            "create" => "CreateOptions",
            _ => "DeleteOptions",
        };
        if options == "PatchOptions" && query.flag("force") && !applies {
            faults
                .push(("force".to_owned(), "Forbidden: may not be specified for non-apply patch".to_owned()));
        }
        if !faults.is_empty() {
            return Err(Status::invalid(options, "meta.k8s.io", "", &faults));
        }
        Ok(Write {
            dry_run: !query.text("dryRun").is_empty(),
            strict: query.text("fieldValidation") == "Strict",
            manager: self.manager(applies),
            force: query.flag("force"),
            applied: false,
        })
    }

    /// Who the client says it is: by the parameter, else as in `User-Agent: kubectl/v1.33.0`.
    fn manager(&self, applies: bool) -> String {
        match self.request.query.text("fieldManager") {
            "" if applies => String::new(),
            "" => self.agent.split('/').next().unwrap_or_default().chars().take(128).collect(),
            named => named.to_owned(),
        }
    }

    /// How to delete, by `DeleteOptions` of the body and by the parameters, which count more.
    pub(super) fn deletion(&self, options: &Value) -> Result<Deletion, Status> {
        let query = &self.request.query;
        let precondition = |name: &str| options["preconditions"][name].as_str().map(str::to_owned);
        let policy = match query.text("propagationPolicy") {
            "" => meta::text(options, "/propagationPolicy"),
            asked => asked,
        };
        Ok(Deletion {
            grace: query.number("gracePeriodSeconds")?.or(options["gracePeriodSeconds"].as_u64()),
            uid: precondition("uid"),
            version: precondition("resourceVersion"),
            orphan: policy == "Orphan" || options["orphanDependents"] == true,
            foreground: policy == "Foreground",
            dry_run: self.write()?.dry_run || meta::items(options, "/dryRun").next().is_some(),
        })
    }
}
