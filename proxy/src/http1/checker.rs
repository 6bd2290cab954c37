//! One direction of a connection, message after message.
//!
//! Always true: [`Checker::check`] is pure, passes a prefix of what it was given and nothing
//! else, and says the same however the bytes are cut into pieces.

use super::GuardLimits;
use super::framing::{Body, Chunks};
use super::head::{Facts, Head, Kind, Scan};
use super::rejection::{Reason, Rejection};

/// Most responses before the final one.
const INFORMATIONAL_MAX: u8 = 32;

/// What the next response answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The request's method is HEAD.
    pub(super) head: bool,
    /// The request asks for an upgrade.
    pub(super) upgrade: bool,
}

/// Why checking stopped before the end of what was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// A head is refused, of which nothing has passed.
    Reject(Rejection),
    /// The message breaks inside its body, or the bytes belong to no message.
    Fail(Rejection),
    /// An upgrade has been asked for: what follows waits until it is decided.
    Gate,
    /// The last message is over: what follows means nothing.
    Over,
}

/// What came of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checked {
    /// How many bytes from the start may pass.
    pub(super) pass: usize,
    /// How many bytes there are now; those that do not pass are to be given again, with more.
    pub(super) len: usize,
    /// Why nothing further was looked at.
    pub(super) stop: Option<Stop>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    /// A client's connection between two messages.
    Idle,
    Length(u64),
    Chunks(Chunks),
    Trailers,
    UntilClose,
    Gate,
    Raw,
    Over,
    Failed(Rejection),
}

/// Checks what one side of a connection sends.
#[derive(Debug)]
pub(super) struct Checker {
    limits: GuardLimits,
    kind: Kind,
    state: State,
    head: Head,
    facts: Facts,
    question: Option<Question>,
    blank_skipped: bool,
    informational: u8,
}

impl Checker {
    /// Checks the requests of an application.
    pub(super) fn requests(limits: GuardLimits) -> Self {
        Self::new(limits, Kind::Request, State::Head)
    }

    /// Checks the responses of an application.
    pub(super) fn responses(limits: GuardLimits) -> Self {
        Self::new(limits, Kind::Response, State::Idle)
    }

    fn new(limits: GuardLimits, kind: Kind, state: State) -> Self {
        Self {
            limits,
            kind,
            state,
            head: Head::new(kind),
            facts: Facts::default(),
            question: None,
            blank_skipped: false,
            informational: 0,
        }
    }

    /// Whether a block has to be complete before a byte of it passes.
    pub(super) fn wants_block(&self) -> bool {
        matches!(self.state, State::Head | State::Trailers)
    }

    /// Whether an upgrade waits for its decision.
    pub(super) fn at_gate(&self) -> bool {
        matches!(self.state, State::Gate)
    }

    /// Whether the last message is over.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Why the connection is of no further use.
    pub(super) fn failure(&self) -> Option<Rejection> {
        match self.state {
            State::Failed(rejection) => Some(rejection),
            _ => None,
        }
    }

    /// Lets everything pass from here on.
    pub(super) fn pass_all(&mut self) {
        self.state = State::Raw;
    }

    /// Goes on with requests behind an upgrade that was declined.
    pub(super) fn resume(&mut self) {
        if self.at_gate() {
            self.next_message();
        }
    }

    /// Takes the next response to answer `question`.
    pub(super) fn expect(&mut self, question: Question) {
        if matches!(self.state, State::Idle) {
            self.state = State::Head;
        }
        self.question = Some(question);
    }

    /// Takes note of a failure that was found elsewhere.
    pub(super) fn fail(&mut self, rejection: Rejection) {
        self.state = State::Failed(rejection);
    }

    /// What the end of the connection means now, with `held` bytes not yet passed.
    pub(super) fn end(&self, held: usize) -> Option<Reason> {
        match self.state {
            State::Head if held > 0 => Some(Reason::IncompleteHead),
            State::Length(_) | State::Chunks(_) | State::Trailers => Some(Reason::IncompleteBody),
            _ => None,
        }
    }

    /// Checks `data`, which starts with what the last call did not pass.
    pub(super) fn check(&mut self, data: &mut [u8]) -> Checked {
        let mut checked = Checked {
            pass: 0,
            len: data.len(),
            stop: None,
        };
        while checked.pass < checked.len || self.at_gate() || self.is_over() {
            let Some(rest) = data.get_mut(checked.pass..checked.len) else {
                break;
            };
            match self.step(rest) {
                Ok(Step::Pass(bytes)) => checked.pass += bytes,
                Ok(Step::Drop(bytes)) => {
                    rest.copy_within(bytes.., 0);
                    checked.len -= bytes;
                }
                Ok(Step::More) => break,
                Err((sound, stop)) => {
                    checked.pass += sound;
                    checked.stop = Some(stop);
                    if let Stop::Reject(rejection) | Stop::Fail(rejection) = stop {
                        self.fail(rejection);
                    }
                    break;
                }
            }
        }
        checked
    }

