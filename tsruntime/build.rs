//! Builds the engine from ../csrc with CMake, and links it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_owned();
    // Relative to the crate: a target folder that was copied from another checkout must not go by that one's files.
    for path in ["../csrc", "../CMakeLists.txt"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let bin = root.join(".venv/bin");
    let mut config = cmake::Config::new(&root);
    config
        .define("TS_PYTHON", python(&bin))
        .build_target("tsengine")
        .out_dir(env::var("OUT_DIR").expect("cargo sets it"));
    if let Some(ninja) = tool("ninja", &bin) {
        config.generator("Ninja").define("CMAKE_MAKE_PROGRAM", ninja);
    }
    if env::var_os("CMAKE").is_none()
        && let Some(cmake) = tool("cmake", &bin)
    {
        // The one place where the crate looks.
        unsafe { env::set_var("CMAKE", cmake) };
    }
    let built = config.build();
    println!("cargo::rustc-link-search=native={}", built.join("build").display());
    println!("cargo::rustc-link-lib=static=tsengine");
    println!("cargo::rustc-link-lib=stdc++");
}

/// A program of the repository's environment, else on PATH: the same one whoever builds, so that nothing is built twice.
fn tool(name: &str, bin: &Path) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    std::iter::once(bin.to_owned())
        .chain(env::split_paths(&path))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// A Python that has the C++ dependencies: they are packages of its index.
fn python(bin: &Path) -> PathBuf {
    println!("cargo::rerun-if-env-changed=TS_PYTHON");
    let given = env::var_os("TS_PYTHON").map(PathBuf::from);
    let candidates = given.into_iter().chain([bin.join("python"), PathBuf::from("python3")]);
    let has = |python: &PathBuf| {
        let output = Command::new(python).args(["-c", "import nlohmann_json"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let mut tried = Vec::new();
    for python in candidates {
        if has(&python) {
            return python;
        }
        tried.push(python.display().to_string());
    }
    panic!(
        "no Python with the package nlohmann-json was found (tried {}): run `make setup`, or set TS_PYTHON",
        tried.join(", ")
    );
}
