//! The controller: Kubernetes in, what each sidecar needs out.