    fn step(&mut self, data: &[u8]) -> Result<Step, (usize, Stop)> {
        match self.state {
            State::Head => self.head(data),
            State::Trailers => self.trailers(data),
            State::Length(left) => {
                let taken = left.min(as_u64(data.len()));
                match left - taken {
                    0 => self.end_message(),
                    left => self.state = State::Length(left),
                }
                Ok(Step::Pass(usize::try_from(taken).unwrap_or(data.len())))
            }
            State::Chunks(mut chunks) => {
                let (bytes, last) = chunks.check(data).map_err(fail)?;
                self.state = State::Chunks(chunks);
                if last {
                    (self.head, self.state) = (Head::new(Kind::Trailers), State::Trailers);
                }
                Ok(Step::Pass(bytes))
            }
            State::UntilClose | State::Raw => Ok(Step::Pass(data.len())),
            State::Idle => Err(fail((0, Reason::UnsolicitedResponse))),
            State::Gate => Err((0, Stop::Gate)),
            State::Over => Err((0, Stop::Over)),
            State::Failed(rejection) => Err((0, Stop::Fail(rejection))),
        }
    }

    fn head(&mut self, data: &[u8]) -> Result<Step, (usize, Stop)> {
        let reject = |reason: Reason| (0, Stop::Reject(Rejection::from(reason)));
        match self.head.feed(data, &self.limits).map_err(reject)? {
            Scan::More => Ok(Step::More),
            Scan::Blank(bytes) => {
                // Old clients send CRLF behind a body; one is forgiven, and never passed on.
                if self.blank_skipped || self.kind == Kind::Response {
                    let response = self.kind == Kind::Response;
                    let reason = if response {
                        Reason::StatusLine
                    } else {
                        Reason::RequestLine
                    };
                    return Err(reject(reason));
                }
                (self.blank_skipped, self.head) = (true, Head::new(self.kind));
                Ok(Step::Drop(bytes))
            }
            Scan::Done(bytes) => {
                self.facts = self.head.facts();
                let more = data.len() > bytes;
                match self.kind {
                    Kind::Response => self.begin_response().map_err(reject)?,
                    _ => self.begin_request(more).map_err(reject)?,
                }
                Ok(Step::Pass(bytes))
            }
        }
    }

    fn trailers(&mut self, data: &[u8]) -> Result<Step, (usize, Stop)> {
        match self
            .head
            .feed(data, &self.limits)
            .map_err(|reason| fail((0, reason)))?
        {
            Scan::Done(bytes) => {
                self.end_message();
                Ok(Step::Pass(bytes))
            }
            Scan::More | Scan::Blank(_) => Ok(Step::More),
        }
    }

    fn begin_request(&mut self, more: bool) -> Result<(), Reason> {
        let body = self.facts.body().filter(|body| *body != Body::Length(0));
        if self.facts.upgrade && body.is_none() && more {
            return Err(Reason::UpgradeEarlyData);
        }
        self.begin_body(body);
        Ok(())
    }

    fn begin_response(&mut self) -> Result<(), Reason> {
        let question = self.question.ok_or(Reason::UnsolicitedResponse)?;
        let body = self.facts.body();
        let has_body = body.is_some_and(|body| body != Body::Length(0));
        match self.facts.status {
            101 if !question.upgrade => Err(Reason::UnexpectedSwitch),
            100..200 | 204 if has_body => Err(Reason::BodyNotAllowed),
            101 => {
                self.state = State::Raw;
                Ok(())
            }
            100..200 => self.begin_informational(),
            204 | 304 => {
                self.end_message();
                Ok(())
            }
            _ if question.head => {
                self.end_message();
                Ok(())
            }
            _ if body.is_none() => {
                self.state = State::UntilClose;
                Ok(())
            }
            _ => {
                self.begin_body(body);
                Ok(())
            }
        }
    }

    fn begin_informational(&mut self) -> Result<(), Reason> {
        self.informational += 1;
        if self.informational > INFORMATIONAL_MAX {
            return Err(Reason::TooManyInformational);
        }
        self.head = Head::new(self.kind);
        Ok(())
    }

    fn begin_body(&mut self, body: Option<Body>) {
        match body {
            None | Some(Body::Length(0)) => self.end_message(),
            Some(Body::Length(length)) => self.state = State::Length(length),
            Some(Body::Chunked) => self.state = State::Chunks(Chunks::new()),
        }
    }

    fn end_message(&mut self) {
        match self.kind {
            Kind::Response => {
                (self.state, self.question) = (State::Idle, None);
                (self.head, self.informational) = (Head::new(self.kind), 0);
            }
            _ if self.facts.upgrade => self.state = State::Gate,
            _ => self.next_message(),
        }
    }

    fn next_message(&mut self) {
        (self.head, self.blank_skipped) = (Head::new(self.kind), false);
        self.state = if self.facts.persists() {
            State::Head
        } else {
            State::Over
        };
    }
}

enum Step {
    Pass(usize),
    Drop(usize),
    More,
}

fn fail((sound, reason): (usize, Reason)) -> (usize, Stop) {
    (sound, Stop::Fail(reason.into()))
}

fn as_u64(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
