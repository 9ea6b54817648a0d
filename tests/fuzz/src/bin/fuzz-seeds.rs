//! Writes the seeds of every target below a directory: `<directory>/<target>/seed-<number>`.

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let directory: PathBuf =
        env::args_os().nth(1).ok_or_else(|| io::Error::other("which directory?"))?.into();
    for target in mesh_fuzz::TARGETS {
        let own = directory.join(target.name);
        fs::create_dir_all(&own)?;
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            fs::write(own.join(format!("seed-{number}")), seed)?;
        }
        println!("{}", target.name);
    }
    Ok(())
}
