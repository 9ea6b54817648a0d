//! Serves the index to the proxies as delta xDS.
