//! One connection, with one call made on it, kept open.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinSet;

use crate::http1::Connection;
use crate::http2::Shared;
use crate::target::{Protocol, Target};

const TIMEOUT: Duration = Duration::from_secs(10);

/// An open connection; it closes when this is dropped.
pub(crate) enum Held {
    Alone(#[expect(dead_code, reason = "kept open, not used")] Connection),
    Shared(#[expect(dead_code, reason = "kept open, not used")] Shared),
}

/// Connects, makes one call, and returns the connection and the status of the answer.
///
/// Tasks that drive connections run in `tasks`.
///
/// # Errors
///
/// When there is no complete answer within ten seconds.
pub(super) async fn open(
    target: &Target,
    tasks: &Rc<RefCell<JoinSet<()>>>,
) -> anyhow::Result<(Held, u16)> {
    let opened = async {
        if target.protocol == Protocol::Http1 {
            let mut connection = Connection::new(target.connect(TIMEOUT).await?);
            let answer = connection.call(&target.bytes, false).await?;
            return anyhow::Ok((Held::Alone(connection), answer.status));
        }
        let shared = Shared::open(target, TIMEOUT, Rc::clone(tasks)).await?;
        let answer = shared.call(target, TIMEOUT).await?;
        Ok((Held::Shared(shared), answer.status))
    };
    let opened = tokio::time::timeout(TIMEOUT, opened);
    opened.await.context("no answer in time")?
}
