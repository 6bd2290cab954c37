//! The framing of bodies, byte for byte.
//!
//! Always true: a chunk's size line is digits, extensions of RFC 9112 without blanks, and CRLF;
//! nothing else passes.

use super::rejection::Reason;
use super::syntax::{is_token, is_value};

/// Most bytes that the extensions of one body may have; hyper gives up at twice this.
const EXTENSION_BYTES_MAX: u32 = 8 * 1024;

/// Most digits of a chunk's size.
const SIZE_DIGITS_MAX: u8 = 16;

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// After this many bytes.
    Length(u64),
    /// With its last chunk and trailers.
    Chunked,
}

/// Where in a chunked body the next byte stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    at: At,
    /// The size being read, then what is left of the data.
    size: u64,
    digits: u8,
    extension_bytes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Size,
    NameStart,
    Name,
    ValueStart,
    Value,
    Quoted,
    Escaped,
    Unquoted,
    SizeLf,
    Data,
    DataCr,
    DataLf,
}

impl Chunks {
    pub(super) fn new() -> Self {
        Self {
            at: At::Size,
            size: 0,
            digits: 0,
            extension_bytes: 0,
        }
    }

    /// Checks `data` from its start and returns how much of it belongs to the chunks, and whether
    /// the last one has been seen, behind which trailers stand.
    ///
    /// # Errors
    ///
    /// The reason, and how many bytes before it were sound.
    pub(super) fn check(&mut self, data: &[u8]) -> Result<(usize, bool), (usize, Reason)> {
        let mut at = 0;
        while let Some(byte) = data.get(at) {
            if self.at == At::Data {
                let left = u64::try_from(data.len() - at).unwrap_or(u64::MAX);
                let taken = left.min(self.size);
                self.size -= taken;
                at += usize::try_from(taken).unwrap_or(usize::MAX);
                if self.size == 0 {
                    self.at = At::DataCr;
                }
                continue;
            }
            self.at = self.step(*byte).map_err(|reason| (at, reason))?;
            at += 1;
            if self.at == At::Data && self.size == 0 {
                return Ok((at, true));
            }
        }
        Ok((at, false))
    }

    fn step(&mut self, byte: u8) -> Result<At, Reason> {
        match self.at {
            At::Size => self.size_byte(byte),
            At::SizeLf if byte == b'\n' => Ok(At::Data),
            At::SizeLf => Err(Reason::ChunkSize),
            At::DataCr if byte == b'\r' => Ok(At::DataLf),
            At::DataLf if byte == b'\n' => {
                (self.size, self.digits) = (0, 0);
                Ok(At::Size)
            }
            At::DataCr | At::DataLf | At::Data => Err(Reason::ChunkEnd),
            _ => self.extension_byte(byte),
        }
    }

    fn size_byte(&mut self, byte: u8) -> Result<At, Reason> {
        if let Some(digit) = char::from(byte).to_digit(16) {
            self.digits += 1;
            if self.digits > SIZE_DIGITS_MAX {
                return Err(Reason::ChunkSize);
            }
            self.size = self.size << 4 | u64::from(digit);
            return Ok(At::Size);
        }
        match byte {
            _ if self.digits == 0 || i64::try_from(self.size).is_err() => Err(Reason::ChunkSize),
            b'\r' => Ok(At::SizeLf),
            b';' => Ok(At::NameStart),
            _ => Err(Reason::ChunkSize),
        }
    }

    fn extension_byte(&mut self, byte: u8) -> Result<At, Reason> {
        self.extension_bytes += 1;
        if self.extension_bytes > EXTENSION_BYTES_MAX {
            return Err(Reason::ChunkExtension);
        }
        match (self.at, byte) {
            (At::NameStart | At::Name, _) if is_token(byte) => Ok(At::Name),
            (At::Name, b'=') => Ok(At::ValueStart),
            (At::ValueStart, b'"') => Ok(At::Quoted),
            (At::ValueStart | At::Value, _) if is_token(byte) => Ok(At::Value),
            (At::Quoted, b'"') => Ok(At::Unquoted),
            (At::Quoted, b'\\') => Ok(At::Escaped),
            (At::Quoted | At::Escaped, _) if is_value(byte) => Ok(At::Quoted),
            (At::Name | At::Value | At::Unquoted, b';') => Ok(At::NameStart),
            (At::Name | At::Value | At::Unquoted, b'\r') => Ok(At::SizeLf),
            _ => Err(Reason::ChunkExtension),
        }
    }
}
