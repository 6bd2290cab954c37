//! A pod as raw JSON, with the few fields that injection looks at.
//!
//! Invariant: what [`Pod::read`] accepts has the shape of a pod where we look and where we patch;
//! everything else is left as it is.

use std::time::Duration;

use serde_json::{Map, Value};

use super::Refusal;

/// Time to end where a pod says nothing.
const GRACE_DEFAULT: Duration = Duration::from_secs(30);

/// A JSON object.
pub(super) type Object = Map<String, Value>;

/// A pod, or the template of one.
pub(super) struct Pod<'a> {
    pub(super) metadata: Option<&'a Object>,
    annotations: Option<&'a Object>,
    labels: Option<&'a Object>,
    pub(super) spec: &'a Object,
    /// Containers, init containers and ephemeral containers, each in its order.
    pub(super) containers: Vec<Container<'a>>,
    pub(super) volumes: Option<Vec<&'a Object>>,
}

/// One of the lists of containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    Main,
    Init,
    Ephemeral,
}

impl List {
    pub(super) const ALL: [Self; 3] = [Self::Main, Self::Init, Self::Ephemeral];

    pub(super) fn field(self) -> &'static str {
        match self {
            Self::Main => "containers",
            Self::Init => "initContainers",
            Self::Ephemeral => "ephemeralContainers",
        }
    }
}

/// One container, and where it stands.
#[derive(Clone, Copy)]
pub(super) struct Container<'a> {
    pub(super) list: List,
    pub(super) index: usize,
    pub(super) name: &'a str,
    pub(super) fields: &'a Object,
}

impl<'a> Container<'a> {
    /// A field that is an object.
    pub(super) fn object(&self, field: &str) -> Result<Option<&'a Object>, Refusal> {
        object(self.fields, field, || self.path(field))
    }

    /// A field that is a list of objects.
    pub(super) fn objects(&self, field: &str) -> Result<Vec<&'a Object>, Refusal> {
        Ok(objects(self.fields, field, || self.path(field))?.unwrap_or_default())
    }

    fn path(&self, field: &str) -> String {
        format!("spec.{}[{}].{field}", self.list.field(), self.index)
    }

    /// Whether it runs beside the application, and so may have probes and ports.
    pub(super) fn runs_beside(&self) -> bool {
        let restarts = self.fields.get("restartPolicy").and_then(Value::as_str) == Some("Always");
        self.list == List::Main || (self.list == List::Init && restarts)
    }
}

impl<'a> Pod<'a> {
    pub(super) fn read(pod: &'a Value) -> Result<Self, Refusal> {
        let root = pod.as_object();
        let root = root.ok_or_else(|| Refusal::shape("the pod", "it is not an object"))?;
        let metadata = object(root, "metadata", || "metadata".to_owned())?;
        let of_metadata = |field: &'static str| match metadata {
            Some(metadata) => object(metadata, field, || format!("metadata.{field}")),
            None => Ok(None),
        };
        let spec = object(root, "spec", || "spec".to_owned())?;
        let spec = spec.ok_or_else(|| Refusal::shape("spec", "it is missing"))?;
        let mut containers = Vec::new();
        for list in List::ALL {
            containers.extend(read_containers(spec, list)?);
        }
        Ok(Self {
            metadata,
            annotations: of_metadata("annotations")?,
            labels: of_metadata("labels")?,
            spec,
            containers,
            volumes: objects(spec, "volumes", || "spec.volumes".to_owned())?,
        })
    }

    /// Its annotations, as they stand.
    pub(super) fn annotations(&self) -> impl Iterator<Item = (&'a str, &'a Value)> + use<'a> {
        let annotations = self.annotations.into_iter().flatten();
        annotations.map(|(key, value)| (key.as_str(), value))
    }

    /// Whether there is an object that annotations can be added to.
    pub(super) fn has_annotations(&self) -> bool {
        self.annotations.is_some()
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&'a str> {
        self.annotations?.get(key)?.as_str()
    }

    pub(super) fn label(&self, key: &str) -> Option<&'a Value> {
        self.labels?.get(key)
    }

    /// A field of the spec that is true or not.
    pub(super) fn flag(&self, field: &str) -> bool {
        self.spec.get(field).and_then(Value::as_bool) == Some(true)
    }

    /// How long its containers have to end.
    pub(super) fn grace_period(&self) -> Duration {
        let said = self.spec.get("terminationGracePeriodSeconds");
        let said = said.and_then(Value::as_u64).map(Duration::from_secs);
        said.unwrap_or(GRACE_DEFAULT)
    }

    /// The service account whose identity the pod has.
    pub(super) fn service_account(&self) -> &'a str {
        let fields = ["serviceAccountName", "serviceAccount"];
        let spec = self.spec;
        let mut named = fields.iter().filter_map(|field| spec.get(*field)?.as_str());
        named.find(|name| !name.is_empty()).unwrap_or("default")
    }

    /// The containers of one list.
    pub(super) fn list(&self, list: List) -> impl Iterator<Item = &Container<'a>> {
        self.containers
            .iter()
            .filter(move |container| container.list == list)
    }

    /// Whether the spec has a list of init containers, which may be empty.
    pub(super) fn has_init_containers(&self) -> bool {
        self.spec
            .get(List::Init.field())
            .is_some_and(Value::is_array)
    }
}

fn read_containers(spec: &Object, list: List) -> Result<Vec<Container<'_>>, Refusal> {
    let field = list.field();
    let found = objects(spec, field, || format!("spec.{field}"))?.unwrap_or_default();
    found
        .into_iter()
        .enumerate()
        .map(|(index, fields)| {
            let name = match fields.get("name") {
                None | Some(Value::Null) => "",
                Some(Value::String(name)) => name,
                Some(_) => {
                    let field = format!("spec.{field}[{index}].name");
                    return Err(Refusal::shape(field, "it is not a text"));
                }
            };
            Ok(Container {
                list,
                index,
                name,
                fields,
            })
        })
        .collect()
}

/// An object in an object; `null` is as good as absent, as the API server has it.
pub(super) fn object<'a>(
    of: &'a Object,
    field: &str,
    path: impl FnOnce() -> String,
) -> Result<Option<&'a Object>, Refusal> {
    match of.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(Refusal::shape(path(), "it is not an object")),
    }
}

/// A list of objects in an object.
pub(super) fn objects<'a>(
    of: &'a Object,
    field: &str,
    path: impl Fn() -> String,
) -> Result<Option<Vec<&'a Object>>, Refusal> {
    match of.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) => {
            let objects = list.iter().enumerate().map(|(index, entry)| {
                let object = entry.as_object();
                object.ok_or_else(|| {
                    Refusal::shape(format!("{}[{index}]", path()), "it is not an object")
                })
            });
            objects.collect::<Result<_, _>>().map(Some)
        }
        Some(_) => Err(Refusal::shape(path(), "it is not a list")),
    }
}
