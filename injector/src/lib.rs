//! The webhooks.
