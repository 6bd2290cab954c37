//! What a pod brings under our names: our own work of an earlier pass, or a forgery.
//!
//! Invariant: it stays only when it is what we would add now, field by field. In the sidecar's
//! configuration, ports and probes follow the pod's containers, and the drain its grace period, which
//! other webhooks change; they are computed anew and never taken over.

use serde_json::{Map, Value};

use super::edit::{Edits, Step};
use super::pod::{Container, List, Object, Pod};
use super::sidecar::{CONFIG_VARIABLE, Sidecar, volumes};
use super::{Quantity, Refusal, reserved};
use crate::settings::{INIT_CONTAINER, PROXY_CONTAINER};

/// Containers and volumes of our names.
pub(super) struct Existing<'a> {
    init: Option<Container<'a>>,
    proxy: Option<Container<'a>>,
    volumes: Vec<(&'a str, &'a Object)>,
    secret: Option<String>,
}

impl<'a> Existing<'a> {
    pub(super) fn read(pod: &Pod<'a>) -> Result<Self, Refusal> {
        let one = |name: &str| {
            let mut named = pod
                .list(List::Init)
                .filter(|container| container.name == name);
            let first = named.next().copied();
            match named.next() {
                None => Ok(first),
                Some(_) => Err(foreign_container(name, "it is there twice")),
            }
        };
        let (init, proxy) = (one(INIT_CONTAINER)?, one(PROXY_CONTAINER)?);
        let mut volumes: Vec<(&str, &Object)> = Vec::new();
        for volume in pod.volumes.iter().flatten() {
            let name = volume
                .get("name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            if reserved::is_our_volume(name) {
                if volumes.iter().any(|(other, _)| *other == name) {
                    return Err(foreign_volume(name, "it is there twice"));
                }
                volumes.push((name, volume));
            }
        }
        Ok(Self {
            secret: proxy.as_ref().and_then(|proxy| secret_of(proxy.fields)),
            init,
            proxy,
            volumes,
        })
    }

    /// The secret that the pod's probes have already.
    pub(super) fn secret(&self) -> Option<&str> {
        self.secret.as_deref()
    }

    /// Makes the pod have exactly `sidecar`.
    pub(super) fn bring_up_to_date(
        &self,
        sidecar: &Sidecar<'_>,
        edits: &mut Edits,
    ) -> Result<(), Refusal> {
        self.add_volumes(sidecar, edits)?;
        let (init, proxy) = (sidecar.init_container(), sidecar.proxy_container());
        if let Some(existing) = &self.init {
            require_same(existing.fields, &init)?;
        }
        if let Some(existing) = &self.proxy {
            require_same(existing.fields, &proxy)?;
        }
        let list = || -> Vec<Step<'static>> { vec!["spec".into(), "initContainers".into()] };
        let at = |index: usize| {
            let mut path = list();
            path.push(index.into());
            path
        };
        if let (Some(0), Some((1, existing))) = (
            self.init.map(|init| init.index),
            self.proxy.map(|proxy| (proxy.index, proxy.fields)),
        ) {
            // Only the configuration may differ, and the service account's or a policy's changes
            // were refused above.
            if config_text(existing) != config_text_of(&proxy) {
                edits.replace(&at(1), proxy);
            }
            return Ok(());
        }
        let mut places: Vec<usize> = [self.init, self.proxy]
            .iter()
            .flatten()
            .map(|container| container.index)
            .collect();
        places.sort_unstable();
        for place in places.into_iter().rev() {
            edits.remove(&at(place));
        }
        if sidecar.pod.has_init_containers() {
            edits.add(&at(0), init);
            edits.add(&at(1), proxy);
        } else {
            edits.add(&list(), Value::Array(vec![init, proxy]));
        }
        Ok(())
    }

