//! The webhooks' process.

fn main() {}
