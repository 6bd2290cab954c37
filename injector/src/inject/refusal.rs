//! Why a pod is not admitted.
//!
//! Invariant: the text is for whoever made the pod. It names what is wrong and what to do.

/// Why a pod is not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// An annotation or label is wrong.
    #[error("{key} of {holder}: {problem}; {help}")]
    Annotation {
        /// Its key.
        key: String,
        /// `the pod`, or `namespace NAME`.
        holder: String,
        /// What is wrong.
        problem: String,
        /// The allowed form.
        help: String,
    },
    /// The namespace does not let its pods choose this.
    #[error(
        "{key} of the pod: namespace {namespace} does not let its pods choose this; whoever owns \
         the namespace can annotate it with sidegate.dev/allow-pod-overrides: {name}, or with \
         {key} itself"
    )]
    NotAllowed {
        /// The annotation's key.
        key: String,
        /// The key without its prefix.
        name: &'static str,
        /// The namespace.
        namespace: String,
    },
    /// The pod takes what is the sidecar's.
    #[error("{what} is Sidegate's; {help}")]
    Taken {
        /// What was taken, and where.
        what: String,
        /// What to do.
        help: &'static str,
    },
    /// The pod brings a container or volume of ours that is not what is injected.
    #[error(
        "{what} is not what is injected here ({difference}); remove it, or start from the manifest \
         before injection (`sidegate inject --uninject`)"
    )]
    Foreign {
        /// Which container or volume.
        what: String,
        /// The first difference.
        difference: String,
    },
    /// A probe or hook cannot be carried out.
    #[error("{probe} of container {container}: {problem}; {help}")]
    Probe {
        /// The container.
        container: String,
        /// The field.
        probe: &'static str,
        /// What is wrong.
        problem: String,
        /// What to write instead.
        help: &'static str,
    },
    /// The namespace's pod security refuses the container that redirects.
    #[error(
        "namespace {namespace} enforces pod security `{level}`, which refuses NET_ADMIN: until \
         there is a CNI plug-in, labelled namespaces need `privileged` for Sidegate's init \
         container; label the namespace pod-security.kubernetes.io/enforce=privileged, or remove \
         its label sidegate.dev/inject"
    )]
    PodSecurity {
        /// The namespace.
        namespace: String,
        /// What it enforces.
        level: String,
    },
    /// It is not a pod.
    #[error("{field}: {problem}")]
    Shape {
        /// The field.
        field: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The system has no random bytes for the pod's secret.
    #[error("the system has no random bytes for the secret of the pod's probes; try again")]
    NoRandom,
}

impl Refusal {
    pub(crate) fn shape(field: impl Into<String>, problem: &'static str) -> Self {
        Self::Shape {
            field: field.into(),
            problem,
        }
    }
}
