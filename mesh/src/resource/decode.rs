//! From a tree to a resource, strictly.
//!
//! Invariant: a scalar is read as a text only when every YAML parser reads it as a text, a choice
//! is an object with exactly one key, and a field without a value is an error.

use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::fault::{Fault, Step, shown};
use super::suggest::one_of;
use super::tree::{Content, Node};

/// Reads a value from a tree. Every fault says where it is.
pub(crate) fn decode<'de, T: de::Deserialize<'de>>(node: &'de Node) -> Result<T, Fault> {
    T::deserialize(Decoder { node })
}

#[derive(Clone, Copy)]
struct Decoder<'de> {
    node: &'de Node,
}

/// What an unquoted scalar is to YAML, in the widest reading: that of YAML 1.1, which kubectl uses.
enum Plain {
    Null,
    Bool(Option<bool>),
    Integer(Option<i64>),
    Float,
    Text,
}

fn resolve(text: &str) -> Plain {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Plain::Null,
        "true" | "True" | "TRUE" => return Plain::Bool(Some(true)),
        "false" | "False" | "FALSE" => return Plain::Bool(Some(false)),
        _ => {}
    }
    let lower = text.to_ascii_lowercase();
    if matches!(
        lower.as_str(),
        "y" | "n" | "yes" | "no" | "on" | "off" | "true" | "false"
    ) {
        return Plain::Bool(None);
    }
    resolve_number(&lower)
}

fn resolve_number(text: &str) -> Plain {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".nan") {
        return Plain::Float;
    }
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Plain::Text;
    }
    let digits = unsigned.replace('_', "");
    let all = |text: &str, radix: u32| !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
    let is_other_radix = [("0x", 16), ("0o", 8), ("0b", 2)]
        .into_iter()
        .any(|(prefix, radix)| {
            digits
                .strip_prefix(prefix)
                .is_some_and(|rest| all(rest, radix))
        });
    if is_other_radix {
        return Plain::Integer(None);
    }
    if all(&digits, 10) {
        let is_plain = unsigned == digits && !text.starts_with('+');
        let has_zero = digits.len() > 1 && digits.starts_with('0');
        let number = text.parse().ok().filter(|_| is_plain && !has_zero);
        return Plain::Integer(number);
    }
    let is_float = digits.parse::<f64>().is_ok() && digits.chars().any(|c| c.is_ascii_digit());
    if is_float { Plain::Float } else { Plain::Text }
}

