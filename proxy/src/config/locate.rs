//! Where in a YAML text a field is: what turns a contradiction into `FILE:LINE:COLUMN`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};

/// A line and a column, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    line: u64,
    column: u64,
}

impl Place {
    const START: Self = Self { line: 1, column: 1 };

    fn of(location: Location) -> Self {
        Self {
            line: location.line().max(1),
            column: location.column().max(1),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The place of every value of a text.
#[derive(Debug, Default)]
pub(super) struct Places(Option<Spanned<Node>>);

impl Places {
    /// Reads a text that is known to be YAML.
    pub(super) fn of(text: &str) -> Self {
        Self(serde_saphyr::from_str(text).ok())
    }

    /// The place of `field`, such as `ports.0.address`; of its nearest parent when it is not there.
    pub(super) fn find(&self, field: &str) -> Place {
        let Some(mut at) = self.0.as_ref() else {
            return Place::START;
        };
        for key in field.split('.') {
            match at.value.child(key) {
                Some(child) => at = child,
                None => break,
            }
        }
        Place::of(at.referenced)
    }
}

#[derive(Debug)]
enum Node {
    Map(BTreeMap<String, Spanned<Self>>),
    List(Vec<Spanned<Self>>),
    Scalar,
}

impl Node {
    fn child(&self, key: &str) -> Option<&Spanned<Self>> {
        match self {
            Self::Map(map) => map.get(key),
            Self::List(list) => list.get(key.parse::<usize>().ok()?),
            Self::Scalar => None,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = access.next_key::<String>()? {
            map.insert(key, access.next_value()?);
        }
        Ok(Node::Map(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = access.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        IgnoredAny::deserialize(deserializer)?;
        Ok(Node::Scalar)
    }
}
