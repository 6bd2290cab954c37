//! What configuration is accepted, refused and printed.
