//! A head, or a trailer section, read line by line.
//!
//! Always true: each byte is looked at a bounded number of times however the block arrives, and a
//! block that ends has passed every check on its lines.

use super::GuardLimits;
use super::framing::Body;
use super::rejection::Reason;
use super::syntax::{
    check_authority, check_method, check_target, decimal, is_token, is_value, list, same_authority,
    trim, value_reason,
};

/// What kind of block is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Response,
    Trailers,
}

/// How far a block has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// More bytes are needed.
    More,
    /// An empty line of this many bytes stands before the start line.
    Blank(usize),
    /// The block ends after this many bytes.
    Done(usize),
}

/// The facts of a head that decide how its message is framed.
#[derive(Clone, Copy, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, each from its own field"
)]
pub(super) struct Facts {
    /// HTTP/1.1, not HTTP/1.0.
    pub(super) http11: bool,
    /// The response's status.
    pub(super) status: u16,
    /// `Connection: close`, on any line.
    pub(super) close: bool,
    /// `Connection: keep-alive`, on any line.
    pub(super) keep_alive: bool,
    /// There is an `Upgrade`.
    pub(super) upgrade: bool,
    content_length: Option<u64>,
    chunked: bool,
    /// Authority of an absolute target, as a range of the block.
    target: Option<(usize, usize)>,
    /// Host, as a range of the block.
    host: Option<(usize, usize)>,
}

impl Facts {
    /// Whether another message may follow on the connection.
    pub(super) fn persists(&self) -> bool {
        !self.close && (self.http11 || self.keep_alive)
    }

    /// The framing that the fields ask for; `None` where they say nothing.
    pub(super) fn body(&self) -> Option<Body> {
        match (self.chunked, self.content_length) {
            (true, _) => Some(Body::Chunked),
            (false, length) => length.map(Body::Length),
        }
    }
}

/// A block that is being read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    kind: Kind,
    facts: Facts,
    /// Where the current line starts.
    line_at: usize,
    /// Where to go on looking for a line's end.
    scan_at: usize,
    fields: usize,
    started: bool,
}