impl<'de> Decoder<'de> {
    /// The text of a scalar that no parser takes for anything else.
    fn text(self) -> Result<&'de str, Fault> {
        let (text, plain) = match &*self.node.content {
            Content::Scalar { text, plain } => (text.as_str(), *plain),
            Content::List(_) => return Err(self.fault("a list stands here", "write one text")),
            Content::Map(_) => return Err(self.fault("an object stands here", "write one text")),
        };
        if !plain {
            return Ok(text);
        }
        let what = match resolve(text) {
            Plain::Text => return Ok(text),
            Plain::Null => return Err(self.no_value()),
            Plain::Bool(_) => "a truth value to YAML",
            Plain::Integer(_) | Plain::Float => "a number to YAML",
        };
        let message = format!(
            "`{}` without quotes is {what}, and a text belongs here",
            shown(text)
        );
        Err(self.fault(message, format!("write \"{}\"", shown(text))))
    }

    fn integer(self) -> Result<i64, Fault> {
        let help = "write a whole number in decimal digits, without quotes";
        let (text, plain) = match &*self.node.content {
            Content::Scalar { text, plain } => (text.as_str(), *plain),
            _ => return Err(self.fault("a number belongs here", help)),
        };
        match resolve(text) {
            Plain::Integer(Some(number)) if plain => Ok(number),
            Plain::Null if plain => Err(self.no_value()),
            _ => Err(self.fault(format!("`{}` is not a whole number", shown(text)), help)),
        }
    }

    fn no_value(self) -> Fault {
        self.fault("no value stands here", "write one, or remove the field")
    }

    fn fault(self, message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(message, help).at(self.node.at)
    }

    fn list(self) -> Result<&'de [Node], Fault> {
        match &*self.node.content {
            Content::List(list) => Ok(list),
            Content::Scalar { .. } if self.node.is_null() => Err(self.no_value()),
            Content::Scalar { text, .. } => {
                Err(self.fault("a list belongs here", format!("write `[{}]`", shown(text))))
            }
            Content::Map(_) => Err(self.fault(
                "a list belongs here",
                "start each entry with `- `, or put brackets around it",
            )),
        }
    }

    fn map(self, fields: &[&str]) -> Result<&'de [(Node, Node)], Fault> {
        match &*self.node.content {
            Content::Map(map) => Ok(map),
            Content::Scalar { .. } if self.node.is_null() => Err(self.no_value()),
            _ if fields.is_empty() => Err(self.fault("an object belongs here", "write `{}`")),
            _ => Err(self.fault(
                "an object belongs here",
                format!("possible in it: {}", one_of(fields)),
            )),
        }
    }

    fn visit_map<V: Visitor<'de>>(self, fields: &[&str], visitor: V) -> Result<V::Value, Fault> {
        let entries = self.map(fields)?.iter();
        let value = visitor.visit_map(Entries {
            entries,
            value: None,
        });
        value.map_err(|fault| fault.at(self.node.at))
    }

    fn visit_list<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let entries = self.list()?.iter().enumerate();
        let value = visitor.visit_seq(List { entries });
        value.map_err(|fault| fault.at(self.node.at))
    }

    /// The one key of a choice and its value; no value for a bare word.
    fn choice(self, possible: &[&str]) -> Result<(Decoder<'de>, Option<Decoder<'de>>), Fault> {
        let map = match &*self.node.content {
            Content::Scalar { .. } => {
                self.text()?;
                return Ok((self, None));
            }
            Content::Map(map) => map,
            Content::List(_) => {
                let help = format!("write one of {}", one_of(possible));
                return Err(self.fault("a list stands here", help));
            }
        };
        match map.as_slice() {
            [(key, value)] => Ok((Decoder { node: key }, Some(Decoder { node: value }))),
            [] => Err(self.fault(
                "an empty object chooses nothing",
                format!("write exactly one of {}", one_of(possible)),
            )),
            several => {
                let keys: Vec<&str> = several.iter().filter_map(|(key, _)| key.text()).collect();
                let unknown = keys.iter().find(|key| !possible.contains(key));
                if let Some(unknown) = unknown {
                    let fault: Fault = de::Error::unknown_variant(unknown, &[]);
                    let help = format!(
                        "{}; write exactly one key, one of {}",
                        match super::suggest::nearest(unknown, possible) {
                            Some(word) => format!("did you mean `{word}`?"),
                            None => "it is no key of a choice".to_owned(),
                        },
                        one_of(possible)
                    );
                    return Err(Fault::new(fault.message, help).at(self.node.at));
                }
                Err(self.fault(
                    format!(
                        "{} stand in one object, and a choice has exactly one key",
                        and(&keys)
                    ),
                    "write an object for each, as entries of the list",
                ))
            }
        }
    }
}

/// Words for a sentence: "`a` and `b`".
fn and(words: &[&str]) -> String {
    one_of(words).replace(" or ", " and ")
}