    fn add_volumes(&self, sidecar: &Sidecar<'_>, edits: &mut Edits) -> Result<(), Refusal> {
        let mut missing = Vec::new();
        for (name, wanted) in volumes() {
            match self.volumes.iter().find(|(existing, _)| *existing == name) {
                None => missing.push(wanted),
                Some((_, existing)) => {
                    if let Some(difference) = difference(existing, &wanted) {
                        return Err(foreign_volume(name, &difference));
                    }
                }
            }
        }
        if sidecar.pod.volumes.is_some() {
            for volume in missing {
                edits.add(&["spec".into(), "volumes".into(), Step::End], volume);
            }
        } else {
            edits.add(&["spec".into(), "volumes".into()], Value::Array(missing));
        }
        Ok(())
    }
}

fn foreign_container(name: &str, difference: &str) -> Refusal {
    Refusal::Foreign {
        what: format!("init container {name}"),
        difference: difference.to_owned(),
    }
}

fn foreign_volume(name: &str, difference: &str) -> Refusal {
    Refusal::Foreign {
        what: format!("volume {name}"),
        difference: difference.to_owned(),
    }
}

fn require_same(existing: &Object, wanted: &Value) -> Result<(), Refusal> {
    let name = wanted
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let Some(wanted) = wanted.as_object() else {
        return Ok(());
    };
    match difference(&comparable(existing), &Value::Object(comparable(wanted))) {
        None => Ok(()),
        Some(difference) => Err(foreign_container(name, &difference)),
    }
}

/// A container as it is compared: amounts as amounts, the configuration without what follows from
/// the rest of the pod, and no matter whether the cluster wants every image fetched each time.
fn comparable(container: &Object) -> Object {
    let mut container = container.clone();
    if let Some(Value::Object(resources)) = container.get_mut("resources") {
        for amounts in resources.values_mut().filter_map(Value::as_object_mut) {
            amounts.values_mut().for_each(normalize_amount);
        }
    }
    container.remove("imagePullPolicy");
    let variables = container.get_mut("env").and_then(Value::as_array_mut);
    for variable in variables.into_iter().flatten() {
        let Some(variable) = variable.as_object_mut() else {
            continue;
        };
        if variable.get("name").and_then(Value::as_str) == Some(CONFIG_VARIABLE)
            && let Some(value) = variable.get_mut("value")
            && let Some(mut config) = value.as_str().and_then(parse_config)
        {
            config.remove("ports");
            config.remove("probes");
            config.remove("drainTimeout");
            *value = Value::Object(config);
        }
    }
    container
}

fn normalize_amount(amount: &mut Value) {
    let text = match &*amount {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if let Ok(quantity) = text.parse::<Quantity>() {
        *amount = quantity.nanos().to_string().into();
    }
}

fn parse_config(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text).ok()
}

/// The text of the sidecar's configuration.
fn config_text(container: &Object) -> Option<&str> {
    let variables = container.get("env")?.as_array()?.iter();
    let mut texts = variables.filter_map(|variable| {
        let named = variable.get("name")?.as_str()? == CONFIG_VARIABLE;
        named.then(|| variable.get("value")?.as_str()).flatten()
    });
    texts.next()
}

fn config_text_of(container: &Value) -> Option<&str> {
    config_text(container.as_object()?)
}

/// The secret in the configuration of a sidecar that is there already.
fn secret_of(container: &Object) -> Option<String> {
    let config = parse_config(config_text(container)?)?;
    let secret = config.get("probes")?.get("secret")?.as_str()?;
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (secret.len() == 64 && secret.bytes().all(hex)).then(|| secret.to_owned())
}

/// The first field in which two objects differ; `None` when they are the same.
fn difference(existing: &Object, wanted: &Value) -> Option<String> {
    let nothing = Map::new();
    let wanted = wanted.as_object().unwrap_or(&nothing);
    let keys = existing.keys().chain(wanted.keys());
    let mut keys: Vec<&String> = keys.collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .find_map(|key| match (existing.get(key), wanted.get(key)) {
            (Some(existing), Some(wanted)) if existing == wanted => None,
            (Some(Value::Object(existing)), Some(wanted @ Value::Object(_))) => {
                difference(existing, wanted).map(|inner| format!("{key}.{inner}"))
            }
            (None, Some(_)) => Some(format!("{key} is missing")),
            (Some(_), None) => Some(format!("{key} is added")),
            _ => Some(format!("{key} differs")),
        })
}
