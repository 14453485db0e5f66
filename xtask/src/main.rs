//! Test, CI and bench runners of the workspace.

fn main() {}
