//! See `mesh_tests::faulty`: what the netns suite runs and ends.

use clap::Parser as _;
use mesh_tests::faulty;

fn main() -> anyhow::Result<()> {
    faulty::run(faulty::Arguments::parse())
}