impl<'de> Deserializer<'de> for Decoder<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let node = self.node;
        let value = match &*node.content {
            Content::List(_) => return self.visit_list(visitor),
            Content::Map(_) => return self.visit_map(&[], visitor),
            Content::Scalar { text, plain: false } => visitor.visit_borrowed_str(text),
            Content::Scalar { text, .. } => match resolve(text) {
                Plain::Integer(Some(number)) => match u64::try_from(number) {
                    Ok(number) => visitor.visit_u64(number),
                    Err(_) => visitor.visit_i64(number),
                },
                Plain::Bool(Some(value)) => visitor.visit_bool(value),
                _ => visitor.visit_borrowed_str(self.text()?),
            },
        };
        value.map_err(|fault: Fault| fault.at(node.at))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &*self.node.content {
            Content::Scalar { text, plain: true } => match resolve(text) {
                Plain::Bool(Some(value)) => visitor.visit_bool(value),
                Plain::Null => Err(self.no_value()),
                _ => Err(self.fault(
                    format!("`{}` is not a truth value", shown(text)),
                    "write `true` or `false`",
                )),
            },
            _ => Err(self.fault("a truth value belongs here", "write `true` or `false`")),
        }
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let number = self.integer()?;
        visitor
            .visit_i64(number)
            .map_err(|fault: Fault| fault.at(self.node.at))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.text()?;
        visitor
            .visit_borrowed_str(text)
            .map_err(|fault: Fault| fault.at(self.node.at))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_string(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.node.is_null() {
            return Err(self.no_value());
        }
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit_list(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit_map(&[], visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.visit_map(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let (key, value) = self.choice(variants)?;
        let choice = Choice { key, value };
        visitor
            .visit_enum(choice)
            .map_err(|fault| fault.at(self.node.at))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple
        tuple_struct
    }
}

struct Entries<'de> {
    entries: std::slice::Iter<'de, (Node, Node)>,
    value: Option<(&'de Node, &'de Node)>,
}

impl<'de> de::MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let Some((key, value)) = self.entries.next() else {
            return Ok(None);
        };
        self.value = Some((key, value));
        let read = seed.deserialize(Decoder { node: key });
        read.map(Some)
            .map_err(|fault| inside(fault, key).at(key.at))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some((key, value)) = self.value.take() else {
            return Err(Fault::new(
                "a value was read without its key",
                "report this as a defect",
            ));
        };
        let read = seed.deserialize(Decoder { node: value });
        read.map_err(|fault| inside(fault, key).at(value.at))
    }
}

fn inside(fault: Fault, key: &Node) -> Fault {
    match key.text() {
        Some(text) => fault.within(Step::Key(shown(text))),
        None => fault,
    }
}

struct List<'de> {
    entries: std::iter::Enumerate<std::slice::Iter<'de, Node>>,
}

impl<'de> de::SeqAccess<'de> for List<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        let Some((index, node)) = self.entries.next() else {
            return Ok(None);
        };
        let read = seed.deserialize(Decoder { node });
        let place = |fault: Fault| fault.at(node.at).within(Step::Index(index));
        read.map(Some).map_err(place)
    }
}

struct Choice<'de> {
    key: Decoder<'de>,
    value: Option<Decoder<'de>>,
}

impl<'de> de::EnumAccess<'de> for Choice<'de> {
    type Error = Fault;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Fault> {
        let name = self.key.text()?.into_deserializer();
        let variant = seed.deserialize(name);
        let place = |fault: Fault| match self.value {
            Some(_) => inside(fault, self.key.node).at(self.key.node.at),
            None => fault.at(self.key.node.at),
        };
        Ok((variant.map_err(place)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Choice<'de> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        if self.value.is_none() {
            return Ok(());
        }
        let word = shown(self.key.text()?);
        let help = format!("write `{word}` alone");
        Err(self.key.fault("a word belongs here, not an object", help))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        let value = self.object()?;
        seed.deserialize(value)
            .map_err(|fault| inside(fault, self.key.node))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Fault> {
        let value = self.object()?;
        value
            .visit_list(visitor)
            .map_err(|fault| inside(fault, self.key.node))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let value = self.object()?;
        let read = value.visit_map(fields, visitor);
        read.map_err(|fault| inside(fault, self.key.node))
    }
}

impl<'de> Choice<'de> {
    /// The object below the key: a bare word is no choice where a choice has fields.
    fn object(&self) -> Result<Decoder<'de>, Fault> {
        let word = shown(self.key.text()?);
        self.value.ok_or_else(|| {
            let message = format!("`{word}` is a key here, and its object is missing");
            self.key
                .fault(message, format!("write `{{ {word}: {{ … }} }}`"))
        })
    }
}
