//! The example services and the small clients of the lab.

use clap::Parser as _;
use mesh_tests::example::Example;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    Example::parse().run().await
}
