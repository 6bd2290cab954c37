use super::*;

const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
current-context: one
clusters: [{ name: c, cluster: { server: 'http://127.0.0.1:1' } }]
users: [{ name: u, user: {} }]
contexts:
  - { name: one, context: { cluster: c, user: u } }
  - { name: two, context: { cluster: c, user: u, namespace: shop } }
";

fn arguments(context: Option<&str>) -> (tempfile::TempDir, ClusterArgs) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config");
    std::fs::write(&file, KUBECONFIG).unwrap();
    let arguments = ClusterArgs {
        kubeconfig: Some(file),
        context: context.map(str::to_owned),
    };
    (folder, arguments)
}

#[tokio::test]
async fn the_context_decides_cluster_and_namespace() {
    let (_folder, one) = arguments(None);
    let cluster = Cluster::connect(&one).await.unwrap();
    assert_eq!(
        cluster.scope(None, false),
        Scope::Namespace("default".to_owned())
    );
    let (_folder, two) = arguments(Some("two"));
    let cluster = Cluster::connect(&two).await.unwrap();
    assert_eq!(
        cluster.scope(None, false),
        Scope::Namespace("shop".to_owned())
    );
    assert_eq!(
        cluster.scope(Some("jobs"), false),
        Scope::Namespace("jobs".to_owned())
    );
    assert_eq!(cluster.scope(None, true), Scope::All);
}

#[tokio::test]
async fn what_cannot_be_used_says_what_to_do() {
    let (_folder, unknown) = arguments(Some("three"));
    let error = Cluster::connect(&unknown).await.err().unwrap();
    assert_eq!(
        format!("{error:#}"),
        "the kubeconfig has no context `three`, only: one, two"
    );
    let missing = ClusterArgs {
        kubeconfig: Some("/nowhere/config".into()),
        context: None,
    };
    let error = format!("{:#}", Cluster::connect(&missing).await.err().unwrap());
    assert!(
        error.starts_with("the kubeconfig /nowhere/config cannot be used: "),
        "{error}"
    );
}

#[tokio::test]
async fn a_cluster_that_does_not_answer_is_named() {
    let (_folder, one) = arguments(None);
    let cluster = Cluster::connect(&one).await.unwrap();
    let selection = sidecars::Selection::new(&cluster, None, None, false).unwrap();
    let error = format!("{:#}", cluster.sidecars(&selection).await.unwrap_err());
    assert!(
        error.starts_with("listing pods: the cluster one cannot be reached: "),
        "{error}"
    );
    assert!(error.contains("Connection refused"), "{error}");
}