impl Head {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            facts: Facts::default(),
            line_at: 0,
            scan_at: 0,
            fields: 0,
            started: kind == Kind::Trailers,
        }
    }

    pub(super) fn facts(&self) -> Facts {
        self.facts
    }

    /// Reads on in `block`, which starts where the block starts and has grown since the last call.
    pub(super) fn feed(&mut self, block: &[u8], limits: &GuardLimits) -> Result<Scan, Reason> {
        while let Some(end) = self.line_end(block, limits)? {
            let line_at = self.line_at;
            let line = block.get(line_at..end).unwrap_or_default();
            let next = end + b"\r\n".len();
            (self.line_at, self.scan_at) = (next, next);
            match (line.is_empty(), self.started) {
                (true, true) => return self.finish(block).map(|()| Scan::Done(next)),
                (true, false) => return Ok(Scan::Blank(next)),
                (false, true) => self.field(line, line_at, limits)?,
                (false, false) => self.start(line)?,
            }
        }
        Ok(Scan::More)
    }

    /// Where the current line's CRLF stands. What no later byte could mend is refused at once:
    /// what is not HTTP may never end a line.
    fn line_end(&mut self, block: &[u8], limits: &GuardLimits) -> Result<Option<usize>, Reason> {
        let bound = limits.head_bytes_max;
        let block = block.get(..bound).unwrap_or(block);
        let more = |reason| {
            if block.len() < bound {
                Ok(None)
            } else {
                Err(reason)
            }
        };
        if self.started && matches!(block.get(self.line_at), Some(b' ' | b'\t')) {
            return Err(Reason::ObsFold);
        }
        let unseen = block.get(self.scan_at..).unwrap_or_default();
        let found = unseen.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
        let Some(end) = found.map(|found| self.scan_at + found) else {
            self.scan_at = block.len();
            return more(Reason::HeadTooLarge);
        };
        self.scan_at = end;
        match (block.get(end), block.get(end + 1)) {
            (Some(b'\n'), _) => Err(Reason::BareLf),
            (_, Some(b'\n')) => Ok(Some(end)),
            (_, Some(_)) => Err(Reason::BareCr),
            (_, None) => more(Reason::HeadTooLarge),
        }
    }

    fn start(&mut self, line: &[u8]) -> Result<(), Reason> {
        self.started = true;
        if self.kind == Kind::Response {
            return self.status_line(line);
        }
        let mut parts = line.splitn(3, |byte| *byte == b' ');
        let (Some(method), Some(target), Some(version)) =
            (parts.next(), parts.next(), parts.next())
        else {
            return Err(Reason::RequestLine);
        };
        check_method(method)?;
        self.facts.http11 = match version {
            b"HTTP/1.1" => true,
            b"HTTP/1.0" => false,
            _ => return Err(Reason::Version),
        };
        if let Some(authority) = check_target(method, target)? {
            let at = method.len() + 1 + b"http://".len();
            self.facts.target = Some((at, at + authority.len()));
        }
        Ok(())
    }

    fn status_line(&mut self, line: &[u8]) -> Result<(), Reason> {
        self.facts.http11 = match line.get(..9) {
            Some(b"HTTP/1.1 ") => true,
            Some(b"HTTP/1.0 ") => false,
            Some([b'H', b'T', b'T', b'P', b'/', ..]) => return Err(Reason::Version),
            _ => return Err(Reason::StatusLine),
        };
        let rest = line.get(9..).unwrap_or_default();
        let (status, phrase) = rest.split_at_checked(3).ok_or(Reason::StatusCode)?;
        let status = decimal(status).and_then(|status| u16::try_from(status).ok());
        self.facts.status = status
            .filter(|status| (100..600).contains(status))
            .ok_or(Reason::StatusCode)?;
        // The phrase is optional, and so is the blank before none.
        if !phrase.is_empty() && !phrase.starts_with(b" ") {
            return Err(Reason::StatusCode);
        }
        check_value(phrase)
    }

    fn field(&mut self, line: &[u8], line_at: usize, limits: &GuardLimits) -> Result<(), Reason> {
        self.fields += 1;
        if self.fields > limits.headers_max {
            return Err(Reason::TooManyHeaders);
        }
        let colon = line.iter().position(|byte| !is_token(*byte));
        let (name, rest) = colon
            .and_then(|at| line.split_at_checked(at))
            .ok_or(Reason::HeaderName)?;
        let [b':', value @ ..] = rest else {
            return Err(name_reason(rest));
        };
        if name.is_empty() {
            return Err(Reason::HeaderName);
        }
        check_value(value)?;
        if self.kind == Kind::Trailers {
            return check_trailer(name);
        }
        self.known_field(name, value, line_at + name.len() + 1)
    }

    /// Takes note of the fields that frame, route or end a message.
    fn known_field(&mut self, name: &[u8], value: &[u8], value_at: usize) -> Result<(), Reason> {
        let named = |known: &[u8]| name.eq_ignore_ascii_case(known);
        match name.len() {
            4 if named(b"host") && self.kind == Kind::Request => self.host(value, value_at),
            7 if named(b"upgrade") => {
                self.facts.upgrade = true;
                Ok(())
            }
            10 if named(b"connection") => {
                // hyper ignores a list that is not ASCII; there must be one reading.
                if !value.is_ascii() {
                    return Err(Reason::HeaderValue);
                }
                for option in list(value) {
                    self.facts.close |= option.eq_ignore_ascii_case(b"close");
                    self.facts.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                }
                Ok(())
            }
            14 if named(b"content-length") => self.content_length(value),
            17 if named(b"transfer-encoding") => self.transfer_encoding(value),
            14 if named(b"content_length") => Err(Reason::FramingLookalike),
            17 if named(b"transfer_encoding") => Err(Reason::FramingLookalike),
            _ => Ok(()),
        }
    }

    fn host(&mut self, value: &[u8], value_at: usize) -> Result<(), Reason> {
        if self.facts.host.is_some() {
            return Err(Reason::HostDuplicate);
        }
        let host = trim(value, true);
        check_authority(host)?;
        let lead = value
            .iter()
            .take_while(|byte| matches!(byte, b' ' | b'\t'))
            .count();
        let at = value_at + lead;
        self.facts.host = Some((at, at + host.len()));
        Ok(())
    }

    fn content_length(&mut self, value: &[u8]) -> Result<(), Reason> {
        if self.facts.content_length.is_some() {
            return Err(Reason::ContentLengthDuplicate);
        }
        self.facts.content_length = Some(decimal(trim(value, true)).ok_or(Reason::ContentLength)?);
        Ok(())
    }

    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Reason> {
        if self.facts.chunked {
            return Err(Reason::TransferEncodingDuplicate);
        }
        // Other cases, tabs and lists are legal, and what every smuggled encoding is made of.
        if trim(value, false) != b"chunked" {
            return Err(Reason::TransferEncoding);
        }
        self.facts.chunked = true;
        Ok(())
    }

    fn finish(&self, block: &[u8]) -> Result<(), Reason> {
        let facts = &self.facts;
        if facts.chunked && facts.content_length.is_some() {
            return Err(Reason::ContentLengthAndTransferEncoding);
        }
        if facts.chunked && !facts.http11 {
            return Err(Reason::TransferEncodingHttp10);
        }
        if self.kind != Kind::Request {
            return Ok(());
        }
        let part = |range: Option<(usize, usize)>| range.and_then(|(from, to)| block.get(from..to));
        match (part(facts.target), part(facts.host)) {
            (_, None) if facts.http11 => Err(Reason::HostMissing),
            (Some(target), Some(host)) if !same_authority(target, host) => {
                Err(Reason::HostMismatch)
            }
            _ => Ok(()),
        }
    }
}

fn check_value(value: &[u8]) -> Result<(), Reason> {
    match value.iter().find(|byte| !is_value(**byte)) {
        None => Ok(()),
        Some(byte) => Err(value_reason(*byte)),
    }
}

/// What is wrong with a line on which a colon does not follow the name.
fn name_reason(rest: &[u8]) -> Reason {
    match rest.first() {
        Some(b' ' | b'\t') if trim(rest, true).starts_with(b":") => Reason::SpaceBeforeColon,
        Some(0) => Reason::Nul,
        _ => Reason::HeaderName,
    }
}

/// Trailers that change framing, routing or who is speaking (RFC 9110, §6.5.1).
fn check_trailer(name: &[u8]) -> Result<(), Reason> {
    const REFUSED: [&[u8]; 18] = [
        b"authorization",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"content_length",
        b"cookie",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"transfer_encoding",
        b"upgrade",
    ];
    if REFUSED
        .iter()
        .any(|refused| name.eq_ignore_ascii_case(refused))
    {
        return Err(Reason::Trailer);
    }
    Ok(())
}
